"""The gate: a challenger against the champion and the best there ever was, on the same frozen test set."""

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config import Params
from pipeline.data.images import Images, data_root
from pipeline.data.manifest import Manifest
from pipeline.export.embed import embed
from pipeline.export.model import Model, open_model
from pipeline.export.release import STUDENT
from pipeline.files import Files
from pipeline.inference.timing import gains
from pipeline.ops.registry import Registry
from pipeline.retrieval import protocols
from pipeline.retrieval.evaluate import sides
from pipeline.retrieval.gate import Rival, Verdict, difference, judge
from pipeline.retrieval.metrics import Retrieval

log = logging.getLogger(__name__)


@dataclass
class TestSet:
    """Queries and gallery of a checkout.

    Attributes:
        files: Of the checkout; stage `prepare` has run.
        params: Of the checkout.
    """

    __test__ = False  # no test of pytest's

    files: Files
    params: Params

    @cached_property
    def manifest(self) -> Manifest:
        """All images."""
        return Manifest.read(self.files.manifest, data_root(self.files, self.params))

    @property
    def queries(self) -> int:
        """Their number."""
        return len(self.manifest.rows("query"))

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked: images, labels and protocol."""
        rows = [self.manifest.items[row] for row in self.manifest.rows("query", "gallery")]
        told = [self.params.data.protocol, *(f"{i.split} {i.path} {i.identity} {i.camera}" for i in rows)]
        return hashlib.sha256("\n".join(map(str, told)).encode()).hexdigest()

    def score(self, model: Model) -> Retrieval:
        """Let a model answer; pictures come from the files, since input sizes may differ."""
        rows = np.concatenate([self.manifest.rows("query"), self.manifest.rows("gallery")])
        images = Images(self.manifest, model.metadata.image_size, None)
        vectors = embed(model.session, images, rows, model.metadata.mean, model.metadata.std)
        protocol = self.params.data.protocol
        return protocols.evaluate(protocol, *sides(vectors, self.manifest, "query", "gallery", protocol))


@dataclass
class Gate:
    """Judges challengers of one checkout.

    Attributes:
        files: Of the checkout.
        params: Of the checkout; section `tracking.gate` has the limits.
        registry: Where rivals come from.
        folder: The challenger's release.
    """

    files: Files
    params: Params
    registry: Registry
    folder: Path

    def __post_init__(self) -> None:
        self._asked = TestSet(self.files, self.params)
        self._answers: dict[str, Retrieval] = {}

    def __call__(self, champion: str | None, best: str | None) -> tuple[Verdict, bool]:
        """The verdict, and whether the challenger is the best now.

        Args:
            champion: Version that is in use; None where there is none.
            best: Version with the best mAP there ever was.
        """
        settings = self.params.tracking.gate
        names = {} if champion is None else {"the champion": champion}
        if best is not None and best != champion:
            names["the best there was"] = best
        rivals = {name: self._rival(version, timed=version == champion) for name, version in names.items()}
        verdict = judge(rivals, settings.margin, settings.larger, settings.slower)
        beaten = rivals.get("the best there was") or rivals.get("the champion")
        return verdict, beaten is None or beaten.map.mean > 0

    def _rival(self, version: str, timed: bool) -> Rival:
        folder = self.registry.fetched(version, self.files.tracking / "models")
        ours, theirs = open_model(self.folder / STUDENT), open_model(folder / STUDENT)
        gap = difference(self._score("", ours), self._score(version, theirs), self._asked.queries)
        size = (self.folder / STUDENT).stat().st_size / (folder / STUDENT).stat().st_size
        latency = None
        if timed and ours.metadata.image_size == theirs.metadata.image_size:  # else another input was chosen on purpose
            contents = {"champion": (folder / STUDENT).read_bytes(), "challenger": (self.folder / STUDENT).read_bytes()}
            gain = gains(contents, "champion", ours.metadata.image_size)["challenger"]
            latency = 1 / gain.high  # as slow as it surely is
        log.info("against version %s: mAP %+.4f (%+.4f to %+.4f)", version, gap.mean, gap.low, gap.high)
        return Rival(gap, size, latency)

    def _score(self, version: str, model: Model) -> Retrieval:
        if version not in self._answers:
            self._answers[version] = self._asked.score(model)
        return self._answers[version]

    @property
    def test_digest(self) -> str:
        """Of the test set that decides."""
        return self._asked.digest
