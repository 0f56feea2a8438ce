"""Compare a challenger with the champion and the best version so far, on the test set of this checkout."""

import hashlib
import logging
from pathlib import Path

import numpy as np

from pipeline.config import Params
from pipeline.data.images import Images, data_root
from pipeline.data.manifest import TEST, Manifest
from pipeline.data.splits import draw_test
from pipeline.export.embed import embed, fixed_batch
from pipeline.export.model import Model, open_model
from pipeline.export.release import STUDENT
from pipeline.files import Files
from pipeline.inference.timing import gains
from pipeline.protocols import JUNK
from pipeline.registry.errors import RegistryError
from pipeline.registry.model_registry import Registry
from pipeline.registry.policy import Comparison, Decision, decide, difference
from pipeline.retrieval import scoring
from pipeline.retrieval.evaluate import sides
from pipeline.retrieval.metrics import Retrieval
from pipeline.runtime import limit_threads

log = logging.getLogger(__name__)

TEST_SET, SPLIT = "test_set", "split"
"""Tags of a version: digests of the test set of its comparison, and of the split that kept it out of training."""


class PromotionPolicy:
    """Applies the promotion rule, with the limits of section `tracking.promotion`, to one challenger.

    Args:
        folder: Release of the challenger.

    Raises:
        RegistryError: If the challenger was trained on another manifest, so its training set may hold test identities.
    """

    def __init__(self, files: Files, params: Params, registry: Registry, folder: Path) -> None:
        self._files, self._params, self._registry, self._folder = files, params, registry, folder
        self._manifest = Manifest.read(files.manifest, data_root(files, params))
        self._scores: dict[str, Retrieval] = {}
        self.tags = {TEST_SET: self._test_set(), SPLIT: self._split()}
        if open_model(folder / STUDENT).metadata.data_digest != self._manifest.digest:
            raise RegistryError(
                f"{folder} was trained on another manifest than {files.manifest}, maybe on identities of its test set; "
                "run `dvc repro`, or publish it from the checkout that trained it"
            )

    def __call__(self, champion: str | None, best: str | None) -> tuple[Decision, bool]:
        """Return the decision, and whether the challenger has the best mAP so far; see `Decide`.

        Raises:
            RegistryError: If `champion` or `best` may have been trained on identities of the test set.
        """
        names = {} if champion is None else {"the champion": champion}
        if best is not None and best != champion:
            names["the best version"] = best
        for version in names.values():
            self._check_not_trained_on_test(version)
        limit_threads(self._params.runtime.threads)  # as stage `benchmark` times
        rivals = {name: self._compare(version, timed=version == champion) for name, version in names.items()}
        limits = self._params.tracking.promotion
        decision = decide(rivals, limits.margin, limits.max_size_ratio, limits.max_latency_ratio)
        best_rival = rivals.get("the best version") or rivals.get("the champion")
        return decision, best_rival is None or best_rival.map.mean > 0

    def _compare(self, version: str, timed: bool) -> Comparison:
        folder = self._registry.cached_download(version, self._files.tracking / "models")
        new, old = open_model(self._folder / STUDENT), open_model(folder / STUDENT)
        queries = len(self._manifest.indices("query"))
        gap = difference(self._evaluate("", new), self._evaluate(version, old), queries)
        size_ratio = (self._folder / STUDENT).stat().st_size / (folder / STUDENT).stat().st_size
        latency_ratio = None
        batch = common_batch(new, old)
        # Another image size or another fixed batch was chosen on purpose.
        if timed and new.metadata.image_size == old.metadata.image_size and batch is not None:
            contents = {
                "champion": (folder / STUDENT).read_bytes(),
                "challenger": (self._folder / STUDENT).read_bytes(),
            }
            gain = gains(contents, "champion", new.metadata.image_size, batch)["challenger"]
            latency_ratio = 1 / gain.high  # lower end of the interval: timing noise rejects no challenger
        log.info("difference to version %s: mAP %+.4f (%+.4f to %+.4f)", version, gap.mean, gap.low, gap.high)
        return Comparison(gap, size_ratio, latency_ratio)

    def _evaluate(self, version: str, model: Model) -> Retrieval:
        """Evaluate a model once per version; images are read from their files, since input sizes may differ."""
        if version not in self._scores:
            indices = np.concatenate([self._manifest.indices(split) for split in TEST])
            images = Images(self._manifest, model.metadata.image_size, None)
            vectors = embed(model.session, images, indices, model.metadata.mean, model.metadata.std)
            protocol = self._params.data.protocol
            self._scores[version] = scoring.evaluate(protocol, *sides(vectors, self._manifest, *TEST, protocol))
        return self._scores[version]

    # --- leakage ------------------------------------------------------------------------------------------------------

    def _check_not_trained_on_test(self, version: str) -> None:
        """Check the digests recorded with a version: its test set or its split must be that of this checkout.

        The same split may give a larger test set, but never moves an identity between training and test set. Images
        without labels that get labels later, and so may come into the test set, are not recognised. Versions of 0.1.0
        have no tag `split` and are compared on the same test set only.

        Raises:
            RegistryError: If both digests differ.
        """
        recorded = self._registry.tags(version)
        if all(recorded.get(name) != digest for name, digest in self.tags.items()):
            test, split = recorded.get(TEST_SET), recorded.get(SPLIT)
            raise RegistryError(
                f"version {version} may have been trained on identities of this test set: it was published with test "
                f"set {test} and split {split}, here they are {self.tags[TEST_SET]} and {self.tags[SPLIT]}; restore "
                f"the `seed` and `data` of its commit {recorded.get('commit')}, or set another `tracking.model_name`"
            )

    def _test_set(self) -> str:
        """Return a digest of queries and gallery: images, labels, protocol, and identities that were trained on."""
        items = (self._manifest.items[index] for index in self._manifest.indices(*TEST))
        images = (f"{i.split} {i.name} {i.identity} {i.camera}" for i in items)
        return _digest(self._params.data.protocol, *images, *self._seen())

    def _seen(self) -> list[str]:
        """Return the identities of the test set that were trained on: open and closed sets are never compared."""
        seen = sorted(self._manifest.test_identities.intersection(self._manifest.train_identities))
        return ["seen", *seen] if seen else []

    def _split(self) -> str:
        """Return a digest of what assigns identities to the training set, whatever images there are.

        Published data sets: the name, since their authors fixed the lists (the three test sets of VehicleID share one
        training list). The rendered set: seed and number of training identities, which come before the test
        identities, and the number of these if the student learned from the vehicles without labels behind them.
        Folder or table: seed and `data.custom.test` if they reproduce the manifest, because each identity is then
        assigned by its name alone (`draw_test`). A table with its own splits may move an identity at any time, so its
        test identities themselves are hashed.
        """
        data, seed = self._params.data, self._params.seed
        if data.source == "vehicles":
            sizes = data.vehicles
            unlabelled = sizes.unlabelled_identities and self._params.student.batch.unlabelled
            return _digest(data.source, seed, sizes.train_identities, *([sizes.test_identities] if unlabelled else []))
        if data.source not in ("folder", "csv"):
            return _digest(data.source)
        everyone, tested = self._manifest.known_identities - {JUNK}, self._manifest.test_identities
        if draw_test(everyone, data.custom.test, seed) == tested:
            return _digest("drawn", seed, data.custom.test)
        return _digest("listed", *sorted(tested), *self._seen())


def common_batch(*models: Model) -> int | None:
    """Return the number of images in a call that both take: 1 if they take any, None if they fix different ones."""
    fixed = {size for model in models if (size := fixed_batch(model.session)) is not None}
    return None if len(fixed) > 1 else max(fixed, default=1)


def _digest(*values: object) -> str:
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:12]
