"""Batches of augmented training images."""

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

AUGMENT = Augment(flip=0.5, pad=3, erase=0.5, erase_area=0.2)
INDICES, LABELS = np.array([11, 2, 3, 4, 5, 6, 7, 8, 9, 10]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
UNLABELLED = np.array([12, 13, 14, 15, 16])


class Pictures:
    """Random pixels by index."""

    pixels = np.random.default_rng(0).integers(0, 256, (17, 16, 20, 3), dtype=np.uint8)

    def batch(self, indices):
        return self.pixels[indices]


def loader(workers=0, batch=(2, 2), rank=0, world=1, **settings):
    sizes = Batch(identities=batch[0], instances=batch[1])
    return TrainLoader(Pictures(), INDICES, LABELS, sizes, AUGMENT, 5, workers, rank, world, **settings)


def test_a_batch_equals_its_images_augmented_one_by_one():
    batches = list(loader().epoch(3))
    assert len(batches) == len(loader()) == 3
    for images, labels, indices, views in batches:
        assert images.shape == (4, 3, 16, 20) and images.dtype == torch.uint8 and images.is_contiguous()
        assert labels.dtype == indices.dtype == views.dtype == torch.int64
        assert views.tolist() == [3] * 4
        for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
            assert LABELS[INDICES.tolist().index(index)] == label
            plain = as_tensor(Pictures.pixels[[index]])[0]
            assert torch.equal(image, augment(plain[None], AUGMENT, 5, [(3, index)])[0])


def test_the_first_hundred_batches_are_the_same_for_any_number_of_workers():
    def digest(workers):
        sha256, batches = hashlib.sha256(), loader(workers, unlabelled=UNLABELLED, others=3, views=2)
        endless = (batch for epoch in itertools.count() for batch in batches.epoch(epoch))
        for batch in itertools.islice(endless, 100):
            for tensor in batch:
                sha256.update(tensor.numpy().tobytes())
        return sha256.hexdigest()

    assert digest(0) == digest(1) == digest(4)


def test_loading_does_not_draw_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader().epoch(0))
    assert torch.equal(torch.rand(1), expected)


def test_an_unfinished_epoch_does_not_change_the_next():
    expected = [batch.indices.tolist() for batch in loader().epoch(1)]
    unfinished = loader()
    next(unfinished.epoch(0))
    assert [batch.indices.tolist() for batch in unfinished.epoch(1)] == expected


def test_class_numbers_are_positions_in_the_sorted_identities(tmp_path: Path, picture):
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
    ((pixels, labels, indices, _),) = training_loader(manifest, images, training, params).epoch(0)
    assert sorted(zip(indices.tolist(), labels.tolist(), strict=True)) == [(1, 0), (2, 1), (4, 0), (5, 1)]
    assert torch.equal(pixels, as_tensor(images.batch(indices.numpy())))


@pytest.mark.parametrize("world", [2, 3])
def test_all_processes_have_the_same_number_of_batches(world):
    assert len({len(list(loader(rank=rank, world=world).epoch(0))) for rank in range(world)}) == 1


@pytest.mark.parametrize("views", [0, 2])
def test_images_without_labels_stand_behind_the_others_and_leave_them_as_they_are(views):
    plain, mixed = loader(views=views), loader(views=views, unlabelled=UNLABELLED, others=7)
    for epoch in (0, 3):
        for batch, more in zip(plain.epoch(epoch), mixed.epoch(epoch), strict=True):
            assert torch.equal(batch.labels, more.labels) and len(batch.labels) == len(batch.images) == 4
            assert len(more.images) == len(more.indices) == len(more.views) == 11
            for name in ("images", "indices", "views"):
                assert torch.equal(getattr(batch, name), getattr(more, name)[:4])


@pytest.mark.parametrize("world", [1, 2])
def test_images_without_labels_are_drawn_equally_often_from_all_images(world):
    loaders = [loader(rank=rank, world=world, unlabelled=UNLABELLED, others=5) for rank in range(world)]
    steps = [step for epoch in range(3) for step in zip(*(part.epoch(epoch) for part in loaders), strict=True)]
    drawn = torch.stack([batch.indices[4:] for step in steps for batch in step][: 3 * 2]).reshape(2, 15)
    views = torch.stack([batch.views[4:] for step in steps for batch in step][: 3 * 2]).reshape(2, 15)
    for number in range(2):  # two passes over fifteen images
        assert sorted(drawn[number].tolist()) == sorted([*INDICES, *UNLABELLED])
        assert set(views[number].tolist()) == {-1 - number}
    assert drawn[0].tolist() != drawn[1].tolist()


def test_views_take_turns_and_each_is_one_augmentation():
    batches, seen = loader(unlabelled=UNLABELLED, others=8, views=2), {}
    for epoch in range(6):
        for images, _, indices, views in batches.epoch(epoch):
            assert set(views[:4].tolist()) == {epoch % 2}
            for image, key in zip(images, zip(indices.tolist(), views.tolist(), strict=True), strict=True):
                assert torch.equal(image, seen.setdefault(key, image))
    assert len(seen) == 2 * 15
    for view, workers in ((0, 0), (1, 0), (1, 2)):
        loading = loader(workers, unlabelled=UNLABELLED, others=8, views=2)
        stored = [(indices.tolist(), images) for indices, images in loading.view(view)]
        assert [index for indices, _ in stored for index in indices] == [*INDICES, *UNLABELLED]
        for indices, images in stored:
            for index, image in zip(indices, images, strict=True):
                assert torch.equal(image, seen[index, view])
