"""Training batches: sampled, augmented, and the same for any number of workers."""

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

Loaded = tuple[Tensor, Tensor, Tensor]


class _AugmentedBatches(Dataset[Loaded]):
    """Augmented images by (epoch, index); stateless, so a worker needs not know which epoch it is."""

    def __init__(self, images: Images, rows: Indices, labels: Indices, augment: Augment, seed: int) -> None:
        self.images, self.rows, self.labels, self.augment, self.seed = images, rows, labels, augment, seed

    def __getitem__(self, samples: list[Sample]) -> Loaded:
        """A whole batch."""
        epochs, indices = zip(*samples, strict=True)
        rows = self.rows[list(indices)]
        plain = as_tensor(self.images.batch(rows))
        changed = augment(plain, self.augment, self.seed, zip(epochs, rows.tolist(), strict=True))
        return changed, torch.from_numpy(self.labels[list(indices)]), torch.from_numpy(rows)


class TrainLoader:
    """P x K batches of augmented training images.

    Args:
        images: Of the whole manifest.
        rows: (N,) rows of the manifest to train on.
        labels: (N,) class numbers of the rows.
        batch: P and K.
        augment: Section of params.yaml.
        seed: Of the run.
        workers: Processes that load; 0 loads in this one.
        rank: Which of the training processes this one is.
        world: Number of training processes.
    """

    def __init__(
        self,
        images: Images,
        rows: Indices,
        labels: Indices,
        batch: Batch,
        augment: Augment,
        seed: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._sampler = IdentitySampler(labels, batch, seed, rank, world)
        self._loader: DataLoader[Loaded] = DataLoader(
            _AugmentedBatches(images, np.asarray(rows, np.int64), np.asarray(labels, np.int64), augment, seed),
            sampler=self._sampler,
            batch_size=None,  # the sampler gives batches
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # of its own: the global one must not depend on how data are loaded
        )

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[Loaded]:
        """Images (B, 3, H, W) uint8, labels (B,) int64 and rows (B,) int64 of each batch of an epoch, from 0."""
        self._sampler.set_epoch(epoch)
        yield from self._loader


def training_loader(
    manifest: Manifest, images: Images, training: Training, params: Params, rank: int = 0, world: int = 1
) -> TrainLoader:
    """The loader of split `train`; the class number of an identity is its place in `manifest.train_identities`."""
    rows = manifest.indices("train")
    labels = np.searchsorted(np.array(manifest.train_identities), manifest.identities(rows))
    return TrainLoader(
        images, rows, labels, training.batch, training.augment, params.seed, params.runtime.workers, rank, world
    )
