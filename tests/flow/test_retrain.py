"""The flow as users start it, with Prefect's own temporary server."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.files import Files
from pipeline.flow import dvc_cli
from pipeline.records import RECORDS
from pipeline.system import process
from pipeline.system.locks import note_retraining, retraining
from tests.fake_stages import OFF, Start

RETRAIN = ("-m", "pipeline", "retrain")


@pytest.fixture(scope="module", autouse=True)
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of Prefect's with its tables made, which takes seconds."""
    global TABLES
    folder = tmp_path_factory.mktemp("prefect")
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PREFECT_HOME": str(folder)})
    TABLES = folder / "prefect.db"
    return TABLES


TABLES = Path()


def home(files: Files) -> dict[str, str]:
    """Prefect's folder of this test, with a database that has its tables."""
    folder = files.root / "prefect"
    if not folder.exists():
        folder.mkdir()
        shutil.copy2(TABLES, folder)
    return {"PREFECT_HOME": str(folder), "COLUMNS": "200"}


def flow_runs(files: Files) -> list[tuple[str, str]]:
    with sqlite3.connect(files.root / "prefect" / "prefect.db") as database:
        return database.execute("select state_type, state_name from flow_run order by created").fetchall()


def recorded(files: Files) -> list[tuple[str, str, str]]:
    client = MlflowClient(f"sqlite:///{files.root}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    found = client.search_runs(experiment.experiment_id, "tags.stage != ''", order_by=["attributes.start_time ASC"])
    return [(run.data.tags["stage"], run.data.tags["cached"], run.info.status) for run in found]


def test_retrain_runs_what_changed_then_nothing_and_records_all_if_forced(pipeline: Files, start: Start) -> None:
    first = start(pipeline, *RETRAIN, **home(pipeline), **OFF)
    out, err = first.communicate()
    assert first.returncode == 0, err
    assert out.splitlines()[-1] == "Completed: ran prepare, teacher, student, surgery, export, benchmark"
    assert "Task run 'teacher' - > python -m stages.teacher" in err  # live, line by line
    assert "Task run 'teacher' - running" in err
    with sqlite3.connect(pipeline.root / "prefect" / "prefect.db") as database:
        tasks = database.execute("select name, state_type from task_run order by created").fetchall()
        (result,) = database.execute("select data from artifact where key = 'result'").fetchone()
    assert tasks == [(task, "COMPLETED") for task in ("refresh", *RECORDS)]
    assert "rank-1" in result

    second = start(pipeline, *RETRAIN, **home(pipeline))
    out, err = second.communicate()
    assert second.returncode == 0, err
    assert out.splitlines()[-1] == "NoChange: nothing changed since the last run"
    assert flow_runs(pipeline)[-1] == ("COMPLETED", "NoChange")

    stale = {"pid": os.getpid(), "cmd": "dvc repro"}  # of a container that is gone, and its number another's by now
    places = (pipeline.artifacts(stage) for stage in RECORDS)
    pipeline.root.joinpath(".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(place): stale for place in places}}))
    third = start(pipeline, *RETRAIN, "--force", **home(pipeline))
    out, err = third.communicate()
    assert third.returncode == 0, err
    assert f"process {os.getpid()} (`dvc repro`) is gone: its locks are released" in err
    assert "Running stage" not in err
    assert recorded(pipeline) == [(stage, "true", "FINISHED") for stage in RECORDS]


def test_a_stage_that_fails_fails_the_flow_and_ends_it_there(pipeline: Files, start: Start) -> None:
    process = start(pipeline, *RETRAIN, FAIL="teacher", **home(pipeline), **OFF)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("the parity is gone; train again") == 1  # what the stage said; a gate would fail again
    assert "\nsmaller-student: stage teacher failed (`dvc repro` ended with " in err
    assert "Traceback" not in err
    assert not pipeline.metrics("student").exists()
    assert flow_runs(pipeline)[-1][0] == "FAILED"


def test_new_images_that_are_refused_are_refused_once(pipeline: Files, start: Start) -> None:
    (pipeline.root / "incoming").mkdir()
    (pipeline.root / "incoming" / "car.jpg").write_bytes(b"x")
    os.utime(pipeline.root / "incoming" / "car.jpg", (1, 1))
    process = start(pipeline, *RETRAIN, **home(pipeline), **OFF)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "incoming holds 1 files, but `data.source` vehicles renders its own images" in err
    with sqlite3.connect(pipeline.root / "prefect" / "prefect.db") as database:
        tasks = database.execute("select name, run_count from task_run").fetchall()
    assert tasks == []
    assert (pipeline.root / "incoming" / "car.jpg").is_file()


def test_a_stage_that_hangs_is_ended_and_not_tried_again(pipeline: Files, start: Start) -> None:
    pipeline.params.write_text(pipeline.params.read_text().replace("limit_hours: 72", "limit_hours: 0.003"))
    process = start(pipeline, *RETRAIN, NAP="600", **home(pipeline), **OFF)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "smaller-student: stage prepare: it did not end within" in err and "limit_hours" in err
    assert err.count("naps") == 1


def test_a_flow_that_is_told_to_stop_leaves_nothing_running(pipeline: Files, start: Start) -> None:
    process = start(pipeline, *RETRAIN, NAP="600", **home(pipeline))
    assert process.stderr is not None
    while "naps" not in (line := process.stderr.readline()):
        assert line, "the flow ended before the stage napped"
    below = psutil.Process(process.pid).children(recursive=True)
    stages = [child for child in below if "stages.prepare" in child.cmdline()]
    assert stages
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, still = psutil.wait_procs(stages, timeout=5)
    assert not still
    process.communicate(timeout=60)
    assert process.returncode != 0
    psutil.wait_procs(below, timeout=30)
    assert not [child for child in below if child.is_running()]
    assert recorded(pipeline) == [("prepare", "false", "KILLED")]
    assert time.monotonic() - began < 60


def test_who_comes_second_is_told_so_before_prefect_is_imported(pipeline: Files, start: Start) -> None:
    with retraining(pipeline):
        began = time.monotonic()
        process = start(pipeline, *RETRAIN, PREFECT_HOME=str(pipeline.root / "prefect"))
        _, err = process.communicate()
        assert time.monotonic() - began < 2
    assert process.returncode == 75
    assert err.startswith(f"smaller-student: busy: retraining runs already (pid {os.getpid()} on ")
    assert not (pipeline.root / "prefect").exists()


def test_help_is_shown_while_a_retraining_runs(pipeline: Files, start: Start) -> None:
    with retraining(pipeline):
        process = start(pipeline, *RETRAIN, "--help")
        out, _ = process.communicate()
    assert process.returncode == 0 and "Usage" in out


@pytest.mark.parametrize("uri", ["mlruns", "ftp://host"])
def test_a_tracking_address_that_cannot_work_is_refused_before_prefect_is_imported(
    pipeline: Files, start: Start, uri: str
) -> None:
    process = start(pipeline, *RETRAIN, PREFECT_HOME=str(pipeline.root / "prefect"), MLFLOW_TRACKING_URI=uri)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith(f"smaller-student: MLFLOW_TRACKING_URI {uri} ") and "http://HOST:PORT" in err
    assert not (pipeline.root / "prefect").exists()


def test_bad_params_are_refused_before_prefect_is_imported(pipeline: Files, start: Start) -> None:
    pipeline.params.write_text("seed: 0\n")
    process = start(pipeline, *RETRAIN, PREFECT_HOME=str(pipeline.root / "prefect"))
    _, err = process.communicate()
    assert process.returncode == 2 and "`teacher` is missing" in err
    assert not (pipeline.root / "prefect").exists()


@pytest.mark.stack
def test_new_files_make_it_run_and_results_go_to_their_branch(pipeline: Files, start: Start) -> None:
    text = (
        pipeline.params.read_text().replace("source: vehicles", "source: folder").replace('branch: ""', "branch: auto")
    )
    pipeline.params.write_text(text)
    stages = pipeline.root / "dvc.yaml"
    stages.write_text(stages.read_text().replace("- stages/prepare.py", "- stages/prepare.py\n    - data", 1))
    (pipeline.root / "data").mkdir()
    for words in (
        ["init", "-q"],
        ["add", "params.yaml"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *words], cwd=pipeline.root, check=True)
    for number, expected in enumerate(("Completed: ran prepare", "Completed: ran prepare", "NoChange")):
        if number < 2:
            (pipeline.root / "incoming").mkdir(exist_ok=True)
            (pipeline.root / "incoming" / f"{number}.jpg").touch()
            os.utime(pipeline.root / "incoming" / f"{number}.jpg", (1, 1))
        process = start(pipeline, *RETRAIN, **home(pipeline), **OFF)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.splitlines()[-1].startswith(expected)
    assert sorted(path.name for path in (pipeline.root / "data").iterdir()) == ["0.jpg", "1.jpg"]
    log = subprocess.run(
        ["git", "log", "--format=%s", "auto"], cwd=pipeline.root, check=True, capture_output=True, text=True
    ).stdout
    assert log.count("Retrained: ran prepare") == 2


def test_what_was_due_before_the_last_one_began_has_nothing_left_to_do(pipeline: Files, start: Start) -> None:
    note_retraining(pipeline, datetime.now(UTC) + timedelta(hours=1))
    process = start(pipeline, *RETRAIN, **home(pipeline), **OFF)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "smaller-student: was due before the last retraining began" in err
    assert flow_runs(pipeline) == [("CANCELLED", "Skipped")]
    assert not pipeline.metrics("prepare").exists()


@pytest.mark.stack
def test_results_that_cannot_be_committed_fail_the_run_and_the_next_one_commits_them(
    pipeline: Files, start: Start
) -> None:
    pipeline.params.write_text(pipeline.params.read_text().replace('branch: ""', "branch: main"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q", "-b", "main"], ["add", "params.yaml"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], cwd=pipeline.root, check=True)
    process = start(pipeline, *RETRAIN, **home(pipeline), **OFF)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "`main` is checked out" in err and "Traceback" not in err
    assert flow_runs(pipeline)[-1] == ("FAILED", "Commit")
    subprocess.run(["git", "switch", "-q", "-c", "elsewhere"], cwd=pipeline.root, check=True)
    process = start(pipeline, *RETRAIN, **home(pipeline), **OFF)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.splitlines()[-1].startswith("NoChange")
    files = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "main"], cwd=pipeline.root, check=True, capture_output=True, text=True
    ).stdout
    assert "dvc.lock" in files and "metrics/benchmark.json" in files


@pytest.mark.stack
def test_what_failed_by_chance_is_tried_again(pipeline: Files, start: Start) -> None:
    stage = pipeline.root / "stages" / "teacher.py"
    stage.write_text(stage.read_text().replace("exit_code = 4", "exit_code = 1"))
    process = start(pipeline, *RETRAIN, FAIL="teacher", **home(pipeline), **OFF)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("the parity is gone; train again") == 2
    assert flow_runs(pipeline)[-1] == ("FAILED", "Stage")


def test_of_twenty_at_once_one_works(pipeline: Files, start: Start) -> None:
    everyone = [start(pipeline, *RETRAIN, **home(pipeline), **OFF) for _ in range(20)]
    ended = [(*process.communicate(), process.returncode) for process in everyone]
    codes = [code for *_, code in ended]
    assert (codes.count(0), codes.count(75)) == (1, 19), ended
    assert all(err.startswith("smaller-student: busy: retraining runs already (pid ") for _, err, code in ended if code)
    assert flow_runs(pipeline) == [("COMPLETED", "Completed")]


STUBBORN = """
import signal, subprocess, sys, time
ignored = [getattr(signal, name) for name in sys.argv[1].split(",") if name]
for number in ignored:
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A dvc that ignores some signals; the patience for each is half a second."""
    monkeypatch.setattr(process, "STOPPING", tuple((number, 0.5) for number, _ in process.STOPPING))
    return lambda ignored: monkeypatch.setattr(dvc_cli, "DVC", (sys.executable, "-c", STUBBORN, ignored))


@pytest.mark.parametrize("ignored", ["", "SIGINT", "SIGINT,SIGTERM"])
def test_a_dvc_that_is_left_early_ends_with_all_its_children(
    stubborn: Callable[[str], None], ignored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stubborn(ignored)
    with pytest.raises(KeyboardInterrupt), dvc_cli.dvc("repro") as started:
        assert started.stdout is not None
        child = psutil.Process(int(started.stdout.readline()))
        raise KeyboardInterrupt
    assert started.poll() is not None
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_dvc_status_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dvc_cli.StageError, match=r"`dvc status` failed: .*not inside of a DVC repository"):
        dvc_cli.changes()


def test_stages_run_with_the_python_that_runs_the_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dvc_cli, "DVC", ("python", "-c", "import sys; print(sys.prefix)"))
    with dvc_cli.dvc() as started:
        out, _ = started.communicate()
    assert out.strip() == sys.prefix
    assert isinstance(started, subprocess.Popen)
