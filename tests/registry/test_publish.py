"""Publishing depends on the release, not on the other run records of the checkout."""

from pathlib import Path

import pytest

from pipeline.files import Files, write_text
from pipeline.flow.retrain import _publish
from pipeline.registry.lineage import CHAMPION
from pipeline.registry.publish import last_published, open_registry, publish
from pipeline.registry.upload import DIGEST, release_digest, upload_release
from pipeline.system.locks import BusyError
from pipeline.tracking.execution import Execution, ProcessId
from pipeline.tracking.run_record import EXECUTION, ExecutionRecords, RunRecord
from pipeline.tracking.store import open_store
from pipeline.tracking.sync import sync
from tests.export.tiny_network import tiny_net
from tests.fake_stages import Start
from tests.registry.test_promotion import SIZES, params, prepare, to_onnx, trained

SETTINGS = params()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A checkout with a release in artifacts/export, whose store is a new database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    files = Files(tmp_path, tmp_path)
    networks = {0: to_onnx(tiny_net(0), SIZES[0], 18).SerializeToString()}
    files.artifacts("export").mkdir(parents=True)
    trained(files.artifacts("export"), networks, 0, prepare(files, SETTINGS, 20))
    return files


def execution(files: Files, experiment: str, number: int) -> ExecutionRecords:
    """Record an execution with a report."""
    process = ProcessId(host="elsewhere", boot="", pid=number, start=1)
    records = ExecutionRecords.of(files, Execution.of("dvc", process))
    write_text(records.files / "report" / "index.html", "<h1>report</h1>")
    common = {"process": process, "began": number}
    records.write(EXECUTION, RunRecord(title="an execution", experiment=experiment, **common))
    stage = RunRecord(title="benchmark", stage="benchmark", status="FINISHED", ended=9, folder="report", **common)
    records.write("benchmark", stage)
    return records


def champion(files: Files) -> str:
    with open_registry(files, SETTINGS) as registry:
        return registry.version_of(CHAMPION)


def test_an_old_execution_whose_artifact_store_is_gone_does_not_stop_publish(
    files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(files.root / "a file", "")
    open_store(files).create_experiment("old", (files.root / "a file" / "runs").as_uri())
    execution(files, "old", 1)
    published = publish(files, SETTINGS, files.artifacts("export"))
    assert (published.version, published.decision.passed, champion(files)) == ("1", True, "1")
    assert "has all figures and statuses, but its artifact store failed" in caplog.text


def test_a_release_of_a_checkout_without_run_records_is_published_once(files: Files) -> None:
    published = publish(files, SETTINGS, files.artifacts("export"))
    assert last_published(files, SETTINGS) == published


def test_the_flow_has_the_outcome_of_publishing(files: Files) -> None:
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness():
        published = flow(lambda: _publish(files, SETTINGS))()
    assert (published.version, published.decision.passed, champion(files)) == ("1", True, "1")


def test_a_release_that_another_process_uploads_is_not_uploaded_at_the_same_time(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    files = Files(tmp_path, tmp_path)
    records = execution(files, "e", 1)
    sync(files)
    write_text(tmp_path / "release" / "SHA256SUMS", "1234  model.onnx\n")
    client = open_store(files)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id], "tags.stage = 'benchmark'")
    client.set_tag(run.info.run_id, DIGEST, release_digest(tmp_path / "release"))
    client.set_tag(run.info.run_id, "cached", "false")
    monkeypatch.setattr("pipeline.registry.upload.LOCK_TIMEOUT", 0.1)
    code = (
        "import sys, time; from pathlib import Path; from pipeline.tracking.run_record import ExecutionRecords\n"
        "with ExecutionRecords(Path(sys.argv[1])).upload_lock(0): print('uploading', flush=True); time.sleep(300)"
    )
    other = start(files, "-c", code, str(records.folder))
    assert other.stdout is not None and other.stdout.readline() == "uploading\n"
    with pytest.raises(BusyError, match=f"the upload of execution {records.id} is already running"):
        upload_release(client, files, tmp_path / "release", "e")
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report"]
    other.kill()
    other.wait()
    assert upload_release(client, files, tmp_path / "release", "e") == run.info.run_id
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["export", "report"]
