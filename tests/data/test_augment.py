"""Random augmentation, and the normalisation."""

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


def augment(image, config, seed, epoch, index):
    return module.augment(image[None], config, seed, [(epoch, index)])[0]


def test_normalisation_is_the_published_formula():
    normalised = normalise(IMAGE[None])
    assert normalised.dtype == torch.float32
    for channel in range(3):
        for y, x in ((0, 0), (5, 7), (23, 31)):
            expected = (int(IMAGE[channel, y, x]) / 255 - MEAN[channel]) / STD[channel]
            assert float(normalised[0, channel, y, x]) == pytest.approx(expected, abs=1e-5)


def test_images_become_channels_last_tensors_without_a_copy():
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    tensor = as_tensor(pixels)
    assert tensor.shape == (2, 3, 4, 5) and tensor[1, 2, 3, 4] == pixels[1, 3, 4, 2]
    assert tensor.data_ptr() == pixels.ctypes.data
    assert normalise(tensor).is_contiguous(memory_format=torch.channels_last)


def test_the_fill_colour_is_zero_after_normalisation():
    assert normalise(FILL[None].expand(1, 3, 2, 2)).abs().max() < 0.01


def test_with_all_augmentation_off_the_result_is_an_unchanged_copy():
    plain = augment(IMAGE, Augment(flip=0.0, pad=0, erase=0.0, erase_area=0.2), seed=0, epoch=0, index=0)
    assert torch.equal(plain, IMAGE) and plain.data_ptr() != IMAGE.data_ptr()


def test_flips_occur_with_the_given_probability():
    images = [augment(IMAGE, Augment(flip=0.25, pad=0, erase=0.0, erase_area=0.2), 0, 0, index) for index in range(400)]
    flipped = [torch.equal(image, IMAGE.flip(2)) for image in images]
    assert all(mirrored or torch.equal(image, IMAGE) for mirrored, image in zip(flipped, images, strict=True))
    assert 70 <= sum(flipped) <= 130


def test_pad_and_crop_reaches_every_shift_and_nothing_else():
    pad, seen = 2, set()
    padded = torch.cat([FILL.expand(3, 28, 2), torch.cat([FILL.expand(3, 2, 32), IMAGE, FILL.expand(3, 2, 32)], 1)], 2)
    padded = torch.cat([padded, FILL.expand(3, 28, 2)], 2)
    crops = {(y, x): padded[:, y : y + 24, x : x + 32] for y in range(5) for x in range(5)}
    for index in range(300):
        cropped = augment(IMAGE, Augment(flip=0.0, pad=pad, erase=0.0, erase_area=0.2), 0, 0, index)
        (shift,) = (shift for shift, crop in crops.items() if torch.equal(crop, cropped))
        seen.add(shift)
    assert seen == set(crops)


def test_erasing_fills_one_rectangle_with_the_mean_colour_within_the_published_bounds():
    white, areas = torch.full((3, 40, 40), 255, dtype=torch.uint8), []
    for index in range(300):
        image = augment(white, Augment(flip=0.0, pad=0, erase=1.0, erase_area=0.2), 0, 0, index)
        erased = (image == FILL).all(0)
        assert ((image == 255).all(0) | erased).all()
        height, width = int(erased.any(1).sum()), int(erased.any(0).sum())
        assert erased.sum() == height * width
        assert 0.2 < height / width < 5
        areas.append(height * width / 1600)
    assert ERASED_AREA - 0.01 <= min(areas) < 0.04 and 0.18 < max(areas) <= 0.22
    assert np.mean(areas) == pytest.approx((0.02 + 0.2) / 2, abs=0.01)


def test_erasing_occurs_with_the_given_probability():
    images = [augment(IMAGE, Augment(flip=0.0, pad=0, erase=0.5, erase_area=0.2), 0, 0, index) for index in range(400)]
    assert 160 <= sum(not torch.equal(image, IMAGE) for image in images) <= 240


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 60), st.integers(0, 999))
def test_any_size_keeps_its_shape(height, width, pad, index):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    result = augment(image, Augment(flip=0.5, pad=pad, erase=1.0, erase_area=0.2), 1, 2, index)
    assert result.shape == image.shape and result.dtype == torch.uint8 and result.is_contiguous()


def test_an_augmented_image_does_not_depend_on_its_batch():
    config, keys = Augment(flip=0.5, pad=8, erase=0.5, erase_area=0.2), [(0, 3), (1, 3), (2, 7)]
    together = module.augment(IMAGE.expand(3, -1, -1, -1), config, 5, keys)
    assert all(torch.equal(image, augment(IMAGE, config, 5, *key)) for image, key in zip(together, keys, strict=True))


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    config = Augment(flip=0.5, pad=8, erase=0.5, erase_area=0.2)
    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(3)]
    first = {key: augment(IMAGE, config, *key) for key in keys}
    np.random.default_rng().random()
    torch.rand(3)
    again = {key: augment(IMAGE, config, *key) for key in reversed(keys)}
    assert all(torch.equal(first[key], again[key]) for key in keys)
    assert len({image.numpy().tobytes() for image in first.values()}) == len(keys)
