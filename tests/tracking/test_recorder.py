"""Stages as processes, with the background process that uploads their runs to MLflow."""

import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from mlflow import MlflowClient

from pipeline.files import Files
from pipeline.tracking.run_record import all_executions
from tests.fake_stages import OFF, Start, wait_until

TEACHER = ("-m", "stages.teacher")


def statuses(files: Files) -> dict[str, str]:
    client = MlflowClient(f"sqlite:///{files.root}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    found = client.search_runs(experiment.experiment_id)
    return {run.data.tags.get("stage", "execution"): run.info.status for run in found}


def upload_of(pid: int) -> psutil.Process:
    """The upload process that a stage started."""
    found: list[psutil.Process] = []

    def there() -> bool:
        for child in psutil.Process(pid).children():
            with suppress(psutil.Error):  # of git, which has ended
                if "pipeline.tracking.background" in child.cmdline():
                    found.append(child)
        return bool(found)

    wait_until(there, 20)
    return found[0]


def test_a_stage_is_tracked_in_the_database_of_the_repository(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER)
    _, err = process.communicate()
    assert process.returncode == 0
    assert "warning" not in err and "mlflow" not in err.lower()
    assert statuses(checkout) == {"execution": "FINISHED", "teacher": "FINISHED"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_run_of_a_stopped_or_killed_stage_is_killed(checkout: Files, start: Start, number: signal.Signals) -> None:
    process = start(checkout, *TEACHER, NAP="60")
    upload = upload_of(process.pid)
    wait_until(lambda: bool(list(checkout.tracking.glob("runs/*/synced/*.json"))), 60)
    process.send_signal(number)
    process.communicate(timeout=60)
    upload.wait(timeout=60)
    assert statuses(checkout) == {"execution": "KILLED", "teacher": "KILLED"}


def test_the_run_of_a_failed_stage_is_failed(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER, FAIL="teacher")
    process.communicate()
    assert process.returncode == 4
    assert statuses(checkout) == {"execution": "FAILED", "teacher": "FAILED"}


def test_tracking_can_be_disabled(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER, **OFF)
    process.communicate()
    assert process.returncode == 0
    assert not (checkout.root / "mlflow.db").exists()


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in taken:
            connection.close()


def test_a_server_that_is_down_causes_one_warning(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    _, err = process.communicate()
    assert process.returncode == 0 and checkout.metrics("teacher").is_file()
    assert err.count("MLflow") == 1 and "Traceback" not in err
    assert (
        "the upload to MLflow at http://127.0.0.1:9 is not complete: it cannot be reached ([Errno 111] Connection"
        in err
    )
    assert "`smaller-student sync` uploads the rest" in err


def test_a_server_that_never_answers_causes_a_short_wait_and_one_warning(
    checkout: Files, start: Start, silent: str
) -> None:
    began = time.monotonic()
    process = start(checkout, *TEACHER, NAP="12", MLFLOW_TRACKING_URI=silent)
    _, err = process.communicate()
    assert process.returncode == 0 and checkout.metrics("teacher").is_file()
    assert err.count("MLflow") == 1 and ("it takes longer" in err or "no response in 10 s" in err)
    assert time.monotonic() - began < 12 + 5 + 2  # the stage, the wait, starting Python


def test_a_killed_upload_does_not_fail_the_stage(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER, NAP="1")
    upload_of(process.pid).kill()
    _, err = process.communicate()
    assert process.returncode == 0 and "Traceback" not in err
    assert checkout.metrics("teacher").is_file()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [("runs", "runs is a folder, which MLflow no longer supports"), ("ftp://host", "unknown scheme 'ftp'")],
)
def test_an_invalid_tracking_uri_causes_one_warning(checkout: Files, start: Start, uri: str, reason: str) -> None:
    process = start(checkout, *TEACHER, MLFLOW_TRACKING_URI=uri)
    _, err = process.communicate()
    assert process.returncode == 0 and checkout.metrics("teacher").is_file()
    assert err.count("MLFLOW_TRACKING_URI") == 1 and reason in err and "Traceback" not in err
    assert not (checkout.root / "runs").exists()
    (records,) = all_executions(checkout)
    assert records.statuses() == {"teacher": "FINISHED"}


def test_a_stage_reports_that_its_run_was_deleted_while_it_ran(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER, NAP="25")
    wait_until(lambda: bool(list(checkout.tracking.glob("runs/*/synced/*.json"))), 60)
    wait_until(lambda: len(statuses(checkout)) == 2, 20)
    client = MlflowClient(f"sqlite:///{checkout.root}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    for run in client.search_runs(experiment.experiment_id, "tags.stage = 'teacher'"):
        client.delete_run(run.info.run_id)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "was deleted in MLflow; it is not uploaded again" in err
    assert statuses(checkout) == {"execution": "FINISHED"}


def test_a_relative_database_path_is_relative_to_the_repository_in_temporary_workspaces_too(
    checkout: Files, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """DVC runs stages of queued experiments in temporary workspaces, where DVC_ROOT is the repository."""
    elsewhere = tmp_path_factory.mktemp("exp")
    shutil.copytree(checkout.root, elsewhere, dirs_exist_ok=True)
    temporary = Files(elsewhere, checkout.root)
    process = start(temporary, *TEACHER, DVC_ROOT=str(checkout.root), MLFLOW_TRACKING_URI="sqlite:///sub/runs.db")
    (checkout.root / "sub").mkdir()
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert (checkout.root / "sub" / "runs.db").is_file()
    assert not (elsewhere / "sub").exists()


def test_a_database_server_that_is_down_causes_a_short_wait(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER, MLFLOW_TRACKING_URI="postgresql+psycopg://127.0.0.1:9/x")
    began = time.monotonic()
    _, err = process.communicate()
    assert process.returncode == 0
    assert time.monotonic() - began < 5 + 15  # the wait, and starting Python on a busy machine; without the limit 120
    assert "`smaller-student sync` uploads the rest" in err


FORKING = """
import os, sys, time
from pathlib import Path
from pipeline.files import Files
from pipeline.tracking.execution import current_execution
from pipeline.stage.params_file import load
from pipeline.tracking.recorder import StageRun
files = Files(Path.cwd(), Path.cwd())
try:
    with StageRun(files, load(files.params), current_execution(), "teacher"):
        child = os.fork()
        if child == 0:
            time.sleep(45)
            os._exit(0)
        raise RuntimeError("failed")
except RuntimeError:
    os.kill(child, 9)
"""


def test_a_failed_stage_does_not_wait_for_its_forked_processes(checkout: Files, start: Start) -> None:
    """Image loaders hold the pipe that ends the upload, and live as long as the traceback does."""
    began = time.monotonic()
    process = start(checkout, "-c", FORKING)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert time.monotonic() - began < 40
    assert statuses(checkout) == {"execution": "FAILED", "teacher": "FAILED"}
