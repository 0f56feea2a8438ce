"""The MLflow UI after a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import Locator, Page, expect

from pipeline.files import Files, write_json, write_text
from pipeline.records import RECORDS
from pipeline.stage.params_file import load
from pipeline.stage.presets import preset_text
from pipeline.tracking.execution import current_execution
from pipeline.tracking.recorder import Recorder
from pipeline.tracking.sync import sync
from tests.fake_stages import NUMBERS

pytestmark = pytest.mark.stack
METRICS = ("eval/mAP", "eval/rank1", "model/params_reduction", "model/flops_reduction")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A checkout with the results of six stages, recorded by the code that records real ones."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    files = Files(tmp_path, tmp_path)
    write_text(files.params, preset_text(ROOT, "smoke"))
    write_text(files.manifest, "path,identity,camera,split\n")
    write_text(files.plots("teacher"), "epoch,loss,validation_map\n1,2.5,0.2\n2,1.5,0.4\n3,1.1,0.5\n")
    write_text(files.plots("student"), "epoch,loss,macs_reduction\n1,2.0,0.1\n2,1.4,0.4\n3,1.0,0.55\n")
    params = load(files.params)
    for stage in RECORDS:
        write_json(files.metrics(stage), NUMBERS[stage])
    Recorder(files, params, current_execution()).begin(None)
    sync(files)
    return files


@pytest.fixture
def table(recorded: Files, serve: Callable[[str], str], page: Page) -> Locator:
    """The table of runs with the stages expanded and the main metrics as columns."""
    store = f"sqlite:///{recorded.mlflow_db}"
    experiment = MlflowClient(store).get_experiment_by_name("smaller-student")
    page.goto(f"{serve(store)}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning")
    execution = page.get_by_role("row").filter(has=page.get_by_role("link", name="vehicles, "))
    execution.get_by_role("button").first.click(timeout=60_000)
    page.get_by_text("Columns", exact=True).click()
    for metric in METRICS:
        page.get_by_placeholder("Search columns").fill(metric)
        page.get_by_text(metric, exact=True).first.click()
    page.keyboard.press("Escape")
    return page.get_by_role("grid")


def test_teacher_and_student_are_in_one_table_with_their_metrics(table: Locator, page: Page, tmp_path: Path) -> None:
    # The grid has names and metrics in two halves; a run has the same row index in both.
    lines = table.locator(".ag-row")
    names = [table.get_by_role("link", name=stage, exact=True) for stage in RECORDS]
    for name in names:
        expect(name).to_be_visible()
    page.screenshot(path=tmp_path / "runs.png")

    def shown(stage: str) -> list[str]:
        number = lines.filter(has=page.get_by_role("link", name=stage, exact=True)).first.get_attribute("row-index")
        return table.locator(f'.ag-row[row-index="{number}"] [role="gridcell"]').all_inner_texts()

    assert {"0.61", "0.7", "0"} <= set(shown("teacher"))
    assert {"0.6", "0.7", "0.55", "0.5"} <= set(shown("student"))
    assert {"0.59", "0.55", "0.5"} <= set(shown("export"))
