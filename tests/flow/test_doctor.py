"""The doctor reports problems, and removes only stale locks and lost runs."""

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
from pipeline.system.locks import BusyError, retrain_lock
from pipeline.tracking.store import CLIENT_DEFAULTS
from tests.fake_stages import Start


@pytest.fixture
def rwlock(pipeline: Files) -> Path:
    path = pipeline.root / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def living() -> Iterator[Callable[..., int]]:
    """Starts processes that live for the test, with the given arguments; returns their ids."""
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
    return [check for check in found if check.ok is False]


def held(files: Files, *numbers: int) -> str:
    return json.dumps(
        {
            "write": {str(files.root / f"artifacts/{n}"): {"pid": n, "cmd": "dvc repro"} for n in numbers},
            "read": {str(files.root / "artifacts"): [{"pid": n, "cmd": "dvc repro"} for n in numbers]},
        }
    )


def test_locks_of_reused_process_ids_are_reported_and_released(
    pipeline: Files, rwlock: Path, living: Callable[..., int]
) -> None:
    others = [living(), living("sh", "-c", "dvc repro")]
    rwlock.write_text(held(pipeline, dead(), *others))
    found = bad(doctor.dvc_locks(pipeline))
    assert [check.message for check in found] == [f"process {number} (`dvc repro`) is gone" for number in others]
    for check in found:
        assert check.fix is not None
        check.fix()
    assert not rwlock.exists()
    assert not bad(doctor.dvc_locks(pipeline))


def test_a_table_with_a_running_dvc_is_not_changed(pipeline: Files, rwlock: Path, living: Callable[..., int]) -> None:
    rwlock.write_text(held(pipeline, living(), living("dvc", "repro"), dead()))
    before = rwlock.read_text()
    assert not bad(doctor.dvc_locks(pipeline))
    assert release_dead(pipeline) == []
    assert rwlock.read_text() == before


HOLDERS = {
    "stage": "from pipeline.files import Files; from pipeline.system.locks import stage_lock\n"
    "lock = stage_lock(Files.here())",
    "retraining": "from pipeline.files import Files; from pipeline.system.locks import retrain_lock\n"
    "lock = retrain_lock(Files.here())",
    "dvc": "from dvc.lock import make_lock; lock = make_lock('.dvc/tmp/lock', tmp_dir='.dvc/tmp')",
}


@pytest.mark.parametrize("content", ["reused", ""])
@pytest.mark.parametrize("holder_kind", HOLDERS)
def test_a_table_is_not_deleted_while_another_process_holds_a_lock(
    pipeline: Files, rwlock: Path, start: Start, living: Callable[..., int], holder_kind: str, content: str
) -> None:
    """A dvc in another container has an unknown process id here, but its file locks are visible."""
    rwlock.write_text(content and held(pipeline, living()))
    before = rwlock.read_text()
    holder = start(
        pipeline, "-c", f"import time\n{HOLDERS[holder_kind]}\nwith lock: print('held', flush=True); time.sleep(600)"
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


def test_hardlink_locks_of_dvc_are_respected(
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
    (pipeline.root / ".dvc" / "tmp" / "lock").unlink()  # hard links outlive their holder
    found.fix()
    assert not bad(doctor.dvc_locks(pipeline))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"write": {"a": 1}}'])
def test_a_damaged_table_is_deleted(pipeline: Files, rwlock: Path, content: str) -> None:
    rwlock.write_text(content)
    (found,) = bad(doctor.dvc_locks(pipeline))
    assert found.fix is not None
    found.fix()
    assert not rwlock.exists()
    assert not bad(doctor.dvc_locks(pipeline))


@pytest.mark.parametrize(("content", "message"), [("", "JSON structure is corrupted"), ("reused", "is busy")])
def test_dvc_works_after_the_repair(
    pipeline: Files, rwlock: Path, start: Start, living: Callable[..., int], content: str, message: str
) -> None:
    rwlock.write_text(content and held(pipeline, living()))
    first = start(pipeline, "-m", "dvc", "repro", "prepare", SMALLER_STUDENT_TRACKING="off")
    _, err = first.communicate(timeout=120)
    assert first.returncode and message in err
    done = start(
        pipeline, "-m", "pipeline", "doctor", "--fix", PREFECT_HOME=str(pipeline.root / "prefect"), COLUMNS="200"
    )
    out, _ = done.communicate(timeout=120)
    assert "done: `smaller-student doctor --fix` deletes" in out, out
    again = start(pipeline, "-m", "dvc", "repro", "prepare", SMALLER_STUDENT_TRACKING="off")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err


def test_dvc_itself_drops_locks_of_ended_processes(pipeline: Files, rwlock: Path, start: Start) -> None:
    """`dvc_rwlock` relies on this."""
    rwlock.write_text(held(pipeline, dead()))
    assert not bad(doctor.dvc_locks(pipeline))
    done = start(pipeline, "-m", "dvc", "repro", "prepare", SMALLER_STUDENT_TRACKING="off")
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err


def test_libraries_that_differ_from_the_lock_file_are_named(pipeline: Files) -> None:
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
    assert [check.ok for check in doctor.libraries(pipeline)] == [None]


def test_merge_markers_and_invalid_params_are_reported(pipeline: Files) -> None:
    (pipeline.root / "dvc.lock").write_text("a: 1\n<<<<<<< HEAD\nb: 2\n=======\nb: 3\n>>>>>>> other\n")
    pipeline.params.write_text("seed: x\n")
    found = {check.name: check for check in bad(doctor.sources(pipeline))}
    assert found["dvc.lock"].message == "has merge markers in line 2"
    assert "params.yaml" in found


@pytest.mark.parametrize("uri", ["mlruns", "ftp://host"])
def test_an_invalid_tracking_uri_is_reported_with_a_remedy(
    pipeline: Files, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (found,) = doctor.mlflow(pipeline)
    assert found.ok is False and found.message.startswith(f"MLFLOW_TRACKING_URI {uri} ")
    assert found.remedy.startswith("set it to http://HOST:PORT")


def test_an_unusable_store_is_reported_with_a_remedy(pipeline: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in CLIENT_DEFAULTS.items():
        monkeypatch.setenv(name, value)
    (new,) = doctor.mlflow(pipeline)
    assert new.ok and new.message.endswith("mlflow.db will be created by the first run")
    assert not pipeline.mlflow_db.exists()

    MlflowClient(f"sqlite:///{pipeline.mlflow_db}").search_experiments()
    (there,) = doctor.mlflow(pipeline)
    assert there.ok and there.message.endswith("mlflow.db responds")
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


def test_a_registry_that_was_changed_by_hand_is_reported_with_a_remedy(
    pipeline: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = MlflowClient(f"sqlite:///{pipeline.mlflow_db}")
    client.create_registered_model("smaller-student")
    client.set_registered_model_tag("smaller-student", "promoted", "3")  # whose version was deleted
    assert [check.ok for check in doctor.mlflow(pipeline)] == [True]
    (registry,) = doctor.registry(pipeline)
    assert (registry.name, registry.ok) == ("registry", False)
    assert "choose another `tracking.model_name`" in registry.remedy


def test_a_running_retraining_is_reported(pipeline: Files, start: Start) -> None:
    code = (
        "import time; from pipeline.files import Files; from pipeline.system.locks import retrain_lock\n"
        "with retrain_lock(Files.here()): print('held', flush=True); time.sleep(600)"
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
    assert not list(doctor.own_locks(pipeline))  # released by the system
    with retrain_lock(pipeline):
        pass


def test_an_exception_in_one_check_does_not_end_the_others(pipeline: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Files) -> Iterator[Check]:
        raise OSError("no such thing")
        yield

    monkeypatch.chdir(pipeline.root)
    monkeypatch.setattr(doctor, "disk", fails)
    found = list(doctor.examine(pipeline))
    assert any(check.message == "cannot be checked: OSError: no such thing" for check in found)
    assert any(check.name == "prefect" for check in found)
