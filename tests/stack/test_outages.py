"""Failures of the tracking server only delay a run, and after `sync` no point of a metric is missing or duplicated."""

from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient

from pipeline.files import Files
from pipeline.records import RECORDS
from pipeline.tracking.run_record import all_executions
from tests.fake_stages import Start
from tests.stack.proxy import WAYS, Proxy

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[[str], str]) -> str:
    """A real server that never fails."""
    return serve_module(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    found = Proxy(urlsplit(server).port or 0)
    yield found
    found.close()


def points(client: MlflowClient, experiment: str) -> Counter[tuple[str, str, int, float]]:
    """Count every point of every metric of every run in MLflow."""
    found: Counter[tuple[str, str, int, float]] = Counter()
    for run in client.search_runs(experiment):
        for key in (key for key in run.data.metrics if not key.startswith("system/")):  # added by MLflow
            for point in client.get_metric_history(run.info.run_id, key):
                found[run.data.tags.get("stage", ""), key, point.step, point.value] += 1
    return found


def written(files: Files) -> Counter[tuple[str, str, int, float]]:
    """Count the same points in the run records."""
    (records,) = all_executions(files)
    found: Counter[tuple[str, str, int, float]] = Counter()
    for record in (records.execution(), *records.stages().values()):
        assert record is not None
        for point in record.curve:
            found.update((record.stage, key, point.step, value) for key, value in point.values.items())
        found.update((record.stage, key, 0, value) for key, value in record.figures.items())
    return found


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_or_duplicated(
    pipeline: Files,
    start: Start,
    server: str,
    proxy: Proxy,
    way: str,
) -> None:
    text = pipeline.params.read_text().replace("experiment: smaller-student", f"experiment: {way}")
    pipeline.params.write_text(text)
    proxy.way = way
    run = start(pipeline, "-m", "dvc", "repro", MLFLOW_TRACKING_URI=proxy.address, DVC_NO_ANALYTICS="1")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, out + err
    assert all(pipeline.metrics(stage).is_file() for stage in RECORDS)

    proxy.way = ""
    for again in ([], ["--again"], ["--again"]):
        sync = start(pipeline, "-m", "pipeline", "sync", *again, MLFLOW_TRACKING_URI=proxy.address)
        _, err = sync.communicate(timeout=300)
        assert sync.returncode == 0, err
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name(way).experiment_id
    runs = client.search_runs(experiment)
    assert sorted(run.data.tags.get("stage", "") for run in runs) == sorted(["", *RECORDS])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert points(client, experiment) == written(pipeline)
