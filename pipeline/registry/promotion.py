"""The gate: a challenger against the champion and the best version so far, on the test set of this checkout."""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import Params
from pipeline.data.custom import UNASSIGNED
from pipeline.data.images import Images, data_root
from pipeline.data.manifest import TEST, Item, Manifest
from pipeline.data.splits import split_test
from pipeline.export.embed import embed
from pipeline.export.model import Model, open_model
from pipeline.export.release import STUDENT
from pipeline.files import Files
from pipeline.inference.timing import gains
from pipeline.protocols import JUNK
from pipeline.registry.model_registry import Registry, RegistryError
from pipeline.registry.policy import Comparison, Decision, decide, difference
from pipeline.retrieval import scoring
from pipeline.retrieval.evaluate import sides
from pipeline.retrieval.metrics import Retrieval

log = logging.getLogger(__name__)

TEST_SET, SPLIT = "test_set", "split"
"""Tags of a version: digests of the test set that it was compared on, and of what kept that apart from its training."""


class PromotionPolicy:
    """Compares one challenger.

    Args:
        files: Paths of the checkout; stage `prepare` has run.
        params: Params of the checkout; section `tracking.promotion` has the limits.
        registry: Where rivals come from.
        folder: The challenger's release.

    Raises:
        RegistryError: If the challenger was trained on another manifest, so that it may know test identities.
    """

    def __init__(self, files: Files, params: Params, registry: Registry, folder: Path) -> None:
        self._files, self._params, self._registry, self._folder = files, params, registry, folder
        self._manifest = Manifest.read(files.manifest, data_root(files, params))
        self._scores: dict[str, Retrieval] = {}
        self.tags = {TEST_SET: self._test_set(), SPLIT: self._split()}
        if open_model(folder / STUDENT).metadata.data_digest != self._manifest.digest:
            raise RegistryError(
                f"{folder} was trained on another manifest than {files.manifest}, and may know identities that test it "
                "here; run `dvc repro`, or publish it from the checkout that made it"
            )

    def __call__(self, champion: str | None, best: str | None) -> tuple[Decision, bool]:
        """The decision, and whether the challenger is the best now.

        Args:
            champion: Version that is in use; None where there is none.
            best: Version with the best mAP so far.

        Raises:
            RegistryError: If one of them may have been trained on identities of the test set.
        """
        names = {} if champion is None else {"the champion": champion}
        if best is not None and best != champion:
            names["the best there was"] = best
        for version in names.values():
            self._refuse_trained_on_test(version)
        rivals = {name: self._rival(version, timed=version == champion) for name, version in names.items()}
        limits = self._params.tracking.promotion
        decision = decide(rivals, limits.margin, limits.max_size_ratio, limits.max_latency_ratio)
        beaten = rivals.get("the best there was") or rivals.get("the champion")
        return decision, beaten is None or beaten.map.mean > 0

    def _rival(self, version: str, timed: bool) -> Comparison:
        folder = self._registry.fetched(version, self._files.tracking / "models")
        ours, theirs = open_model(self._folder / STUDENT), open_model(folder / STUDENT)
        queries = len(self._manifest.indices("query"))
        gap = difference(self._score("", ours), self._score(version, theirs), queries)
        size = (self._folder / STUDENT).stat().st_size / (folder / STUDENT).stat().st_size
        latency = None
        if timed and ours.metadata.image_size == theirs.metadata.image_size:  # else another input was chosen on purpose
            contents = {
                "champion": (folder / STUDENT).read_bytes(),
                "challenger": (self._folder / STUDENT).read_bytes(),
            }
            gain = gains(contents, "champion", ours.metadata.image_size)["challenger"]
            latency = 1 / gain.high  # as slow as it surely is
        log.info("against version %s: mAP %+.4f (%+.4f to %+.4f)", version, gap.mean, gap.low, gap.high)
        return Comparison(gap, size, latency)

    def _score(self, version: str, model: Model) -> Retrieval:
        """Evaluate a model once; images come from the files, since input sizes may differ."""
        if version not in self._scores:
            rows = np.concatenate([self._manifest.indices(split) for split in TEST])
            images = Images(self._manifest, model.metadata.image_size, None)
            vectors = embed(model.session, images, rows, model.metadata.mean, model.metadata.std)
            protocol = self._params.data.protocol
            self._scores[version] = scoring.evaluate(protocol, *sides(vectors, self._manifest, *TEST, protocol))
        return self._scores[version]

    # --- nobody may have been trained on the test set -----------------------------------------------------------------

    def _refuse_trained_on_test(self, version: str) -> None:
        """Compare what was recorded with a version.

        Either the test set is the same, image by image, or it grew by the same split, which moves no identity from one
        side to the other. Versions of 0.1.0 have no tag `split`: they are compared on the same test set only.
        """
        recorded = self._registry.tags(version)
        if all(recorded.get(name) != digest for name, digest in self.tags.items()):
            test, split = recorded.get(TEST_SET), recorded.get(SPLIT)
            raise RegistryError(
                f"version {version} may have been trained on identities of this test set: it was published with test "
                f"set {test} and split {split}, here they are {self.tags[TEST_SET]} and {self.tags[SPLIT]}; go back to "
                f"the `seed` and the `data` of its commit {recorded.get('commit')}, or begin anew with another "
                "`tracking.model_name`"
            )

    def _test_set(self) -> str:
        """Digest of queries and gallery: images, labels and protocol."""
        items = (self._manifest.items[row] for row in self._manifest.indices(*TEST))
        return _digest(self._params.data.protocol, *(f"{i.split} {i.path} {i.identity} {i.camera}" for i in items))

    def _split(self) -> str:
        """Digest of what decides which identities are trained on, while images come and go.

        Published sets: their name alone, since their authors fixed the lists (the three test sets of VehicleID share
        one training list). The rendered set: seed and number of training identities; those that test follow them. Data
        of one's own: seed and `data.custom.test`, where these explain the manifest, because the side of an identity is
        then drawn from its name alone (`split_test`). A table that gives splits itself may move an identity at any
        time, so its test identities must stay the same.
        """
        data, seed = self._params.data, self._params.seed
        if data.source == "vehicles":
            return _digest(data.source, seed, data.vehicles.train_identities)
        if data.source not in ("folder", "csv"):
            return _digest(data.source)
        items = self._manifest.items
        drawn = split_test([replace(item, split=UNASSIGNED) for item in items], data.custom.test, seed, data.protocol)
        if _tested(drawn) == _tested(items):
            return _digest("drawn", seed, data.custom.test)
        return _digest("listed", *sorted(_tested(items)))


def _tested(items: Iterable[Item]) -> set[str]:
    return {item.identity for item in items if item.split in TEST} - {JUNK}


def _digest(*values: object) -> str:
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:12]
