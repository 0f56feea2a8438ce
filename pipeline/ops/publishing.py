"""From a release on this machine to a champion in the registry."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

from pipeline.config import Params
from pipeline.export.release import ReleaseError
from pipeline.export.sample import check_release
from pipeline.files import Files, read_json, write_json
from pipeline.ops.gate import Gate
from pipeline.ops.registry import Registry, facts, release_digest, uploaded
from pipeline.ops.store import TrackingError, cause, open_store, tracking_uri
from pipeline.ops.sync import sync
from pipeline.retrieval.gate import Verdict


@dataclass(frozen=True)
class Published:
    """What became of a release.

    Attributes:
        digest: Of the release, see `release_digest`.
        version: In the registry.
        verdict: Of the gate.
    """

    digest: str
    version: str
    verdict: Verdict

    @property
    def sentence(self) -> str:
        """For people."""
        became = "is champion" if self.verdict.passed else "stays challenger"
        return f"version {self.version} {became}: {self.verdict.reason}"


@contextmanager
def registry(files: Files, params: Params) -> Iterator[Registry]:
    """The model's registry; what goes wrong in MLflow becomes one sentence.

    Raises:
        TrackingError: If MLflow cannot be reached, or refuses.
    """
    try:
        yield Registry(open_store(files), params.tracking.model_name)
    except (MlflowException, RequestException) as error:
        raise TrackingError(f"MLflow at {tracking_uri(files)} did not do it ({cause(error)})") from error


def publish(files: Files, params: Params, folder: Path) -> Published:
    """Register a release as `challenger`, and let it become `champion` if the gate lets it pass.

    Args:
        files: Of the checkout.
        params: Of the checkout.
        folder: The release, as stage `export` writes it.

    Raises:
        ReleaseError: If the release is damaged or does not do what it did when it was written.
        TrackingError: If MLflow cannot be reached; the release stays where it is.
    """
    check_release(folder)
    sync(files)
    with registry(files, params) as known:
        gate = Gate(files, params, known, folder)
        told = {**facts(folder), "test_set": gate.test_digest[:12]}
        version = known.publish(folder, lambda: uploaded(known.client, files, folder, params.tracking.experiment), told)
        found = Published(release_digest(folder), version, known.promote(version, gate))
    write_json(_memory(files), {**_place(files, params), **asdict(found)})
    return found


def remembered(files: Files, params: Params) -> Published | None:
    """What the gate said of what lies in artifacts/export now, if this registry was asked."""
    try:
        said = read_json(_memory(files))
        verdict = Verdict(bool(said["verdict"]["passed"]), str(said["verdict"]["reason"]))
        found = Published(str(said["digest"]), str(said["version"]), verdict)
        here = {name: said[name] for name in _place(files, params)} == _place(files, params)
        return found if here and found.digest == release_digest(files.artifacts("export")) else None
    except (OSError, ValueError, KeyError, TypeError, ReleaseError):
        return None


def _memory(files: Files) -> Path:
    return files.tracking / "published.json"


def _place(files: Files, params: Params) -> dict[str, str]:
    return {"uri": tracking_uri(files), "model": params.tracking.model_name}
