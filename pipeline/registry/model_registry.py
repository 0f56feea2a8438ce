"""Versions of a release in MLflow's model registry: publish, fetch, promote and roll back.

A release is compared first and registered afterwards (see `promotions`). What people delete or move in MLflow shows in
a comparison of the versions, the alias and the registered model's tag `promoted` (the last promotion). Until somebody
names the champion, nothing is promoted then.
"""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.export.model import open_model
from pipeline.export.release import STUDENT, SUMS, ReleaseError
from pipeline.export.sample import check_release
from pipeline.files import Files
from pipeline.registry.lineage import (
    BEST,
    CHALLENGER,
    CHAMPION,
    GATE,
    ITSELF,
    PASSED,
    PROMOTED,
    REASON,
    REPLACES,
    RESTORES,
    SHOWN,
    Lineage,
    Promotion,
)
from pipeline.registry.policy import Decision
from pipeline.system.locks import BusyError
from pipeline.tracking import store

log = logging.getLogger(__name__)

ARTIFACTS = "export"
"""Folder of a release in a run's artifacts."""
ATTEMPTS = 5
"""Comparisons of one challenger while others are promoted."""
DIGEST = "release_digest"
"""Tag of versions and runs: SHA-256 of the release's SHA256SUMS."""

Decide = Callable[[str | None, str | None], tuple[Decision, bool]]
"""Compares a challenger with champion and best (versions, None where there is none).

Returns the decision, and whether the challenger is the best now.
"""


class RegistryError(RuntimeError):
    """The registry does not have what was requested, or was changed by hand."""

    exit_code = 3


class Registry:
    """Versions of one model."""

    def __init__(self, client: MlflowClient, name: str) -> None:
        self.client, self.name = client, name

    # --- reading ------------------------------------------------------------------------------------------------------

    def lineage(self) -> Lineage:
        """What the versions record, whatever was deleted or moved."""
        found: list[ModelVersion] = []
        token: str | None = None
        while True:  # in an order that does not change from page to page
            page = self.client.search_model_versions(f"name = '{self.name}'", 200, ["version_number ASC"], token)
            found += page
            token = page.token
            if not token:
                return Lineage.of(found)

    def checked(self) -> Lineage:
        """What the versions record.

        Raises:
            RegistryError: If something was deleted or moved in MLflow; naming the remedy.
        """
        models = self.client.search_registered_models(f"name = '{self.name}'")
        found = self.lineage()
        if models and (problem := found.problem(models[0])):
            remedy = (
                f"name the champion (one of {', '.join(found.passed)}) by `smaller-student rollback --to VERSION`"
                if found.passed
                else "no version that passed the gate is left, so choose another `tracking.model_name`"
            )
            raise RegistryError(f"{problem}; {remedy}")
        return found

    def version_of(self, alias: str) -> str:
        """Version that is `champion` or `best`, or that another alias stands at, or a version itself.

        Raises:
            RegistryError: If there is none, or something was deleted or moved in MLflow.
        """
        if alias.isdecimal():
            return alias
        if alias in (CHAMPION, BEST):
            if now := self.checked().champion:
                return now.version if alias == CHAMPION else now.best
        else:
            with contextlib.suppress(MlflowException):
                return str(self.client.get_model_version_by_alias(self.name, alias).version)
        raise RegistryError(f"{self.name} has no `{alias}`; `smaller-student publish` makes one")

    def tags(self, version: str) -> dict[str, str]:
        """Tags of a version."""
        return dict(self.client.get_model_version(self.name, version).tags)

    # --- files --------------------------------------------------------------------------------------------------------

    def fetched(self, version: str, models: Path) -> Path:
        """Folder of a version's files below `models`, downloaded at the first call and named after their hash."""
        folder = models / self.tags(version).get(DIGEST, "unknown")[:16]
        if not folder.is_dir():
            self.download(version, folder)
        return folder

    def prune(self, models: Path) -> None:
        """Delete what `fetched` downloaded, champion and best excepted; no other process may be comparing."""
        found = self.lineage()
        used = {found.champion.version, found.champion.best} if found.champion else set()
        kept = {one.tags.get(DIGEST, "")[:16] for name, one in found.versions.items() if name in used}
        for folder in list(models.iterdir()) if models.is_dir() else ():
            if folder.is_dir() and folder.name not in kept:
                with tempfile.TemporaryDirectory(dir=models, prefix=".pruned-") as gone:
                    folder.rename(Path(gone) / folder.name)  # a kill leaves no half of it under its name

    def download(self, version: str, folder: Path) -> None:
        """Fetch a version's files and check them; the folder is there in full or not at all.

        Raises:
            RegistryError: If MLflow does not have them.
            ReleaseError: If they are not what was published.
        """
        if folder.exists():
            raise RegistryError(f"{folder} exists; choose another folder or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
            try:
                written = self.tags(version).get(DIGEST)
                uri = self.client.get_model_version_download_uri(self.name, version)
                found = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch))
            except (MlflowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise RegistryError(f"version {version} of {self.name} cannot be fetched ({reason})") from error
            if written is None:
                raise RegistryError(f"version {version} of {self.name} was not made by `smaller-student publish`")
            if release_digest(found) != written:
                raise ReleaseError(f"version {version} of {self.name} is not what was published; publish it again")
            check_release(found)
            found.rename(folder)

    # --- writing ------------------------------------------------------------------------------------------------------

    def publish(
        self, folder: Path, run: Callable[[], str], tags: dict[str, str], decide: Decide
    ) -> tuple[str, Decision]:
        """Compare a release with the champion, and register it as `challenger`, or as `champion` if it passes.

        Files that are registered already get a second version only if it is that which promotes them.

        Args:
            folder: The release on this machine.
            run: Returns the id of a run that has it among its artifacts.
            tags: Further tags of the version.
            decide: Compares it.

        Returns:
            The version, and the decision.

        Raises:
            RegistryError: If something was deleted or moved in MLflow; nothing is registered then.
            BusyError: If others were promoted again and again meanwhile.
        """
        with contextlib.suppress(MlflowException):  # it exists
            text = "ONNX files for image retrieval; `champion` is in use, `challenger` was published last."
            self.client.create_registered_model(self.name, description=text)
        tags = {**tags, DIGEST: release_digest(folder)}
        for _ in range(ATTEMPTS):
            found = self.checked()
            now, last = found.champion, found.last
            same = [name for name, one in found.versions.items() if one.tags.get(DIGEST) == tags[DIGEST]]
            if now is not None and now.version in same:
                self.show(now.number)
                return now.version, Decision(True, "it is the champion already")
            if found.withdrawn.intersection(same):
                return same[-1], Decision(False, "it was taken back by `rollback`")
            decision, better = decide(now.version if now else None, now.best if now else None)
            tags |= {GATE: PASSED if decision.passed else "failed", REASON: decision.reason, REPLACES: last}
            tags[BEST] = ITSELF if now is None or better else now.best
            if decision.passed or not same:
                if same:
                    source, holder = found.versions[same[-1]].source, found.versions[same[-1]].run_id
                else:
                    holder = run()
                    source = f"{self.client.get_run(holder).info.artifact_uri}/{ARTIFACTS}"
                version = self._create(source or "", holder, tags, f"PromotionPolicy: {decision.reason}.")
            elif (version := same[-1]) not in [one.number for one in found.promotions]:  # those keep what they passed
                for name in (GATE, REASON):
                    self.client.set_model_version_tag(self.name, version, name, tags[name])
            self.client.set_registered_model_alias(self.name, CHALLENGER, version)
            if not decision.passed:
                return version, decision
            self.show(version)
            if version in [one.number for one in self.lineage().promotions]:
                return version, decision
            log.info("another promotion came between: version %s is compared again", version)
        raise BusyError(f"others promoted {ATTEMPTS} times meanwhile; try again")

    def roll_back(self, to: str | None = None) -> tuple[list[str], str]:
        """Make an earlier version champion, whatever else is promoted at the same time.

        Args:
            to: A version that passed the gate; the champion before the present one where None.

        Returns:
            Versions that were taken back, and the champion.

        Raises:
            RegistryError: If there is no such version, or (without `to`) something was deleted or moved in MLflow.
        """
        found, reason = self.lineage(), "named by `rollback --to`"
        if to is None:
            champions = self.checked().champions
            if len(champions) < 2:
                raise RegistryError(f"{self.name} has no champion before the present one")
            to, reason = champions[-2].version, f"version {champions[-1].version} was taken back"
        if to not in found.passed:
            known = ", ".join(found.passed) or "none did"
            raise RegistryError(f"version {to} of {self.name} is missing or did not pass the gate; these did: {known}")
        one, model = found.versions[to], self.client.get_registered_model(self.name)
        best = str(model.aliases.get(BEST, ITSELF))  # versions of 0.1.0 have no tag for it
        tags = {BEST: best, **one.tags, RESTORES: to, REASON: reason}
        tags = {name: value for name, value in tags.items() if name not in (REPLACES, SHOWN)}
        if tags[BEST] not in found.versions:
            tags[BEST] = ITSELF
        self.show(self._create(one.source or "", one.run_id, tags, f"Version {to} is champion again: {reason}."))
        return sorted(self.lineage().withdrawn - found.withdrawn, key=int), to

    def _create(self, source: str, run: str | None, tags: dict[str, str], description: str) -> str:
        return str(self.client.create_model_version(self.name, source, run, tags, description=description).version)

    def show(self, number: str) -> None:
        """Let the aliases show what the versions record, and note at version `number` that they do."""
        shown: Promotion | None = None
        while (now := self.lineage().champion) is not None and now != shown:  # another may be promoted meanwhile
            for alias, version in ((CHAMPION, now.version), (BEST, now.best)):
                self.client.set_registered_model_alias(self.name, alias, version)
            self.client.set_registered_model_tag(self.name, PROMOTED, now.number)
            shown = now
        self.client.set_model_version_tag(self.name, number, SHOWN, "yes")


def release_digest(folder: Path) -> str:
    """SHA-256 of a release's SHA256SUMS, and so of all files that it lists."""
    try:
        return hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()
    except OSError:
        raise ReleaseError(f"{folder / SUMS} is missing; a folder without it is no release") from None


def version_tags(folder: Path) -> dict[str, str]:
    """Tags for people who look at a version in MLflow."""
    about = open_model(folder / STUDENT).metadata
    return {"mAP": f"{about.map:.4f} ({about.protocol})", "MACs": f"{about.macs:,}", "commit": about.git_commit[:12]}


def uploaded(client: MlflowClient, files: Files, folder: Path, experiment: str) -> str:
    """Run of an experiment that has a release among its artifacts; it is made where there is none.

    Raises:
        RegistryError: If somebody deleted the experiment.
    """
    if (number := store.experiment(client, files, experiment)) is None:
        raise RegistryError(f"experiment {experiment} was deleted in MLflow; restore it or set `tracking.experiment`")
    digest = release_digest(folder)
    wanted = {f"{ARTIFACTS}/{path.name}": path.stat().st_size for path in folder.iterdir()}
    for run in client.search_runs([number], f"tags.{DIGEST} = '{digest}' and attributes.status = 'FINISHED'"):
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Exception):  # MLflow raises many
            held = {file.path: file.file_size for file in client.list_artifacts(run.info.run_id, ARTIFACTS)}
            sums = Path(client.download_artifacts(run.info.run_id, f"{ARTIFACTS}/{SUMS}", scratch))
            if held == wanted and release_digest(sums.parent) == digest:
                return str(run.info.run_id)
    made = client.create_run(number, run_name="publish", tags={DIGEST: digest}).info.run_id
    try:
        client.log_artifacts(made, str(folder), ARTIFACTS)
    except BaseException:
        client.set_terminated(made, "FAILED")
        raise
    client.set_terminated(made)
    return str(made)
