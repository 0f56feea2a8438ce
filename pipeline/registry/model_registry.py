"""Versions of releases in MLflow's model registry: publish, download, promote and roll back.

A release is compared first and registered afterwards (see `lineage`). Versions or aliases that were deleted or moved by
hand in MLflow are detected from the versions, the alias and the tag `promoted` of the registered model. Nothing is
promoted then until the user names the champion (`smaller-student rollback --to VERSION`).
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

from pipeline.export.release import ReleaseError
from pipeline.export.sample import check_release
from pipeline.registry.errors import RegistryError
from pipeline.registry.lineage import (
    BEST,
    CHALLENGER,
    CHAMPION,
    DECISION,
    FAILED,
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
from pipeline.registry.upload import ARTIFACTS, DIGEST, release_digest
from pipeline.system.locks import BusyError
from pipeline.tracking import errors

log = logging.getLogger(__name__)

MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Error codes of MLflow for a version or alias that does not exist."""
ATTEMPTS = 5
"""Maximum comparisons of one challenger while other versions are promoted."""

Decide = Callable[[str | None, str | None], tuple[Decision, bool]]
"""Compares a challenger with the versions `champion` and `best` (None if there is none).

Returns the decision, and whether the challenger is the best version now.
"""


class Registry:
    """A registered model and its versions."""

    def __init__(self, client: MlflowClient, name: str) -> None:
        self.client, self.name = client, name

    def lineage(self) -> Lineage:
        """Read the lineage without checking for manual changes in MLflow."""
        versions: list[ModelVersion] = []
        token: str | None = None
        while True:  # sorted, so that pages do not overlap
            page = self.client.search_model_versions(f"name = '{self.name}'", 200, ["version_number ASC"], token)
            versions += page
            token = page.token
            if not token:
                return Lineage.from_versions(versions)

    def checked_lineage(self) -> Lineage:
        """Read the lineage, and check that nothing was deleted or moved by hand in MLflow.

        Raises:
            RegistryError: If something was.
        """
        models = self.client.search_registered_models(f"name = '{self.name}'")
        lineage = self.lineage()
        lineage.model_tags = dict(models[0].tags) if models else {}
        if models and (change := lineage.manual_change(models[0])):
            remedy = (
                f"name the champion (one of {', '.join(lineage.passed)}) by `smaller-student rollback --to VERSION`"
                if lineage.passed
                else "no version that passed the promotion rule is left, so choose another `tracking.model_name`"
            )
            raise RegistryError(f"{change}; {remedy}")
        return lineage

    def version_of(self, alias: str) -> str:
        """Return the version of `champion`, `best` or another alias; a version number is returned unchanged.

        Raises:
            RegistryError: If there is none, or something was deleted or moved by hand in MLflow.
        """
        if alias.isdecimal():
            return alias
        if alias in (CHAMPION, BEST):
            if champion := self.checked_lineage().champion:
                return champion.version if alias == CHAMPION else champion.best
        else:
            try:
                return str(self.client.get_model_version_by_alias(self.name, alias).version)
            except MlflowException as error:
                if error.error_code not in MISSING:
                    raise
        raise RegistryError(f"{self.name} has no `{alias}`; `smaller-student publish` creates one")

    def tags(self, version: str) -> dict[str, str]:
        return dict(self.client.get_model_version(self.name, version).tags)

    def cached_download(self, version: str, models: Path) -> Path:
        """Return the folder of a version's files below `models`, named after their digest; download them once."""
        folder = models / self.tags(version).get(DIGEST, "unknown")[:16]
        if not folder.is_dir():
            self.download(version, folder)
        return folder

    def prune(self, models: Path) -> None:
        """Delete the downloads of `cached_download` except champion and best; no other process may be comparing."""
        lineage = self.lineage()
        used = {lineage.champion.version, lineage.champion.best} if lineage.champion else set()
        kept = {version.tags.get(DIGEST, "")[:16] for number, version in lineage.versions.items() if number in used}
        for folder in list(models.iterdir()) if models.is_dir() else ():
            if folder.is_dir() and folder.name not in kept:
                with tempfile.TemporaryDirectory(dir=models, prefix=".pruned-") as trash:
                    folder.rename(Path(trash) / folder.name)  # a kill leaves no incomplete folder under this name

    def download(self, version: str, folder: Path) -> None:
        """Download a version's files and check them; the folder is created complete or not at all.

        Raises:
            RegistryError: If the files cannot be downloaded, or the folder exists.
            ReleaseError: If the files differ from the published ones.
        """
        if folder.exists():
            raise RegistryError(f"{folder} exists; choose another folder or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
            try:
                digest = self.tags(version).get(DIGEST)
                uri = self.client.get_model_version_download_uri(self.name, version)
            except MlflowException as error:
                if error.error_code not in MISSING:
                    raise
                raise RegistryError(
                    f"{self.name} has no version {version}; `smaller-student history` lists them"
                ) from error
            try:
                downloaded = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch))
            except Exception as error:  # of any artifact store
                reason = f"version {version} of {self.name} cannot be downloaded ({errors.root_cause(error)})"
                remedy = "repair the artifact store, or name a champion by `smaller-student rollback --to VERSION`"
                raise RegistryError(f"{reason}; {remedy}") from error
            if digest is None:
                raise RegistryError(f"version {version} of {self.name} was not created by `smaller-student publish`")
            if release_digest(downloaded) != digest:
                raise ReleaseError(f"version {version} of {self.name} is not what was published; publish it again")
            check_release(downloaded)
            downloaded.rename(folder)

    def publish(
        self, folder: Path, upload: Callable[[], str], tags: dict[str, str], decide: Decide
    ) -> tuple[str, Decision]:
        """Compare a release with the champion, and register it as `challenger`, or as `champion` if it passes.

        Files that are registered already get a second version only if that version promotes them.

        Args:
            folder: Folder of the release.
            upload: Uploads the release if necessary; returns the id of the run that has it among its artifacts.
            tags: Additional tags of the version.
            decide: Applies the promotion rule.

        Returns:
            Version of the release, and the decision.

        Raises:
            RegistryError: If something was deleted or moved by hand in MLflow; nothing is registered then.
            BusyError: If other versions were promoted during each of ATTEMPTS comparisons.
        """
        tags = {**tags, DIGEST: release_digest(folder)}
        for _ in range(ATTEMPTS):
            lineage = self.checked_lineage()
            champion = lineage.champion
            same = [number for number, version in lineage.versions.items() if version.tags.get(DIGEST) == tags[DIGEST]]
            if champion is not None and champion.version in same:
                self.set_aliases(champion.number)
                return champion.version, Decision(True, "it is the champion already")
            if lineage.withdrawn.intersection(same):
                return same[-1], Decision(False, "it was withdrawn by `rollback`")
            if (tag := _withdrawn_tag(tags[DIGEST])) in lineage.model_tags:  # and then deleted in MLflow
                reason = f"it was withdrawn by `rollback`; to compare it again, delete tag {tag} of the model in MLflow"
                decision, better = Decision(False, reason), False
            else:
                decision, better = decide(champion.version if champion else None, champion.best if champion else None)
            tags |= {
                DECISION: PASSED if decision.passed else FAILED,
                REASON: decision.reason,
                REPLACES: lineage.last,
                BEST: ITSELF if champion is None or better else champion.best,
            }
            if decision.passed or not same:
                if same:
                    source, run = lineage.versions[same[-1]].source, lineage.versions[same[-1]].run_id
                else:
                    run = upload()
                    source = f"{self.client.get_run(run).info.artifact_uri}/{ARTIFACTS}"
                outcome = "Passed" if decision.passed else "Failed"
                number = self._create(source or "", run, tags, f"{outcome} the promotion rule: {decision.reason}.")
            elif (number := same[-1]) not in _numbers(lineage):  # a promotion keeps the tags with which it passed
                for name in (DECISION, REASON):
                    self.client.set_model_version_tag(self.name, number, name, tags[name])
            self.client.set_registered_model_alias(self.name, CHALLENGER, number)
            if not decision.passed:
                return number, decision
            self.set_aliases(number)
            if number in _numbers(self.lineage()):
                return number, decision
            log.info("another version was promoted meanwhile: comparing version %s again", number)
        raise BusyError(f"other versions were promoted during {ATTEMPTS} comparisons; try again")

    def roll_back(self, to: str | None = None) -> tuple[list[str], str]:
        """Make an earlier version champion, even if other versions are promoted at the same time.

        Args:
            to: A version that passed the promotion rule; None: the previous champion.

        Returns:
            Versions that were withdrawn, and the champion.

        Raises:
            RegistryError: If there is no such version, or (without `to`) something was changed by hand in MLflow.
        """
        lineage, reason = self.lineage(), "named by `rollback --to`"
        if to is None:
            champions = self.checked_lineage().champions
            if len(champions) < 2:
                raise RegistryError(f"{self.name} has no champion before the present one")
            to, reason = champions[-2].version, f"version {champions[-1].version} was withdrawn"
        if to not in lineage.passed:
            passed = ", ".join(lineage.passed) or "none"
            raise RegistryError(
                f"version {to} of {self.name} is missing or did not pass the promotion rule; these did: {passed}"
            )
        version, model = lineage.versions[to], self.client.get_registered_model(self.name)
        best = str(model.aliases.get(BEST, ITSELF))  # versions of 0.1.0 have no tag for it
        tags = {BEST: best, **version.tags, RESTORES: to, REASON: reason}
        tags = {name: value for name, value in tags.items() if name not in (REPLACES, SHOWN)}
        if tags[BEST] not in lineage.versions:
            tags[BEST] = ITSELF
        description = f"Rollback to version {to}: {reason}."
        number, withdrawn = self._create(version.source or "", version.run_id, tags, description), list[str]()
        try:
            self.set_aliases(number)
            after = self.lineage()
            withdrawn = sorted(after.withdrawn - lineage.withdrawn, key=int)
            self._tag_withdrawn(after, to, model.tags)
        except (MlflowException, RequestException) as error:  # repeating the command would withdraw one more version
            reason = f"its aliases or the tags of withdrawn versions are incomplete ({errors.root_cause(error)})"
            remedy = f"`smaller-student rollback --to {to}` completes them"
            log.warning("version %s is champion again, but %s; %s", to, reason, remedy)
        return withdrawn, to

    def _tag_withdrawn(self, lineage: Lineage, champion: str, present: Mapping[str, str]) -> None:
        """Tag the model with the withdrawn releases, since their versions may be deleted in MLflow later."""
        digests = {number: version.tags.get(DIGEST, "") for number, version in lineage.versions.items()}
        restored = _withdrawn_tag(digests[champion])
        for number in sorted(lineage.withdrawn & digests.keys(), key=int):
            if (tag := _withdrawn_tag(digests[number])) != restored and tag not in present:
                self.client.set_registered_model_tag(self.name, tag, f"version {number}")
        if restored in present:
            self.client.delete_registered_model_tag(self.name, restored)

    def _create(self, source: str, run: str | None, tags: dict[str, str], description: str) -> str:
        with contextlib.suppress(MlflowException):  # the model exists
            text = "ONNX files for image retrieval. `champion` is in use, `challenger` was published last."
            self.client.create_registered_model(self.name, description=text)
        return str(self.client.create_model_version(self.name, source, run, tags, description=description).version)

    def set_aliases(self, number: str) -> None:
        """Set the aliases to the present champion and best version, and tag version `number` as shown."""
        shown: Promotion | None = None
        while (champion := self.lineage().champion) is not None and champion != shown:  # repeat if it changed meanwhile
            for alias, version in ((CHAMPION, champion.version), (BEST, champion.best)):
                self.client.set_registered_model_alias(self.name, alias, version)
            self.client.set_registered_model_tag(self.name, PROMOTED, champion.number)
            shown = champion
        self.client.set_model_version_tag(self.name, number, SHOWN, "yes")


def _numbers(lineage: Lineage) -> list[str]:
    return [promotion.number for promotion in lineage.promotions]


def _withdrawn_tag(digest: str) -> str:
    """Return the tag of a registered model that keeps a withdrawn release out, even if its version was deleted."""
    return f"withdrawn.{digest[:16]}"
