"""P x K batches: P identities, K images of each, so that every anchor has positives and negatives."""

import logging
from collections.abc import Iterator

import numpy as np

from pipeline.config import Batch
from pipeline.data.manifest import Indices

log = logging.getLogger(__name__)


Sample = tuple[int, int]
"""Epoch and index: all that an augmented image depends on, beside the seed."""


class IdentitySampler:
    """Draws the batches of an epoch from (seed, epoch) alone.

    An identity's images are shuffled and cut into chunks of K, the last one filled up with its first images; an
    identity of fewer than K images repeats them. Each batch takes one chunk of P different identities, so that an
    epoch shows each image about once. All batches are full, and every epoch has as many: where the chunks do not come
    out even, identities chosen at random give one more, and those with more chunks than there are batches give fewer.

    Args:
        labels: (N,) identity of each image, any integers.
        batch: P and K.
        seed: Of the run.
        rank: Which of the processes this one is; each takes every `world`-th batch.
        world: Number of processes.

    Raises:
        ValueError: If there are fewer than P identities.
    """

    def __init__(self, labels: Indices, batch: Batch, seed: int, rank: int = 0, world: int = 1) -> None:
        self._batch, self._seed, self._rank, self._world, self._epoch = batch, seed, rank, world, 0
        _, place = np.unique(labels, return_inverse=True)
        sizes = np.bincount(place)
        if len(sizes) < batch.identities:
            raise ValueError(
                f"a batch of {batch.identities} identities cannot be filled from {len(sizes)}; lower `batch.identities`"
            )
        self._images = np.split(np.argsort(place, kind="stable"), np.cumsum(sizes)[:-1])
        self._chunks = -(-sizes // batch.instances)
        per_step = batch.identities * world
        self._steps = -(-int(self._chunks.sum()) // per_step)
        if few := np.count_nonzero(sizes < batch.instances):
            log.info("%d identities have fewer than %d images, which are repeated", few, batch.instances)

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, of the next iteration, as torch's DistributedSampler does."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[Sample]]:
        """Iterate over the batches of the epoch."""
        epoch = self._epoch
        return ([(epoch, index) for index in batch.tolist()] for batch in self.batches(epoch))

    def batches(self, epoch: int) -> list[Indices]:
        """Indices (P * K,) into `labels` for each batch, the images of an identity side by side."""
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
        """P different identities for each batch of all processes; each comes about as often as it has chunks."""
        size, batches = self._batch.identities, self._steps * self._world
        due = np.minimum(self._chunks, batches)
        missing = size * batches - int(due.sum())
        while missing > 0:
            more = rng.permutation(np.flatnonzero(due < batches))[:missing]
            due[more] += 1
            missing -= len(more)
        chosen = []
        for left in range(batches, 0, -1):
            # An identity that is due in all batches that are left must be in this one; of the others, those with more
            # to come are likelier (exponential races). So the rest can always be dealt out.
            with np.errstate(divide="ignore"):
                race = np.where(due == left, -1.0, rng.exponential(size=len(due)) / due)
            winners = np.argsort(race, kind="stable")[:size]
            due[winners] -= 1
            chosen.append(rng.permutation(winners))
        return chosen
