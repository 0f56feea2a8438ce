"""Publish a release: check it, compare it with the champion, and register it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pipeline.config import Params
from pipeline.export.model import open_model
from pipeline.export.release import STUDENT, ReleaseError
from pipeline.export.sample import check_release
from pipeline.files import Files, read_json, write_json
from pipeline.registry.model_registry import Registry
from pipeline.registry.policy import Decision
from pipeline.registry.promotion import PromotionPolicy
from pipeline.registry.upload import release_digest, upload_release
from pipeline.system.locks import BusyError, locked
from pipeline.tracking.errors import TrackingError
from pipeline.tracking.store import connect, identify, store_key
from pipeline.tracking.sync import sync

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """Outcome of publishing: digest of the release, its version, and the decision of the promotion rule."""

    digest: str
    version: str
    decision: Decision

    @property
    def sentence(self) -> str:
        outcome = "is champion" if self.decision.passed else "stays challenger"
        return f"version {self.version} {outcome}: {self.decision.reason}"


@contextmanager
def open_registry(files: Files, params: Params) -> Iterator[Registry]:
    """Connect to the registry of `tracking.model_name`.

    Raises:
        TrackingError: If MLflow cannot be reached, or rejects a request.
    """
    with connect(files) as client:
        yield Registry(client, params.tracking.model_name)


def publish(files: Files, params: Params, folder: Path) -> Published:
    """Register a release, as `champion` if it passes the promotion rule, else as `challenger`.

    Raises:
        ReleaseError: If the release is damaged, or its models give other embeddings than when they were exported.
        RegistryError: If it cannot be compared: the registry was changed by hand, or test identities may have been
            trained on.
        TrackingError: If MLflow cannot be reached, or does not take the release.
    """
    check_release(folder)
    with open_registry(files, params) as registry, locked(files.tracking / "publish.lock", "publishing"):
        identify(files, registry.client)
        _upload_records(files)
        policy = PromotionPolicy(files, params, registry, folder)
        upload = partial(upload_release, registry.client, files, folder, params.tracking.experiment)
        tags = {**_version_tags(folder), **policy.tags}
        published = Published(release_digest(folder), *registry.publish(folder, upload, tags, policy))
        registry.prune(files.tracking / "models")
    write_json(_saved(files), {**_target(files, params), **asdict(published)})
    return published


def _upload_records(files: Files) -> None:
    """Upload run records, so that the export has its run; a release can be published without the others."""
    try:
        _, notices = sync(files)
    except (TrackingError, BusyError) as error:
        notices = [str(error)]
    for notice in notices:
        log.warning(notice)


def last_published(files: Files, params: Params) -> Published | None:
    """Return the saved outcome if the release in artifacts/export was published to this registry before."""
    try:
        saved = read_json(_saved(files))
        with suppress(TrackingError), connect(files) as client:  # another store may be at the same address now
            identify(files, client)
        decision = Decision(bool(saved["decision"]["passed"]), str(saved["decision"]["reason"]))
        published = Published(str(saved["digest"]), str(saved["version"]), decision)
        same_target = {name: saved[name] for name in _target(files, params)} == _target(files, params)
        unchanged = published.digest == release_digest(files.artifacts("export"))
        return published if same_target and unchanged else None
    except (OSError, ValueError, KeyError, TypeError, ReleaseError):
        return None


def _saved(files: Files) -> Path:
    return files.tracking / "published.json"


def _target(files: Files, params: Params) -> dict[str, str]:
    return {"store": store_key(files), "model": params.tracking.model_name}


def _version_tags(folder: Path) -> dict[str, str]:
    """Return tags that describe a release in the MLflow UI."""
    metadata = open_model(folder / STUDENT).metadata
    return {
        "mAP": f"{metadata.map:.4f} ({metadata.protocol})",
        "MACs": f"{metadata.macs:,}",
        "commit": metadata.git_commit[:12] + "+" * metadata.git_commit.endswith("+"),
    }
