"""What someone sees who opens the MLflow UI after a run."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import Page, expect
from tests.fake_stages import NUMBERS

from pipeline.files import Files, write_json, write_text
from pipeline.ops.execution import Execution
from pipeline.ops.params import load
from pipeline.ops.process import identity
from pipeline.ops.recorder import Recorder
from pipeline.records import RECORDS

pytestmark = pytest.mark.stack
ROOT = Path(__file__).parents[2]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A checkout whose six stages have reported, recorded by the code that records real ones."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    files = Files(tmp_path, tmp_path)
    write_text(files.params, (ROOT / "presets" / "smoke.yaml").read_text())
    write_text(files.manifest, "path,identity,camera,split\n")
    write_text(files.plots("teacher"), "epoch,loss,validation_map\n1,2.5,0.2\n2,1.5,0.4\n3,1.1,0.5\n")
    write_text(files.plots("student"), "epoch,loss,macs_reduction\n1,2.0,0.1\n2,1.4,0.4\n3,1.0,0.55\n")
    params = load(files.params).model_dump(mode="json")
    for stage in RECORDS:
        write_json(files.metrics(stage), NUMBERS[stage])
    recorder = Recorder(files, params, Execution("dvc", *identity()), int(time.time() * 1000))
    recorder.begin(None)
    recorder.end(None, "FINISHED")
    return files


def test_teacher_and_student_stand_side_by_side_with_their_map(
    recorded: Files, serve: Callable[[str], str], page: Page, tmp_path: Path
) -> None:
    store = f"sqlite:///{recorded.mlflow_db}"
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("smaller-student")
    runs = {run.info.run_name: run for run in client.search_runs(experiment.experiment_id)}
    ids = ",".join(f'"{runs[stage].info.run_id}"' for stage in ("teacher", "student"))
    address = serve(store)

    page.goto(f"{address}/#/experiments/{experiment.experiment_id}/runs")
    for stage in RECORDS:
        expect(page.get_by_role("link", name=stage, exact=True)).to_be_visible(timeout=60_000)
    page.screenshot(path=tmp_path / "runs.png")

    page.goto(f"{address}/#/compare-runs?runs=[{ids}]&experiments=[\"{experiment.experiment_id}\"]")
    page.get_by_role("tab", name="Metrics").or_(page.get_by_text("Metrics", exact=True)).first.wait_for(timeout=60_000)
    page.wait_for_timeout(2000)
    page.screenshot(path=tmp_path / "compare.png", full_page=True)
    row = page.get_by_role("row").filter(has_text="eval/mAP")
    expect(row).to_contain_text("0.61")
    expect(row).to_contain_text("0.6")
