"""Random changes, and the normalisation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Augment
from pipeline.data import augment as module
from pipeline.data.augment import ERASED_AREA, MEAN, STD, as_tensor, normalise

IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 24, 32), dtype=np.uint8))
FILL = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]


def augment(image, config, seed, epoch, row):
    return module.augment(image[None], config, seed, [(epoch, row)])[0]


def test_normalising_is_the_published_formula():
    found = normalise(IMAGE[None])
    assert found.dtype == torch.float32
    for channel in range(3):
        for y, x in ((0, 0), (5, 7), (23, 31)):
            expected = (int(IMAGE[channel, y, x]) / 255 - MEAN[channel]) / STD[channel]
            assert float(found[0, channel, y, x]) == pytest.approx(expected, abs=1e-5)


def test_pictures_become_tensors_without_a_copy_and_stay_so_in_memory():
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    tensor = as_tensor(pixels)
    assert tensor.shape == (2, 3, 4, 5) and tensor[1, 2, 3, 4] == pixels[1, 3, 4, 2]
    assert tensor.data_ptr() == pixels.ctypes.data
    assert normalise(tensor).is_contiguous(memory_format=torch.channels_last)


def test_what_fills_in_is_nothing_after_normalisation():
    assert normalise(FILL[None].expand(1, 3, 2, 2)).abs().max() < 0.01


def test_without_anything_asked_for_the_image_is_unchanged_and_a_copy():
    plain = augment(IMAGE, Augment(flip=0.0, pad=0, erase=0.0, erase_area=0.2), seed=0, epoch=0, row=0)
    assert torch.equal(plain, IMAGE) and plain.data_ptr() != IMAGE.data_ptr()


def test_a_flip_mirrors_the_image_as_often_as_asked():
    found = [augment(IMAGE, Augment(flip=0.25, pad=0, erase=0.0, erase_area=0.2), 0, 0, row) for row in range(400)]
    flipped = [torch.equal(image, IMAGE.flip(2)) for image in found]
    assert all(mirrored or torch.equal(image, IMAGE) for mirrored, image in zip(flipped, found, strict=True))
    assert 70 <= sum(flipped) <= 130


def test_pad_and_crop_reaches_every_shift_and_no_other():
    pad, seen = 2, set()
    framed = torch.cat([FILL.expand(3, 28, 2), torch.cat([FILL.expand(3, 2, 32), IMAGE, FILL.expand(3, 2, 32)], 1)], 2)
    framed = torch.cat([framed, FILL.expand(3, 28, 2)], 2)
    crops = {(y, x): framed[:, y : y + 24, x : x + 32] for y in range(5) for x in range(5)}
    for row in range(300):
        found = augment(IMAGE, Augment(flip=0.0, pad=pad, erase=0.0, erase_area=0.2), 0, 0, row)
        (place,) = (at for at, crop in crops.items() if torch.equal(crop, found))
        seen.add(place)
    assert seen == set(crops)


def test_erasing_fills_one_rectangle_with_the_mean_colour_within_the_published_bounds():
    white, areas = torch.full((3, 40, 40), 255, dtype=torch.uint8), []
    for row in range(300):
        found = augment(white, Augment(flip=0.0, pad=0, erase=1.0, erase_area=0.2), 0, 0, row)
        erased = (found == FILL).all(0)
        assert ((found == 255).all(0) | erased).all()
        high, wide = int(erased.any(1).sum()), int(erased.any(0).sum())
        assert erased.sum() == high * wide
        assert 0.2 < high / wide < 5
        areas.append(high * wide / 1600)
    assert ERASED_AREA - 0.01 <= min(areas) < 0.04 and 0.18 < max(areas) <= 0.22
    assert np.mean(areas) == pytest.approx((0.02 + 0.2) / 2, abs=0.01)


def test_erasing_happens_as_often_as_asked():
    found = [augment(IMAGE, Augment(flip=0.0, pad=0, erase=0.5, erase_area=0.2), 0, 0, row) for row in range(400)]
    assert 160 <= sum(not torch.equal(image, IMAGE) for image in found) <= 240


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 60), st.integers(0, 999))
def test_any_size_keeps_its_shape(height, width, pad, row):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    found = augment(image, Augment(flip=0.5, pad=pad, erase=1.0, erase_area=0.2), 1, 2, row)
    assert found.shape == image.shape and found.dtype == torch.uint8 and found.is_contiguous()


def test_an_image_does_not_depend_on_the_batch_that_it_is_in():
    config, keys = Augment(flip=0.5, pad=8, erase=0.5, erase_area=0.2), [(0, 3), (1, 3), (2, 7)]
    together = module.augment(IMAGE.expand(3, -1, -1, -1), config, 5, keys)
    assert all(torch.equal(image, augment(IMAGE, config, 5, *key)) for image, key in zip(together, keys, strict=True))


def test_seed_epoch_and_row_decide_and_nothing_else_does():
    config = Augment(flip=0.5, pad=8, erase=0.5, erase_area=0.2)
    keys = [(seed, epoch, row) for seed in range(3) for epoch in range(3) for row in range(3)]
    first = {key: augment(IMAGE, config, *key) for key in keys}
    np.random.default_rng().random()
    torch.rand(3)
    again = {key: augment(IMAGE, config, *key) for key in reversed(keys)}
    assert all(torch.equal(first[key], again[key]) for key in keys)
    assert len({image.numpy().tobytes() for image in first.values()}) == len(keys)
