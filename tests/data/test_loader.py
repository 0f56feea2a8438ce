"""Training batches."""

import hashlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config import Augment, Batch
from pipeline.data.augment import as_tensor, augment
from pipeline.data.images import Images, build_cache
from pipeline.data.loader import TrainLoader, training_loader
from pipeline.data.manifest import Item, Manifest

CHANGES = Augment(flip=0.5, pad=3, erase=0.5, erase_area=0.2)
ROWS, LABELS = np.array([11, 2, 3, 4, 5, 6, 7, 8, 9, 10]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])


class Pictures:
    """Random pixels by row."""

    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 20, 3), dtype=np.uint8)

    def batch(self, rows):
        return self.pixels[rows]


def loader(workers=0, batch=(2, 2), rank=0, world=1):
    sizes = Batch(identities=batch[0], instances=batch[1])
    return TrainLoader(Pictures(), ROWS, LABELS, sizes, CHANGES, 5, workers, rank, world)


def test_a_batch_is_what_augmenting_its_rows_one_by_one_gives():
    batches = list(loader().epoch(3))
    assert len(batches) == len(loader()) == 3
    for images, labels, rows in batches:
        assert images.shape == (4, 3, 16, 20) and images.dtype == torch.uint8 and images.is_contiguous()
        assert labels.dtype == rows.dtype == torch.int64
        for image, label, row in zip(images, labels.tolist(), rows.tolist(), strict=True):
            assert LABELS[ROWS.tolist().index(row)] == label
            plain = as_tensor(Pictures.pixels[[row]])[0]
            assert torch.equal(image, augment(plain[None], CHANGES, 5, [(3, row)])[0])


def test_the_first_hundred_batches_are_the_same_for_any_number_of_workers():
    def hashed(workers):
        found, given = hashlib.sha256(), loader(workers)
        batches = itertools.islice((batch for epoch in itertools.count() for batch in given.epoch(epoch)), 100)
        for batch in batches:
            for tensor in batch:
                found.update(tensor.numpy().tobytes())
        return found.hexdigest()

    assert hashed(0) == hashed(1) == hashed(4)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader().epoch(0))
    assert torch.equal(torch.rand(1), expected)


def test_an_epoch_that_was_left_early_does_not_touch_the_next():
    whole = [rows.tolist() for _, _, rows in loader().epoch(1)]
    left = loader()
    next(left.epoch(0))
    assert [rows.tolist() for _, _, rows in left.epoch(1)] == whole


def test_class_numbers_are_the_places_of_the_sorted_identities(tmp_path: Path, picture):
    order = [("query", "9"), ("train", "10"), ("train", "2"), ("gallery", "9"), ("train", "10"), ("train", "2")]
    items = [Item(f"{number}.png", identity, "c1", split) for number, (split, identity) in enumerate(order)]
    for number, item in enumerate(items):
        picture(tmp_path / item.path, number)
    manifest = Manifest(items, tmp_path)
    build_cache(manifest, (8, 8), tmp_path / "images.npy")
    images = Images(manifest, (8, 8), tmp_path / "images.npy")
    training = SimpleNamespace(
        batch=Batch(identities=2, instances=2), augment=Augment(flip=0.0, pad=0, erase=0.0, erase_area=0.2)
    )
    params = SimpleNamespace(seed=0, runtime=SimpleNamespace(workers=0))
    ((pixels, labels, rows),) = training_loader(manifest, images, training, params).epoch(0)
    assert sorted(zip(rows.tolist(), labels.tolist(), strict=True)) == [(1, 0), (2, 1), (4, 0), (5, 1)]
    assert torch.equal(pixels, as_tensor(images.batch(rows.numpy())))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_have_as_many_batches_each(world):
    assert len({len(list(loader(rank=rank, world=world).epoch(0))) for rank in range(world)}) == 1
