"""Training batches: sampled, augmented, and identical for any number of workers."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.config import Augment, Batch, Params, Training
from pipeline.data.augment import as_tensor, augment
from pipeline.data.images import Images
from pipeline.data.manifest import Indices, Manifest
from pipeline.data.sampler import IdentitySampler, Sample

TrainBatch = tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, H, W) uint8, labels (B,) int64 and indices in the manifest (B,) int64."""


class _AugmentedBatches(Dataset[TrainBatch]):
    """Batches of augmented images by (epoch, index) pairs; stateless, so persistent workers serve every epoch."""

    def __init__(self, images: Images, indices: Indices, labels: Indices, settings: Augment, seed: int) -> None:
        self.images, self.indices, self.labels, self.settings, self.seed = images, indices, labels, settings, seed

    def __getitem__(self, samples: list[Sample]) -> TrainBatch:
        epochs, positions = zip(*samples, strict=True)
        indices = self.indices[list(positions)]
        plain = as_tensor(self.images.batch(indices))
        augmented = augment(plain, self.settings, self.seed, zip(epochs, indices.tolist(), strict=True))
        return augmented, torch.from_numpy(self.labels[list(positions)]), torch.from_numpy(indices)


class TrainLoader:
    """P x K batches of augmented training images.

    Args:
        images: All images of the manifest.
        indices: (N,) indices in the manifest of the images to train on.
        labels: (N,) class numbers of these images.
        workers: Loading processes; 0 loads in this process.
        rank: Number of this training process, from 0.
        world: Number of training processes.
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
    ) -> None:
        self._sampler = IdentitySampler(labels, batch, seed, rank, world)
        self._loader: DataLoader[TrainBatch] = DataLoader(
            _AugmentedBatches(images, np.asarray(indices, np.int64), np.asarray(labels, np.int64), settings, seed),
            sampler=self._sampler,
            batch_size=None,  # the sampler yields whole batches
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise loading would draw from the global generator
        )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        """Yield the batches of an epoch, counted from 0."""
        self._sampler.set_epoch(epoch)
        yield from self._loader


def training_loader(
    manifest: Manifest, images: Images, training: Training, params: Params, rank: int = 0, world: int = 1
) -> TrainLoader:
    """Build the loader of split `train`; an identity's class number is its position in `manifest.train_identities`."""
    indices = manifest.indices("train")
    labels = np.searchsorted(np.array(manifest.train_identities), manifest.identities(indices))
    return TrainLoader(
        images, indices, labels, training.batch, training.augment, params.seed, params.runtime.workers, rank, world
    )
