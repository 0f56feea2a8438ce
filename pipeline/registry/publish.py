"""From a release on this machine to a champion in the registry."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pipeline.config import Params
from pipeline.export.release import ReleaseError
from pipeline.export.sample import check_release
from pipeline.files import Files, read_json, write_json
from pipeline.registry.model_registry import Registry, release_digest, uploaded, version_tags
from pipeline.registry.policy import Decision
from pipeline.registry.promotion import PromotionPolicy
from pipeline.system.locks import locked
from pipeline.tracking.store import connected, tracking_uri
from pipeline.tracking.sync import sync


@dataclass(frozen=True)
class Published:
    """What became of a release: its `release_digest`, its version in the registry, and the decision of the gate."""

    digest: str
    version: str
    decision: Decision

    @property
    def sentence(self) -> str:
        """The outcome, for people."""
        became = "is champion" if self.decision.passed else "stays challenger"
        return f"version {self.version} {became}: {self.decision.reason}"


@contextmanager
def registry(files: Files, params: Params) -> Iterator[Registry]:
    """Open the registry.

    Raises:
        TrackingError: If MLflow cannot be reached, or refuses.
    """
    with connected(files) as client:
        yield Registry(client, params.tracking.model_name)


def publish(files: Files, params: Params, folder: Path) -> Published:
    """Compare a release with the champion, and register it as `champion` if it passes the gate, else as `challenger`.

    Raises:
        ReleaseError: If the release is damaged or does not do what it did when it was written.
        RegistryError: If it cannot be compared: the registry was changed by hand, or a network may know the test set.
        TrackingError: If MLflow cannot be reached; the release stays where it is.
    """
    check_release(folder)
    sync(files)
    with registry(files, params) as known, locked(files.tracking / "publish.lock", "publishing"):
        policy = PromotionPolicy(files, params, known, folder)
        made_by = partial(uploaded, known.client, files, folder, params.tracking.experiment)
        tags = {**version_tags(folder), **policy.tags}
        found = Published(release_digest(folder), *known.publish(folder, made_by, tags, policy))
        known.prune(files.tracking / "models")
    write_json(_memory(files), {**_place(files, params), **asdict(found)})
    return found


def remembered(files: Files, params: Params) -> Published | None:
    """The outcome of what lies in artifacts/export now, if it was published to this registry before."""
    try:
        said = read_json(_memory(files))
        decision = Decision(bool(said["decision"]["passed"]), str(said["decision"]["reason"]))
        found = Published(str(said["digest"]), str(said["version"]), decision)
        here = {name: said[name] for name in _place(files, params)} == _place(files, params)
        return found if here and found.digest == release_digest(files.artifacts("export")) else None
    except (OSError, ValueError, KeyError, TypeError, ReleaseError):
        return None


def _memory(files: Files) -> Path:
    return files.tracking / "published.json"


def _place(files: Files, params: Params) -> dict[str, str]:
    return {"uri": tracking_uri(files), "model": params.tracking.model_name}
