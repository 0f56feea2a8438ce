"""Which model is in use: versions of a release in MLflow's registry, and a ledger of promotions.

MLflow moves an alias without asking what it pointed at, so two who promote at once could undo one another's choice. A
promotion is therefore a line in a ledger: a version of a second registered model, `NAME-promotions`, which the server
numbers. Each line names the one that it follows; a line that does not follow the last valid one was overtaken and
counts for nothing. Aliases only show what the ledger says, and whoever comes next sets right what a crash left behind.
"""

import contextlib
import hashlib
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow.artifacts
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.export.model import open_model
from pipeline.export.release import STUDENT, SUMS, ReleaseError
from pipeline.export.sample import check_release
from pipeline.files import Files, read_json
from pipeline.ops.locks import Busy
from pipeline.retrieval.gate import Verdict

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER, BEST = "champion", "challenger", "best"
ARTIFACTS = "export"
"""Folder of a release in a run's artifacts."""
ATTEMPTS = 5
"""How often a challenger is judged, where others promote at the same time."""
DIGEST = "release_digest"
"""Tag of a version: SHA-256 of its SHA256SUMS."""


class RegistryError(RuntimeError):
    """The registry has not what was asked for."""

    exit_code = 3


@dataclass(frozen=True)
class Promotion:
    """A valid line of the ledger.

    Attributes:
        number: Of the line.
        version: That is in use from then on.
        best: Version with the best mAP until then.
        action: `promote` or `rollback`.
        reason: In one sentence.
        when: In UTC.
    """

    number: int
    version: str
    best: str
    action: str
    reason: str
    when: datetime

    @classmethod
    def of(cls, line: ModelVersion) -> "tuple[int, Promotion] | None":
        """Number of the line that it follows, and the promotion; None if somebody else made this version."""
        tags = line.tags
        try:
            when = datetime.fromtimestamp(line.creation_timestamp / 1000, UTC)
            version, best, action, reason = (tags[name] for name in ("version", "best", "action", "reason"))
            return int(tags["follows"]), cls(int(line.version), version, best, action, reason, when)
        except (KeyError, ValueError):
            return None


class Registry:
    """Versions of one model and who is in use.

    Args:
        client: Of MLflow.
        name: Of the model.
    """

    def __init__(self, client: MlflowClient, name: str) -> None:
        self.client, self.name, self.ledger_name = client, name, f"{name}-promotions"

    # --- versions -----------------------------------------------------------------------------------------------------

    def _models(self) -> None:
        """Create the registered models where they are missing."""
        texts = {
            self.name: "ONNX files for image retrieval; `champion` is in use, `challenger` was published last.",
            self.ledger_name: f"Ledger: each version is a promotion of {self.name}, kept by `smaller-student`.",
        }
        for name, text in texts.items():
            with contextlib.suppress(MlflowException):  # it is there
                self.client.create_registered_model(name, description=text)

    def _all(self, name: str) -> list[ModelVersion]:
        found: list[ModelVersion] = []
        token: str | None = None
        while True:
            page = self.client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda one: int(one.version))

    def publish(self, folder: Path, run: Callable[[], str], tags: dict[str, str]) -> str:
        """Register a release as `challenger`; one that is there already is not doubled.

        Args:
            folder: The release on this machine.
            run: Returns the id of a run that has it among its artifacts.
            tags: What is told about it.

        Returns:
            The version.
        """
        self._models()
        digest = release_digest(folder)
        version = next((one.version for one in self._all(self.name) if one.tags.get(DIGEST) == digest), None)
        if version is None:
            holder = run()
            source = f"{self.client.get_run(holder).info.artifact_uri}/{ARTIFACTS}"
            version = self.client.create_model_version(self.name, source, holder, {**tags, DIGEST: digest}).version
        self.client.set_registered_model_alias(self.name, CHALLENGER, version)
        return str(version)

    def version_of(self, alias: str) -> str:
        """Version behind an alias (that of the ledger, for `champion`), or a version itself.

        Raises:
            RegistryError: If there is none.
        """
        if alias == CHAMPION:
            lines = self.ledger()
            if lines:
                return lines[-1].version
        elif alias.isdecimal():
            return alias
        else:
            with contextlib.suppress(MlflowException):
                return str(self.client.get_model_version_by_alias(self.name, alias).version)
        raise RegistryError(f"{self.name} has no `{alias}`; `smaller-student publish` makes one")

    def fetched(self, version: str, models: Path) -> Path:
        """Folder of a version's files, fetched at the first call: versions of all servers may lie side by side.

        Args:
            version: Which.
            models: Where they lie, each named after its hash.
        """
        folder = models / self.client.get_model_version(self.name, version).tags.get(DIGEST, "unknown")[:16]
        if not folder.is_dir():
            self.download(version, folder)
        return folder

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
                written = self.client.get_model_version(self.name, version).tags.get(DIGEST)
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

    # --- who is in use ------------------------------------------------------------------------------------------------

    def ledger(self) -> list[Promotion]:
        """Valid promotions, the first one first."""
        valid: list[Promotion] = []
        for follows, line in filter(None, map(Promotion.of, self._all(self.ledger_name))):
            if follows == (valid[-1].number if valid else 0):
                valid.append(line)
        return valid

    def write(self, action: str, version: str, best: str, reason: str, follows: int) -> bool:
        """Write a line into the ledger.

        Args:
            action: `promote` or `rollback`.
            version: That shall be in use.
            best: That is the best until then.
            reason: In one sentence.
            follows: Number of the line that the decision was made on; 0 for none.

        Returns:
            Whether it counts: nobody else wrote in between.
        """
        source = self.client.get_model_version(self.name, version)
        tags = {"action": action, "version": version, "best": best, "reason": reason, "follows": str(follows)}
        line = self.client.create_model_version(
            self.ledger_name,
            source.source or "",
            source.run_id,
            tags,
            description=f"{action} version {version}: {reason}",
        )
        self.show()
        return any(one.number == int(line.version) for one in self.ledger())

    def show(self) -> None:
        """Let the aliases say what the ledger says."""
        last: Promotion | None = None
        while (lines := self.ledger()) and lines[-1] != last:  # another may write while this one sets them
            last = lines[-1]
            for alias, version in ((CHAMPION, last.version), (BEST, last.best)):
                self.client.set_registered_model_alias(self.name, alias, version)

    def promote(self, version: str, judge: Callable[[str | None, str | None], tuple[Verdict, bool]]) -> Verdict:
        """Let a version take the champion's place, if the gate lets it pass.

        Args:
            version: The challenger.
            judge: Compares it with champion and best (versions, None where there is none): the verdict, and whether it
                is the best now.

        Raises:
            Busy: If others promote again and again meanwhile.
        """
        self._models()
        for _ in range(ATTEMPTS):
            lines = self.ledger()
            last = lines[-1] if lines else None
            if last is not None and last.version == version:
                self.show()
                return Verdict(True, "it is the champion already")
            if version in self._withdrawn(lines):
                return Verdict(False, "it was taken back by `rollback`")
            verdict, better = judge(last.version if last else None, last.best if last else None)
            self.client.set_model_version_tag(self.name, version, "gate", "passed" if verdict.passed else "failed")
            self.client.update_model_version(self.name, version, f"Gate: {verdict.reason}.")
            if not verdict.passed:
                return verdict
            best = version if last is None or better else last.best
            if self.write("promote", version, best, verdict.reason, last.number if last else 0):
                return verdict
            log.info("another promotion came between; the gate judges anew")
        raise Busy(f"others promoted {ATTEMPTS} times meanwhile; try again")

    @staticmethod
    def _withdrawn(lines: list[Promotion]) -> set[str]:
        """Versions whose promotion was undone."""
        return {before.version for before, line in itertools.pairwise(lines) if line.action == "rollback"}

    def roll_back(self) -> tuple[str, str]:
        """Put the champion before the present one back in its place.

        Returns:
            The version that was in use, and the one that is now.

        Raises:
            RegistryError: If there was none before.
        """
        lines = self.ledger()
        stack: list[Promotion] = []
        for line in lines:
            stack = stack[:-1] if line.action == "rollback" else [*stack, line]
        if len(stack) < 2:
            raise RegistryError(f"{self.name} has no champion before the present one")
        present, before = stack[-1], stack[-2]
        best = before.best
        reason = f"version {present.version} was taken back"
        if not self.write("rollback", before.version, best, reason, lines[-1].number):
            raise Busy("another promotion came between; look at `smaller-student history` and try again")
        return present.version, before.version


def release_digest(folder: Path) -> str:
    """SHA-256 of a release's SHA256SUMS, and so of all that it names."""
    try:
        return hashlib.sha256((folder / SUMS).read_bytes()).hexdigest()
    except OSError:
        raise ReleaseError(f"{folder / SUMS} is missing; a folder without it is no release") from None


def facts(folder: Path) -> dict[str, str]:
    """What is told about a release in the registry, at a glance; its files tell the rest."""
    about = open_model(folder / STUDENT).metadata
    return {"mAP": f"{about.map:.4f} ({about.protocol})", "MACs": f"{about.macs:,}", "commit": about.git_commit[:12]}


def uploaded(client: MlflowClient, files: Files, folder: Path, experiment: str) -> str:
    """Run that has a release among its artifacts: the one that made it, or else one that is made for it.

    Args:
        client: Of MLflow.
        files: Of the checkout.
        folder: The release.
        experiment: Where to look, and to make a run.
    """
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    for run in _makers(client, files, number):
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Exception):  # MLflow's many
            sums = Path(client.download_artifacts(run, f"{ARTIFACTS}/{SUMS}", scratch))
            if sums.read_bytes() == (folder / SUMS).read_bytes():
                return run
    made = client.create_run(number, run_name="publish").info.run_id
    client.log_artifacts(made, str(folder), ARTIFACTS)
    client.set_terminated(made)
    return str(made)


def _makers(client: MlflowClient, files: Files, experiment: str) -> Iterator[str]:
    """Runs of stage `export` that may have made what lies in artifacts/export."""
    entry: Any = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        entry = read_json(files.tracking / "origins" / "export.json")["entry"]
    if entry:
        yield from (run.info.run_id for run in client.search_runs([experiment], f"tags.entry = '{entry}'"))
