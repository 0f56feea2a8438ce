"""The flow as users start it, with the temporary server of Prefect."""

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
from PIL import Image

from pipeline.files import Files
from pipeline.flow import dvc_cli
from pipeline.records import RECORDS
from pipeline.system import process
from pipeline.system.locks import retrain_lock, save_retraining_start
from tests.fake_stages import OFF, Start

RETRAIN = ("-m", "pipeline", "retrain")


@pytest.fixture(scope="module", autouse=True)
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of Prefect with its tables, whose creation takes seconds."""
    global TABLES
    folder = tmp_path_factory.mktemp("prefect")
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PREFECT_HOME": str(folder)})
    TABLES = folder / "prefect.db"
    return TABLES


TABLES = Path()


def home(files: Files) -> dict[str, str]:
    """Environment with Prefect's folder for this test, and a database that has its tables."""
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


def test_retrain_runs_changed_stages_then_nothing_and_tracks_all_if_forced(pipeline: Files, start: Start) -> None:
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

    stale = {"pid": os.getpid(), "cmd": "dvc repro"}  # from a container that is gone; the process id was reused
    places = (pipeline.artifacts(stage) for stage in RECORDS)
    pipeline.root.joinpath(".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(place): stale for place in places}}))
    third = start(pipeline, *RETRAIN, "--force", **home(pipeline))
    out, err = third.communicate()
    assert third.returncode == 0, err
    assert f"process {os.getpid()} (`dvc repro`) is gone: its locks are released" in err
    assert "Running stage" not in err
    assert recorded(pipeline) == [(stage, "true", "FINISHED") for stage in RECORDS]


def test_a_failed_stage_ends_the_flow(pipeline: Files, start: Start) -> None:
    process = start(pipeline, *RETRAIN, FAIL="teacher", **home(pipeline), **OFF)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("> python -m stages.teacher") == 1  # not retried: a failed check would fail again
    assert "\nsmaller-student: stage teacher failed: the parity is gone; train again\n" in err
    assert "Traceback" not in err
    assert not pipeline.metrics("student").exists()
    assert flow_runs(pipeline)[-1][0] == "FAILED"


def test_rejected_images_fail_the_flow_without_a_retry(pipeline: Files, start: Start) -> None:
    (pipeline.root / "incoming").mkdir()
    (pipeline.root / "incoming" / "car.jpg").write_bytes(b"x")
    os.utime(pipeline.root / "incoming" / "car.jpg", (1, 1))
    process = start(pipeline, *RETRAIN, **home(pipeline), **OFF)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "incoming holds 1 new files, but `data.source` vehicles renders its own images" in err
    with sqlite3.connect(pipeline.root / "prefect" / "prefect.db") as database:
        tasks = database.execute("select name, run_count from task_run").fetchall()
    assert tasks == []
    assert (pipeline.root / "incoming" / "car.jpg").is_file()


def test_a_stage_is_ended_at_the_time_limit_and_not_retried(pipeline: Files, start: Start) -> None:
    pipeline.params.write_text(pipeline.params.read_text().replace("limit_hours: 72", "limit_hours: 0.003"))
    process = start(pipeline, *RETRAIN, NAP="600", **home(pipeline), **OFF)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "smaller-student: stage prepare: it did not end within" in err and "limit_hours" in err
    assert err.count("naps") == 1


def test_a_stopped_flow_leaves_no_process_running(pipeline: Files, start: Start) -> None:
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


def test_a_second_retraining_fails_before_prefect_is_imported(pipeline: Files, start: Start) -> None:
    with retrain_lock(pipeline):
        began = time.monotonic()
        process = start(pipeline, *RETRAIN, PREFECT_HOME=str(pipeline.root / "prefect"))
        _, err = process.communicate()
        assert time.monotonic() - began < 2
    assert process.returncode == 75
    assert err.startswith(f"smaller-student: busy: a retraining is already running (pid {os.getpid()} on ")
    assert not (pipeline.root / "prefect").exists()


def test_help_is_shown_while_a_retraining_runs(pipeline: Files, start: Start) -> None:
    with retrain_lock(pipeline):
        process = start(pipeline, *RETRAIN, "--help")
        out, _ = process.communicate()
    assert process.returncode == 0 and "Usage" in out


@pytest.mark.parametrize("uri", ["mlruns", "ftp://host"])
def test_an_invalid_tracking_uri_is_rejected_before_prefect_is_imported(
    pipeline: Files, start: Start, uri: str
) -> None:
    process = start(pipeline, *RETRAIN, PREFECT_HOME=str(pipeline.root / "prefect"), MLFLOW_TRACKING_URI=uri)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith(f"smaller-student: MLFLOW_TRACKING_URI {uri} ") and "http://HOST:PORT" in err
    assert not (pipeline.root / "prefect").exists()


def test_invalid_params_are_rejected_before_prefect_is_imported(pipeline: Files, start: Start) -> None:
    pipeline.params.write_text("seed: 0\n")
    process = start(pipeline, *RETRAIN, PREFECT_HOME=str(pipeline.root / "prefect"))
    _, err = process.communicate()
    assert process.returncode == 2 and "`teacher` is missing" in err
    assert not (pipeline.root / "prefect").exists()


@pytest.mark.stack
def test_new_files_cause_a_run_and_results_are_committed_to_the_branch(pipeline: Files, start: Start) -> None:
    text = (
        pipeline.params.read_text().replace("source: vehicles", "source: folder").replace('branch: ""', "branch: auto")
    )
    pipeline.params.write_text(text)
    stages = pipeline.root / "dvc.yaml"
    stages.write_text(stages.read_text().replace("- stages/prepare.py", "- stages/prepare.py\n    - data", 1))
    for words in (
        ["init", "-q"],
        ["add", "params.yaml"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *words], cwd=pipeline.root, check=True)
    for number, expected in enumerate(("Completed: ran prepare", "Completed: ran prepare", "NoChange")):
        if number < 2:
            (pipeline.root / "incoming").mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (number, 0, 0)).save(pipeline.root / "incoming" / f"{number}.jpg")
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


def test_a_run_due_before_the_last_retraining_is_skipped(pipeline: Files, start: Start) -> None:
    save_retraining_start(pipeline, datetime.now(UTC) + timedelta(hours=1))
    process = start(pipeline, *RETRAIN, **home(pipeline), **OFF)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "smaller-student: the run was due before the last retraining began" in err
    assert flow_runs(pipeline) == [("CANCELLED", "Skipped")]
    assert not pipeline.metrics("prepare").exists()


@pytest.mark.stack
def test_a_failed_commit_fails_the_run_and_the_next_run_commits(pipeline: Files, start: Start) -> None:
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
def test_an_unexpected_failure_is_retried(pipeline: Files, start: Start) -> None:
    stage = pipeline.root / "stages" / "teacher.py"
    stage.write_text(stage.read_text().replace("exit_code = 4", "exit_code = 1"))
    process = start(pipeline, *RETRAIN, FAIL="teacher", **home(pipeline), **OFF)
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.count("> python -m stages.teacher") == 2
    assert flow_runs(pipeline)[-1] == ("FAILED", "Stage")


def test_only_one_of_twenty_concurrent_retrainings_runs(pipeline: Files, start: Start) -> None:
    everyone = [start(pipeline, *RETRAIN, **home(pipeline), **OFF) for _ in range(20)]
    ended = [(*process.communicate(), process.returncode) for process in everyone]
    codes = [code for *_, code in ended]
    assert (codes.count(0), codes.count(75)) == (1, 19), ended
    assert all(
        err.startswith("smaller-student: busy: a retraining is already running (pid ") for _, err, code in ended if code
    )
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
    """Replaces dvc by a program that ignores some signals; each signal has half a second."""
    monkeypatch.setattr(process, "STOPPING", tuple((number, 0.5) for number, _ in process.STOPPING))
    return lambda ignored: monkeypatch.setattr(dvc_cli, "DVC", (sys.executable, "-c", STUBBORN, ignored))


@pytest.mark.parametrize("ignored", ["", "SIGINT", "SIGINT,SIGTERM"])
def test_dvc_and_its_children_end_when_the_block_is_left_early(
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


def test_the_error_of_a_failed_dvc_status_has_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dvc_cli.StageError, match=r"`dvc status` failed: .*not inside of a DVC repository"):
        dvc_cli.changed_stages()


def test_stages_run_with_the_python_that_runs_the_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dvc_cli, "DVC", ("python", "-c", "import sys; print(sys.prefix)"))
    with dvc_cli.dvc() as started:
        out, _ = started.communicate()
    assert out.strip() == sys.prefix
    assert isinstance(started, subprocess.Popen)
