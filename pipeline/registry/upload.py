"""The files of a release among the artifacts of a run in MLflow."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline.export.release import SUMS, ReleaseError
from pipeline.files import Files
from pipeline.registry.errors import RegistryError
from pipeline.tracking import errors, store
from pipeline.tracking.run_record import all_executions
from pipeline.tracking.sync import LOCK_TIMEOUT

ARTIFACTS = "export"
"""Artifact folder of a release in a run."""
DIGEST = "release_digest"
"""Tag of versions and runs: SHA-256 of the release's SHA256SUMS."""


def release_digest(folder: Path) -> str:
    """Return the SHA-256 of a release's SHA256SUMS, and so of all files in it."""
    try:
        return hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()
    except OSError:
        raise ReleaseError(f"{folder} is not a release: {SUMS} is missing; run `dvc repro export`") from None


def upload_release(client: MlflowClient, files: Files, folder: Path, experiment: str) -> str:
    """Return the id of a run with the release among its artifacts, uploading it if there is none.

    A release goes to the run of the stage that exported it, or to a new run if MLflow has no such run.

    Raises:
        RegistryError: If the experiment was deleted in MLflow.
        BusyError: If another process uploads the release for longer than LOCK_TIMEOUT.
        TrackingError: If the artifact store fails.
    """
    if (number := store.experiment_id(client, files, experiment)) is None:
        raise RegistryError(f"experiment {experiment} was deleted in MLflow; restore it or set `tracking.experiment`")
    digest = release_digest(folder)
    sizes = {f"{ARTIFACTS}/{path.name}": path.stat().st_size for path in folder.iterdir()}
    runs = list(client.search_runs([number], f"tags.{DIGEST} = '{digest}' and attributes.status = 'FINISHED'"))
    with _no_upload(files, runs):
        for run in runs:
            with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Exception):  # of any artifact store
                uploaded = {file.path: file.file_size for file in client.list_artifacts(run.info.run_id, ARTIFACTS)}
                sums = Path(client.download_artifacts(run.info.run_id, f"{ARTIFACTS}/{SUMS}", scratch))
                if uploaded == sizes and release_digest(sums.parent) == digest:
                    return str(run.info.run_id)
        exported = sorted((run for run in runs if "stage" in run.data.tags), key=lambda run: run.data.tags["cached"])
        if exported:
            run_id = exported[0].info.run_id
        else:
            run_id = client.create_run(number, run_name="publish", tags={DIGEST: digest}).info.run_id
        try:
            client.log_artifacts(run_id, str(folder), ARTIFACTS)
        except Exception as error:  # of any artifact store
            if not exported:
                with contextlib.suppress(MlflowException):
                    client.delete_run(run_id)
            place = f"the artifact store of MLflow at {errors.shown(client.tracking_uri)}"
            message = (
                f"{place} failed ({errors.root_cause(error)}); nothing was registered, publish again when it works"
            )
            raise errors.TrackingError(message) from error
        if not exported:
            client.set_terminated(run_id)
        return str(run_id)


@contextlib.contextmanager
def _no_upload(files: Files, runs: list[Run]) -> Iterator[None]:
    """Wait for uploads of files to runs that are FINISHED already, and hold the locks of further ones.

    Raises:
        BusyError: If another process uploads for longer than LOCK_TIMEOUT.
    """
    executions = {run.data.tags.get("execution_id") for run in runs if run.data.tags.get("cached") == "false"}
    with contextlib.ExitStack() as locks:
        for records in all_executions(files):
            if records.id in executions:
                locks.enter_context(records.upload_lock(LOCK_TIMEOUT))
        yield
