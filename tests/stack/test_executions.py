"""Three executions in a real server with each kind of database are complete, whichever stages DVC ran."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.files import Files
from pipeline.records import RECORDS
from tests.fake_stages import Start, wait_until
from tests.stack.conftest import Serve
from tests.stack.postgres import postgres

pytestmark = pytest.mark.stack


@pytest.fixture(params=["sqlite", "postgres"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("store")
    if request.param == "sqlite":
        yield serve(f"sqlite:///{folder / 'mlflow.db'}")
        return
    with postgres(folder) as uri:
        yield serve(uri)


def run(start: Start, files: Files, *words: str, server: str) -> None:
    done = start(files, "-m", *words, MLFLOW_TRACKING_URI=server, PREFECT_HOME=str(files.root / "prefect"))
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, out + err


def test_executions_are_complete_whichever_stages_dvc_ran(pipeline: Files, start: Start, server: str) -> None:
    run(start, pipeline, "dvc", "repro", server=server)
    student = pipeline.root / "stages" / "student.py"
    student.write_text(student.read_text() + "\n# changed\n")
    run(start, pipeline, "dvc", "repro", server=server)
    run(start, pipeline, "pipeline", "retrain", "--force", server=server)
    run(start, pipeline, "pipeline", "sync", server=server)  # uploads to a slow server may be incomplete

    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("smaller-student")
    runs = client.search_runs(experiment.experiment_id, order_by=["attributes.start_time ASC"])
    parents = [run for run in runs if "stage" not in run.data.tags]
    assert len(parents) == 3
    cached = []
    for parent in parents:
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert [child.data.tags["stage"] for child in children] == list(RECORDS)
        assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
        assert parent.data.metrics["eval/mAP"] == 0.59
        assert parent.data.metrics["teacher/mAP"] == 0.61
        cached.append([child.data.tags["cached"] for child in children])
        assert all(_links_to_original(child, runs) for child in children)
    ran, old = "false", "true"
    # Fake stages always write the same files, so DVC takes later stages from its cache.
    assert cached[0] == [ran] * 6
    assert cached[1][:3] == [old, old, ran]
    assert cached[2] == [old] * 6
    assert (Path(pipeline.root) / "dvc.lock").is_file()
    assert parents[2].data.tags["flow_run_id"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_run_of_a_killed_stage_is_killed(
    pipeline: Files, start: Start, serve: Serve, tmp_path: Path, number: signal.Signals
) -> None:
    client = MlflowClient(serve(f"sqlite:///{tmp_path / 'mlflow.db'}"))
    dvc = start(pipeline, "-m", "dvc", "repro", MLFLOW_TRACKING_URI=client.tracking_uri, NAP="600")

    def statuses() -> dict[str, str]:
        experiment = client.get_experiment_by_name("smaller-student")
        runs = client.search_runs(experiment.experiment_id) if experiment else []
        return {run.data.tags.get("stage", "execution"): run.info.status for run in runs}

    running = {"execution": "RUNNING", "prepare": "RUNNING"}
    wait_until(lambda: statuses() == running, 120)
    run(start, pipeline, "pipeline", "sync", server=client.tracking_uri)  # works while dvc holds its locks
    assert statuses() == running
    (stage,) = [p for p in psutil.Process(dvc.pid).children(recursive=True) if "stages.prepare" in p.cmdline()[1:]]
    stage.send_signal(number)
    wait_until(lambda: statuses() == {"execution": "KILLED", "prepare": "KILLED"}, 15)
    dvc.communicate(timeout=60)
    assert dvc.returncode != 0

    run(start, pipeline, "dvc", "repro", server=client.tracking_uri)
    run(start, pipeline, "pipeline", "sync", server=client.tracking_uri)
    experiment = client.get_experiment_by_name("smaller-student").experiment_id
    ended = Counter(run.info.status for run in client.search_runs(experiment))
    assert ended == {"KILLED": 2, "FINISHED": 1 + len(RECORDS)}


def test_executions_are_compared_by_their_ids(pipeline: Files, start: Start, serve: Serve, tmp_path: Path) -> None:
    address = serve(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run(start, pipeline, "dvc", "repro", server=address)
    run(start, pipeline, "pipeline", "retrain", "--force", server=address)
    run(start, pipeline, "pipeline", "sync", server=address)
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("smaller-student").experiment_id
    newest, oldest = client.search_runs(experiment, "tags.stage IS NULL", order_by=["attributes.start_time DESC"])

    def compared(*words: str) -> tuple[int, str, str]:
        done = start(pipeline, "-m", "pipeline", "compare", *words, MLFLOW_TRACKING_URI=address, COLUMNS="80")
        out, err = done.communicate(timeout=60)
        return done.returncode, out, err

    code, out, _ = compared(oldest.info.run_id, newest.info.run_id[:12])
    rows = [line.split() for line in out.splitlines() if "finished" in line]
    assert (code, [row[0] for row in rows]) == (0, [oldest.info.run_id[:8], newest.info.run_id[:8]])
    assert [row[4:] for row in rows] == [["0.6100", "0.5900", "-50.0%", "-55.0%", "2.00x", "unknown"]] * 2
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = compared("--last", "1")
    assert (code, newest.info.run_id[:8] in out, oldest.info.run_id[:8] in out) == (0, True, False)
    code, _, err = compared("zz")
    assert code == 3
    assert err == "smaller-student: MLflow has no execution `zz`; `smaller-student compare --last 20` lists them\n"
    code, _, err = compared("")
    assert (code, "`` matches several executions" in err) == (3, True)


def _links_to_original(child: Run, runs: list[Run]) -> bool:
    """Return whether the run of a cached stage links to the run that computed it."""
    if child.data.tags["cached"] == "false":
        return True
    (original,) = [run for run in runs if run.info.run_id == child.data.tags["original_run"]]
    return original.data.tags["cached"] == "false" and original.data.tags["stage"] == child.data.tags["stage"]
