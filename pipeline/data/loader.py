"""Training batches: sampled, augmented, and identical for any number of workers."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.config import Augment, Params, Student, Training
from pipeline.data.augment import as_tensor, augment
from pipeline.data.images import Images
from pipeline.data.manifest import UNLABELLED, Indices, Manifest
from pipeline.data.sampler import IdentitySampler, ShuffledSampler


class TrainBatch(NamedTuple):
    """Augmented images; the first L of them have labels.

    Attributes:
        images: (B, 3, H, W) uint8.
        labels: (L,) int64, class numbers.
        indices: (B,) int64, in the manifest.
        views: (B,) int64; with the seed and its index, the view of an image determines its augmentation.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    views: Tensor


VIEW_BATCH = 64
"""Images in a batch of `TrainLoader.view`."""

View = tuple[int, int]
"""(view, index in the manifest): with the seed, it determines an augmented image."""


class _AugmentedBatches(Dataset[TrainBatch]):
    """Batches of augmented images by their views; stateless, so persistent workers serve every epoch."""

    def __init__(self, images: Images, class_numbers: Indices, labelled: int, settings: Augment, seed: int) -> None:
        self.images, self.class_numbers, self.labelled = images, class_numbers, labelled
        self.settings, self.seed = settings, seed

    def __getitem__(self, samples: list[View]) -> TrainBatch:
        views, indices = np.array(samples, np.int64).T
        plain = as_tensor(self.images.batch(indices))
        return TrainBatch(
            images=augment(plain, self.settings, self.seed, samples),
            labels=torch.from_numpy(self.class_numbers[indices[: self.labelled]]),
            indices=torch.from_numpy(indices.copy()),
            views=torch.from_numpy(views.copy()),
        )


class _BatchSampler(Sampler[list[View]]):
    """Puts images of a `ShuffledSampler` behind those of an `IdentitySampler`, and chooses their views.

    Args:
        views: Number of views of each image, which take turns; 0 for a new view at each use.
    """

    def __init__(
        self, labelled: IdentitySampler, train: Indices, others: ShuffledSampler | None, pool: Indices, views: int
    ) -> None:
        self.labelled, self.others, self.epoch = labelled, others, 0
        self._train, self._pool, self._views = train, pool, views

    def __len__(self) -> int:
        return len(self.labelled)

    def __iter__(self) -> Iterator[list[View]]:
        return self._batches(self.epoch)  # bound now: batches are drawn lazily

    def _batches(self, epoch: int) -> Iterator[list[View]]:
        for step, positions in enumerate(self.labelled.batches(epoch)):
            batch = [(epoch % self._views if self._views else epoch, index) for index in self._train[positions].tolist()]
            if self.others is not None:
                passes, drawn = self.others.batch(epoch * len(self) + step)
                # Numbers below zero, so that they differ from the views of the images with labels.
                views = passes % self._views if self._views else -1 - passes
                batch += zip(views.tolist(), self._pool[drawn].tolist(), strict=True)
            yield batch


class TrainLoader:
    """P x K batches of augmented training images, perhaps with further images behind them.

    Args:
        images: All images of the manifest.
        sampler: Draws the images of each batch.
        pool: Indices in the manifest of all images that it may draw.
        class_numbers: (N,) class number by index in the manifest.
        labelled: L, images with labels in a batch.
        workers: Loading processes; 0 loads in this process.
    """

    def __init__(
        self,
        images: Images,
        sampler: _BatchSampler,
        pool: Indices,
        class_numbers: Indices,
        labelled: int,
        settings: Augment,
        seed: int,
        workers: int,
    ) -> None:
        self._sampler, self._pool = sampler, pool
        self._batches = _AugmentedBatches(images, class_numbers, labelled, settings, seed)
        self._loader: DataLoader[TrainBatch] = DataLoader(
            self._batches,
            sampler=self._sampler,
            batch_size=None,  # the sampler yields whole batches
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise loading would draw from the global generator
        )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._sampler)

    def view(self, view: int) -> Iterator[TrainBatch]:
        """Yield one view of all images that `epoch` may yield, in the order of the manifest."""
        for start in range(0, len(self._pool), VIEW_BATCH):
            yield self._batches[[(view, index) for index in self._pool[start : start + VIEW_BATCH].tolist()]]

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        """Yield the batches of an epoch, counted from 0."""
        self._sampler.epoch = epoch
        yield from self._loader


def training_loader(
    manifest: Manifest, images: Images, training: Training, params: Params, rank: int = 0, world: int = 1
) -> TrainLoader:
    """Build the loader of split `train`; an identity's class number is its position in `manifest.train_identities`.

    The student may see images of split `unlabelled` as well: `student.batch.unlabelled` in each batch.
    """
    train, seed = manifest.indices("train"), params.seed
    class_numbers = np.full(len(manifest), -1, np.int64)
    class_numbers[train] = np.searchsorted(np.array(manifest.train_identities), manifest.identities(train))
    labelled = IdentitySampler(class_numbers[train], training.batch, seed, rank, world)
    pool = np.concatenate([train, manifest.indices(UNLABELLED)])
    count, views = (training.batch.unlabelled, training.distill.views) if isinstance(training, Student) else (0, 0)
    others = ShuffledSampler(len(pool), count, seed, rank, world) if count else None
    sampler = _BatchSampler(labelled, train, others, pool, views)
    size = training.batch.identities * training.batch.instances
    return TrainLoader(images, sampler, pool, class_numbers, size, training.augment, seed, params.runtime.workers)
