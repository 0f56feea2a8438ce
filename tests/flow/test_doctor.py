"""The doctor names what is wrong, and removes only what is dead."""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.files import Files
from pipeline.flow import doctor
from pipeline.flow.doctor import Check
from pipeline.flow.dvc_rwlock import release_dead
from pipeline.system.locks import BusyError, retraining
from pipeline.tracking.store import LIMITS
from tests.fake_stages import Start


@pytest.fixture
def rwlock(pipeline: Files) -> Path:
    path = pipeline.root / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def living() -> Iterator[Callable[..., int]]:
    """Starts processes that live for the test and are called as said; returns their ids."""
    started = []

    def begin(*words: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *words]))
        return started[-1].pid

    yield begin
    for process in started:
        process.kill()
        process.wait()


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def bad(found: Iterator[Check]) -> list[Check]:
    return [one for one in found if one.ok is False]


def held(files: Files, *numbers: int) -> str:
    return json.dumps(
        {
            "write": {str(files.root / f"artifacts/{n}"): {"pid": n, "cmd": "dvc repro"} for n in numbers},
            "read": {str(files.root / "artifacts"): [{"pid": n, "cmd": "dvc repro"} for n in numbers]},
        }
    )


def test_process_ids_that_another_program_got_are_named_and_their_locks_released(
    pipeline: Files, rwlock: Path, living: Callable[..., int]
) -> None:
    others = [living(), living("sh", "-c", "dvc repro")]
    rwlock.write_text(held(pipeline, dead(), *others))
    found = bad(doctor.dvc_locks(pipeline))
    assert [one.message for one in found] == [f"process {number} (`dvc repro`) is gone" for number in others]
    for one in found:
        assert one.fix is not None
        one.fix()
    assert not rwlock.exists()
    assert not bad(doctor.dvc_locks(pipeline))


def test_a_table_in_which_a_dvc_is_alive_is_left_alone(
    pipeline: Files, rwlock: Path, living: Callable[..., int]
) -> None:
    rwlock.write_text(held(pipeline, living(), living("dvc", "repro"), dead()))
    before = rwlock.read_text()
    assert not bad(doctor.dvc_locks(pipeline))
    assert release_dead(pipeline) == []
    assert rwlock.read_text() == before


HOLDERS = {
    "stage": "from pipeline.files import Files; from pipeline.system.locks import running_stage\n"
    "lock = running_stage(Files.here())",
    "retraining": "from pipeline.files import Files; from pipeline.system.locks import retraining\n"
    "lock = retraining(Files.here())",
    "dvc": "from dvc.lock import make_lock; lock = make_lock('.dvc/tmp/lock', tmp_dir='.dvc/tmp')",
}


@pytest.mark.parametrize("content", ["reused", ""])
@pytest.mark.parametrize("who", HOLDERS)
def test_nothing_is_taken_from_those_who_work_here_unseen(
    pipeline: Files, rwlock: Path, start: Start, living: Callable[..., int], who: str, content: str
) -> None:
    """A dvc of another container has a process id that says nothing here; its locks are the system's."""
    rwlock.write_text(content and held(pipeline, living()))
    before = rwlock.read_text()
    holder = start(
        pipeline, "-c", f"import time\n{HOLDERS[who]}\nwith lock: print('held', flush=True); time.sleep(600)"
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    (found, *_) = bad(doctor.dvc_locks(pipeline))
    assert found.fix is not None
    with pytest.raises(BusyError, match="wait for it or end it"):
        found.fix()
    assert rwlock.read_text() == before
    holder.kill()
    holder.wait()
    found.fix()
    assert not bad(doctor.dvc_locks(pipeline))


def test_locks_that_dvc_makes_for_shared_file_systems_are_heeded(
    pipeline: Files, rwlock: Path, start: Start, living: Callable[..., int]
) -> None:
    with (pipeline.root / ".dvc" / "config").open("a") as config:
        config.write("    hardlink_lock = true\n")
    rwlock.write_text(held(pipeline, living()))
    words = "import time; from dvc.lock import make_lock\n"
    words += "lock = make_lock('.dvc/tmp/lock', tmp_dir='.dvc/tmp', hardlink_lock=True)\n"
    holder = start(pipeline, "-c", f"{words}with lock: print('held', flush=True); time.sleep(600)")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    (found,) = bad(doctor.dvc_locks(pipeline))
    assert found.fix is not None
    with pytest.raises(BusyError):
        found.fix()
    holder.kill()
    holder.wait()
    (pipeline.root / ".dvc" / "tmp" / "lock").unlink()  # it outlives its holder: DVC says who may remove it, and when
    found.fix()
    assert not bad(doctor.dvc_locks(pipeline))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"write": {"a": 1}}'])
def test_a_damaged_table_is_removed(pipeline: Files, rwlock: Path, content: str) -> None:
    rwlock.write_text(content)
    (found,) = bad(doctor.dvc_locks(pipeline))
    assert found.fix is not None
    found.fix()
    assert not rwlock.exists()
    assert not bad(doctor.dvc_locks(pipeline))


@pytest.mark.parametrize(("content", "says"), [("", "JSON structure is corrupted"), ("reused", "is busy")])
def test_dvc_goes_on_after_the_repair(
    pipeline: Files, rwlock: Path, start: Start, living: Callable[..., int], content: str, says: str
) -> None:
    rwlock.write_text(content and held(pipeline, living()))
    first = start(pipeline, "-m", "dvc", "repro", "prepare", SMALLER_STUDENT_TRACKING="off")
    _, err = first.communicate(timeout=120)
    assert first.returncode and says in err
    done = start(
        pipeline, "-m", "pipeline", "doctor", "--fix", PREFECT_HOME=str(pipeline.root / "prefect"), COLUMNS="200"
    )
    out, _ = done.communicate(timeout=120)
    assert "done: `smaller-student doctor --fix` removes" in out, out
    again = start(pipeline, "-m", "dvc", "repro", "prepare", SMALLER_STUDENT_TRACKING="off")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err


def test_dvc_itself_drops_locks_of_processes_that_are_gone(pipeline: Files, rwlock: Path, start: Start) -> None:
    """What `rwlock` relies on."""
    rwlock.write_text(held(pipeline, dead()))
    assert not bad(doctor.dvc_locks(pipeline))
    done = start(pipeline, "-m", "dvc", "repro", "prepare", SMALLER_STUDENT_TRACKING="off")
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err


def test_other_versions_than_the_locked_ones_are_named(pipeline: Files) -> None:
    installed = {"numpy": "0.1", "psutil": psutil.__version__}
    lock = "".join(f"{name}=={version} \\\n    --hash=sha256:0\n" for name, version in installed.items())
    (pipeline.root / "requirements.lock").write_text(lock)
    (found,) = bad(doctor.libraries(pipeline))
    assert "numpy" in found.message and "(locked 0.1)" in found.message and "psutil" not in found.message
    (pipeline.root / "requirements.lock").write_text(
        f"numpy==0.1 ; old\nnumpy=={__import__('numpy').__version__} ; new\n"
    )
    assert not bad(doctor.libraries(pipeline))
    (pipeline.root / "requirements.lock").unlink()
    assert [one.ok for one in doctor.libraries(pipeline)] == [None]


def test_marks_of_a_merge_and_wrong_params_are_named(pipeline: Files) -> None:
    (pipeline.root / "dvc.lock").write_text("a: 1\n<<<<<<< HEAD\nb: 2\n=======\nb: 3\n>>>>>>> other\n")
    pipeline.params.write_text("seed: x\n")
    found = {one.name: one for one in bad(doctor.sources(pipeline))}
    assert found["dvc.lock"].message == "has merge markers in line 2"
    assert "params.yaml" in found


@pytest.mark.parametrize("uri", ["mlruns", "ftp://host"])
def test_an_address_at_which_no_mlflow_can_be_is_named_with_the_remedy(
    pipeline: Files, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (found,) = doctor.mlflow(pipeline)
    assert found.ok is False and found.message.startswith(f"MLFLOW_TRACKING_URI {uri} ")
    assert found.remedy.startswith("set it to http://HOST:PORT")


def test_a_store_that_cannot_be_used_is_named(pipeline: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in LIMITS.items():
        monkeypatch.setenv(name, value)
    (new,) = doctor.mlflow(pipeline)
    assert new.ok and new.message.endswith("mlflow.db is created by the first run")
    assert not pipeline.mlflow_db.exists()

    MlflowClient(f"sqlite:///{pipeline.mlflow_db}").search_experiments()
    (there,) = doctor.mlflow(pipeline)
    assert there.ok and there.message.endswith("mlflow.db answers")
    other = pipeline.root / "other.db"  # MLflow checks a store once in a process
    shutil.copy(pipeline.mlflow_db, other)
    with closing(sqlite3.connect(other)) as database:
        database.execute("update alembic_version set version_num = '451aebb31d03'")
        database.commit()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    (older,) = doctor.mlflow(pipeline)
    assert older.ok is False and older.remedy == "back the database up, then `mlflow db upgrade URI`"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    (away,) = doctor.mlflow(pipeline)
    assert away.ok is False and "Connection refused" in away.message and away.remedy.startswith("start or repair it")


def test_who_retrains_is_told(pipeline: Files, start: Start) -> None:
    code = (
        "import time; from pipeline.files import Files; from pipeline.system.locks import retraining\n"
        "with retraining(Files.here()): print('held', flush=True); time.sleep(600)"
    )
    holder = start(pipeline, "-c", code)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    (found,) = doctor.own_locks(pipeline)
    assert found.ok is None and f"a retraining is running: pid {holder.pid} on " in found.message
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 10
    while list(doctor.own_locks(pipeline)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(doctor.own_locks(pipeline))  # the system gave it back
    with retraining(pipeline):
        pass


def test_a_look_that_fails_does_not_end_the_examination(pipeline: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Files) -> Iterator[Check]:
        raise OSError("no such thing")
        yield

    monkeypatch.chdir(pipeline.root)
    monkeypatch.setattr(doctor, "disk", fails)
    found = list(doctor.examine(pipeline))
    assert any(one.message == "cannot be checked: OSError: no such thing" for one in found)
    assert any(one.name == "prefect" for one in found)
