"""Training batches: sampled, augmented, and identical for any number of workers."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.config import Augment, Batch, Params, Student, Training
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


NO_IMAGES: Indices = np.zeros(0, np.int64)
VIEW_BATCH = 64
"""Images in a batch of `TrainLoader.view`."""

View = tuple[int, int]
"""(view, index in the manifest): with the seed, it determines an augmented image."""


class _AugmentedBatches(Dataset[TrainBatch]):
    """Batches of augmented images by their views; stateless, so persistent workers serve every epoch."""

    def __init__(
        self, images: Images, class_numbers: Mapping[int, int], labelled: int, settings: Augment, seed: int
    ) -> None:
        self.images, self.class_numbers, self.labelled = images, class_numbers, labelled
        self.settings, self.seed = settings, seed

    def __getitem__(self, samples: list[View]) -> TrainBatch:
        views, indices = zip(*samples, strict=True)
        return TrainBatch(
            images=augment(as_tensor(self.images.batch(list(indices))), self.settings, self.seed, samples),
            labels=torch.tensor([self.class_numbers[index] for index in indices[: self.labelled]], dtype=torch.int64),
            indices=torch.tensor(indices),
            views=torch.tensor(views),
        )


class _BatchSampler(Sampler[list[View]]):
    """Yields batches of views: P x K images with labels, and perhaps others behind them.

    Args:
        train: Indices in the manifest of the images that `labelled` draws from.
        pool: Those of the images that `others` draws from.
        views: Number of views of each image, used in rotation; 0 for a new view at each use.
    """

    def __init__(
        self, labelled: IdentitySampler, train: Indices, others: ShuffledSampler | None, pool: Indices, views: int
    ) -> None:
        self.labelled, self.others, self.epoch = labelled, others, 0
        self._train, self._pool, self._views = train, pool, views

    def __len__(self) -> int:
        return len(self.labelled)

    def __iter__(self) -> Iterator[list[View]]:
        return self._draw(self.epoch)  # bound now: batches are drawn lazily

    def _draw(self, epoch: int) -> Iterator[list[View]]:
        view = epoch % self._views if self._views else epoch
        for step, positions in enumerate(self.labelled.batches(epoch)):
            batch = [(view, index) for index in self._train[positions].tolist()]
            if self.others is not None:
                passes, drawn = self.others.batch(epoch * len(self) + step)
                # Numbers below zero, so that they differ from the views of the images with labels.
                views = passes % self._views if self._views else -1 - passes
                batch += zip(views.tolist(), self._pool[drawn].tolist(), strict=True)
            yield batch


class TrainLoader:
    """P x K batches of augmented training images, perhaps with images without labels behind them.

    Args:
        images: All images of the manifest.
        indices: (N,) indices in the manifest of the images to train on.
        labels: (N,) class numbers of these images.
        workers: Loading processes; 0 loads in this process.
        rank: Number of this training process, from 0.
        world: Number of training processes.
        unlabelled: Indices in the manifest of images without labels.
        others: Images in a batch that are drawn from all of these images and come without labels.
        views: Number of views of each image, used in rotation; 0 for a new view at each use.

    Attributes:
        pool: (M,) indices in the manifest of all images that `epoch` may yield.
    """

    def __init__(
        self,
        images: Images,
        indices: Indices,
        labels: Indices,
        batch: Batch,
        settings: Augment,
        seed: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
        *,
        unlabelled: Indices = NO_IMAGES,
        others: int = 0,
        views: int = 0,
    ) -> None:
        self.pool = np.concatenate([indices, unlabelled]) if others else indices
        labelled = IdentitySampler(labels, batch, seed, rank, world)
        shuffled = ShuffledSampler(len(self.pool), others, seed, rank, world) if others else None
        self._sampler = _BatchSampler(labelled, indices, shuffled, self.pool, views)
        class_numbers = dict(zip(indices.tolist(), labels.tolist(), strict=True))
        batches = _AugmentedBatches(images, class_numbers, batch.labelled, settings, seed)
        self._loader = _load(batches, self._sampler, workers, persistent=workers > 0)
        self._unlabelled, self._workers = _AugmentedBatches(images, {}, 0, settings, seed), workers

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._sampler)

    def view(self, view: int) -> Iterator[tuple[Indices, Tensor]]:
        """Yield one view of all images of `pool`: indices (n,) and images (n, 3, H, W) uint8."""
        samples = [(view, index) for index in self.pool.tolist()]
        batches = [samples[start : start + VIEW_BATCH] for start in range(0, len(samples), VIEW_BATCH)]
        for batch in _load(self._unlabelled, batches, self._workers):
            yield batch.indices.numpy(), batch.images

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        """Yield the batches of an epoch, counted from 0."""
        self._sampler.epoch = epoch
        yield from self._loader


def _load(
    batches: _AugmentedBatches, samples: Iterable[list[View]], workers: int, persistent: bool = False
) -> "DataLoader[TrainBatch]":
    return DataLoader(
        batches,
        sampler=samples,
        batch_size=None,  # the samples are whole batches
        num_workers=workers,
        persistent_workers=persistent,
        generator=torch.Generator(),  # otherwise loading would draw from the global generator
    )


def training_loader(
    manifest: Manifest, images: Images, training: Training, params: Params, rank: int = 0, world: int = 1
) -> TrainLoader:
    """Build the loader of split `train`; an identity's class number is its position in `manifest.train_identities`.

    The student may see images of split `unlabelled` as well: `student.batch.unlabelled` in each batch.
    """
    indices = manifest.indices("train")
    labels = np.searchsorted(np.array(manifest.train_identities), manifest.identities(indices))
    others, views = (training.batch.unlabelled, training.distill.views) if isinstance(training, Student) else (0, 0)
    return TrainLoader(
        images,
        indices,
        labels,
        training.batch,
        training.augment,
        params.seed,
        params.runtime.workers,
        rank,
        world,
        unlabelled=manifest.indices(UNLABELLED),
        others=others,
        views=views,
    )
