"""Three executions in a real server over each kind of database: whatever DVC ran, each stands there as a whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.files import Files
from pipeline.records import RECORDS
from tests.fake_stages import Start
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


def test_executions_are_complete_whatever_dvc_ran(pipeline: Files, start: Start, server: str) -> None:
    run(start, pipeline, "dvc", "repro", server=server)
    student = pipeline.root / "stages" / "student.py"
    student.write_text(student.read_text() + "\n# changed\n")
    run(start, pipeline, "dvc", "repro", server=server)
    run(start, pipeline, "pipeline", "retrain", "--force", server=server)
    run(start, pipeline, "pipeline", "sync", server=server)  # a slow server may not know all of it yet

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
        assert all(_original_is_known(child, runs) for child in children)
    ran, old = "false", "true"
    # Fake stages write the same whatever changed, so DVC finds the later ones unchanged.
    assert cached[0] == [ran] * 6
    assert cached[1][:3] == [old, old, ran]
    assert cached[2] == [old] * 6
    assert (Path(pipeline.root) / "dvc.lock").is_file()
    assert parents[2].data.tags["flow_run_id"]


def _original_is_known(child: Run, runs: list[Run]) -> bool:
    """Whether a stage that did not run names the run that did."""
    if child.data.tags["cached"] == "false":
        return True
    (original,) = [run for run in runs if run.info.run_id == child.data.tags["original_run"]]
    return original.data.tags["cached"] == "false" and original.data.tags["stage"] == child.data.tags["stage"]
