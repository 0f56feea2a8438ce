"""The doctor names what is wrong, and removes only what is dead."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.files import Files
from pipeline.ops import doctor
from pipeline.ops.finding import Finding
from pipeline.ops.locks import Busy, retraining
from pipeline.ops.rwlock import is_dvc
from tests.fake_stages import Start


@pytest.fixture
def rwlock(pipeline: Files) -> Path:
    path = pipeline.root / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def living_dvc(pipeline: Files) -> Iterator[int]:
    """A process that looks like dvc."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "dvc", "repro"])
    yield process.pid
    process.kill()
    process.wait()


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def bad(found: Iterator[Finding]) -> list[Finding]:
    return [one for one in found if one.good is False]


def held(*numbers: int) -> str:
    return json.dumps(
        {
            "write": {f"out{n}": {"pid": n, "cmd": "dvc repro"} for n in numbers},
            "read": {"in": [{"pid": n, "cmd": "dvc repro"} for n in numbers]},
        }
    )


def test_locks_of_a_dead_dvc_are_named_and_taken_away_and_those_of_a_living_one_are_not(
    pipeline: Files, rwlock: Path, living_dvc: int
) -> None:
    gone, other = dead(), os.getppid()  # a number that another program has by now
    assert psutil.pid_exists(other)
    rwlock.write_text(held(gone, living_dvc, other))
    found = bad(doctor.dvc_locks(pipeline))
    numbers = [gone] if is_dvc(other) else [gone, other]
    assert [one.text.split()[1] for one in found] == [str(number) for number in numbers]
    assert all("`dvc repro`) is gone" in one.text for one in found)
    for one in found:
        assert one.fix is not None
        one.fix()
    left = json.loads(rwlock.read_text())
    assert {one["pid"] for one in left["write"].values()} == {living_dvc} | ({other} - set(numbers))
    assert not bad(doctor.dvc_locks(pipeline))


HOLDERS = {
    "stage": "from pipeline.files import Files; from pipeline.ops.locks import running_stage\n"
    "lock = running_stage(Files.here())",
    "retraining": "from pipeline.files import Files; from pipeline.ops.locks import retraining\n"
    "lock = retraining(Files.here())",
    "dvc": "from dvc.lock import make_lock; lock = make_lock('.dvc/tmp/lock', tmp_dir='.dvc/tmp')",
}


@pytest.mark.parametrize("content", ["dead", ""])
@pytest.mark.parametrize("who", HOLDERS)
def test_nothing_is_taken_from_those_who_work_here_unseen(
    pipeline: Files, rwlock: Path, start: Start, who: str, content: str
) -> None:
    """A dvc of another container has a number that says nothing here; its locks are the system's."""
    rwlock.write_text(content and held(dead()))
    before = rwlock.read_text()
    holder = start(
        pipeline, "-c", f"import time\n{HOLDERS[who]}\nwith lock: print('held', flush=True); time.sleep(600)"
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    (found, *_) = bad(doctor.dvc_locks(pipeline))
    assert found.fix is not None
    with pytest.raises(Busy, match="wait for it or end it"):
        found.fix()
    assert rwlock.read_text() == before
    holder.kill()
    holder.wait()
    found.fix()
    assert not bad(doctor.dvc_locks(pipeline))


def test_locks_that_dvc_makes_for_shared_file_systems_are_heeded(pipeline: Files, rwlock: Path, start: Start) -> None:
    with (pipeline.root / ".dvc" / "config").open("a") as config:
        config.write("    hardlink_lock = true\n")
    rwlock.write_text(held(dead()))
    words = "import time; from dvc.lock import make_lock\n"
    words += "lock = make_lock('.dvc/tmp/lock', tmp_dir='.dvc/tmp', hardlink_lock=True)\n"
    holder = start(pipeline, "-c", f"{words}with lock: print('held', flush=True); time.sleep(600)")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    (found,) = bad(doctor.dvc_locks(pipeline))
    assert found.fix is not None
    with pytest.raises(Busy):
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


def test_dvc_goes_on_after_the_repair(pipeline: Files, rwlock: Path, start: Start) -> None:
    rwlock.write_text("")
    first = start(pipeline, "-m", "dvc", "repro", "prepare", SMALLER_STUDENT_TRACKING="off")
    _, err = first.communicate(timeout=120)
    assert first.returncode and "JSON structure is corrupted" in err
    done = start(
        pipeline, "-m", "pipeline", "doctor", "--fix", PREFECT_HOME=str(pipeline.root / "prefect"), COLUMNS="200"
    )
    out, _ = done.communicate(timeout=120)
    assert "done: `smaller-student doctor --fix` removes it" in out, out
    again = start(pipeline, "-m", "dvc", "repro", "prepare", SMALLER_STUDENT_TRACKING="off")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err


def test_other_versions_than_the_locked_ones_are_named(pipeline: Files) -> None:
    installed = {"numpy": "0.1", "psutil": psutil.__version__}
    lock = "".join(f"{name}=={version} \\\n    --hash=sha256:0\n" for name, version in installed.items())
    (pipeline.root / "requirements.lock").write_text(lock)
    (found,) = bad(doctor.environment(pipeline))
    assert "numpy" in found.text and "(locked 0.1)" in found.text and "psutil" not in found.text
    (pipeline.root / "requirements.lock").write_text(
        f"numpy==0.1 ; old\nnumpy=={__import__('numpy').__version__} ; new\n"
    )
    assert not bad(doctor.environment(pipeline))


def test_marks_of_a_merge_and_wrong_params_are_named(pipeline: Files) -> None:
    (pipeline.root / "dvc.lock").write_text("a: 1\n<<<<<<< HEAD\nb: 2\n=======\nb: 3\n>>>>>>> other\n")
    pipeline.params.write_text("seed: x\n")
    found = {one.topic: one for one in bad(doctor.sources(pipeline))}
    assert found["dvc.lock"].text == "a merge left its marks in line 2"
    assert "params.yaml" in found


def test_who_retrains_is_told(pipeline: Files, start: Start) -> None:
    code = (
        "import time; from pipeline.files import Files; from pipeline.ops.locks import retraining\n"
        "with retraining(Files.here()): print('held', flush=True); time.sleep(600)"
    )
    holder = start(pipeline, "-c", code)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    (found,) = doctor.own_locks(pipeline)
    assert found.good is None and f'"pid": {holder.pid}' in found.text
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 10
    while list(doctor.own_locks(pipeline)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(doctor.own_locks(pipeline))  # the system gave it back
    with retraining(pipeline):
        pass


def test_a_look_that_fails_does_not_end_the_examination(pipeline: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Files) -> Iterator[Finding]:
        raise OSError("no such thing")
        yield

    monkeypatch.chdir(pipeline.root)
    monkeypatch.setattr(doctor, "space", fails)
    found = list(doctor.examine(pipeline))
    assert any(one.text == "cannot be looked at: OSError: no such thing" for one in found)
    assert any(one.topic == "prefect" for one in found)
