"""P x K sampling: P identities with K images each, so that every anchor has positives and negatives in its batch."""

import logging
from functools import lru_cache

import numpy as np

from pipeline.config import Batch
from pipeline.data.manifest import Indices

log = logging.getLogger(__name__)


class IdentitySampler:
    """Draws the P x K batches of an epoch from (seed, epoch) alone.

    The images of an identity are shuffled and cut into chunks of K; the last chunk is filled up with the first images,
    and an identity with fewer than K images repeats them. A batch takes one chunk from each of P different identities,
    so an epoch shows each image about once. All batches are full and all epochs have equally many: if the chunks do not
    divide evenly, random identities contribute one chunk more, and identities with more chunks than there are batches
    contribute fewer.

    Args:
        labels: (N,) identity of each image, any integers.
        rank: Number of this process, from 0; each process takes every `world`-th batch.
        world: Number of processes.

    Raises:
        ValueError: If there are fewer than P identities.
    """

    def __init__(self, labels: Indices, batch: Batch, seed: int, rank: int = 0, world: int = 1) -> None:
        self._batch, self._seed, self._rank, self._world = batch, seed, rank, world
        _, identity = np.unique(labels, return_inverse=True)
        sizes = np.bincount(identity)
        if len(sizes) < batch.identities:
            raise ValueError(
                f"a batch of {batch.identities} identities cannot be filled from {len(sizes)}; lower `batch.identities`"
            )
        self._images = np.split(np.argsort(identity, kind="stable"), np.cumsum(sizes)[:-1])
        self._chunks = -(-sizes // batch.instances)
        self._steps = -(-int(self._chunks.sum()) // (batch.identities * world))
        if few := np.count_nonzero(sizes < batch.instances):
            log.info("%d identities have fewer than %d images, which are repeated", few, batch.instances)

    def __len__(self) -> int:
        """Return the number of batches of one process in an epoch."""
        return self._steps

    def batches(self, epoch: int) -> list[Indices]:
        """Return the batches of this process: indices (P * K,) into `labels`, grouped by identity."""
        rng = np.random.default_rng([self._seed, epoch])
        shuffled = [rng.permutation(images) for images in self._images]
        used = np.zeros(len(shuffled), np.int64)
        batches = []
        for identities in self._identities(rng):
            indices = []
            for identity in identities:
                images = shuffled[identity]
                first = used[identity] * self._batch.instances
                indices.append(images[(first + np.arange(self._batch.instances)) % len(images)])
                used[identity] += 1
            batches.append(np.concatenate(indices))
        return batches[self._rank :: self._world]

    def _identities(self, rng: np.random.Generator) -> list[Indices]:
        """Draw P different identities for each batch of all processes; an identity occurs about once for each chunk."""
        size, batches = self._batch.identities, self._steps * self._world
        remaining = np.minimum(self._chunks, batches)
        missing = size * batches - int(remaining.sum())
        while missing > 0:
            extra = rng.permutation(np.flatnonzero(remaining < batches))[:missing]
            remaining[extra] += 1
            missing -= len(extra)
        drawn = []
        for batches_left in range(batches, 0, -1):
            # An identity with as many chunks as batches are left must be drawn now, or one chunk would be lost. The
            # others are drawn without replacement, weighted by their remaining chunks (exponential races).
            with np.errstate(divide="ignore"):
                race = np.where(remaining == batches_left, -1.0, rng.exponential(size=len(remaining)) / remaining)
            winners = np.argsort(race, kind="stable")[:size]
            remaining[winners] -= 1
            drawn.append(rng.permutation(winners))
        return drawn


class ShuffledSampler:
    """Draws batches from one shuffled pass over all images after another; depends on the seed and the batch alone.

    Args:
        images: Number of images to draw from.
        count: Images in a batch.
        rank: Number of this process, from 0; each process takes every `world`-th batch.
        world: Number of processes.
    """

    def __init__(self, images: int, count: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self._images, self._count, self._seed, self._rank, self._world = images, count, seed, rank, world
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, number: int) -> tuple[Indices, Indices]:
        """Return the number of the pass (count,) and the image (count,) of the batch of this process at a step.

        Args:
            number: Steps since the start of the training.
        """
        drawn = (number * self._world + self._rank) * self._count + np.arange(self._count)
        passes, positions = np.divmod(drawn, self._images)
        images = [self._shuffled(number)[position] for number, position in zip(passes, positions, strict=True)]
        return passes, np.array(images, np.int64)

    def _shuffle(self, number: int) -> Indices:
        # Three numbers, so that no epoch of `IdentitySampler` draws from the same stream.
        return np.random.default_rng([self._seed, number, 1]).permutation(self._images)
