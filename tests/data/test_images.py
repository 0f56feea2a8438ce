"""From files to pixels."""

import pickle

import numpy as np
import pytest
from PIL import Image

from pipeline.data import images
from pipeline.data.images import Images, build_cache, decode, open_rgb
from pipeline.data.manifest import DataError


def test_an_image_on_its_side_is_put_upright(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = np.asarray(open_rgb(tmp_path / "x.png"))
    assert upright.shape == (40, 20, 3)
    assert upright[:20].min() == 255 and upright[20:].max() == 0


def test_shrinking_averages_and_does_not_skip(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing: all black or all white
    Image.fromarray(stripes).save(tmp_path / "x.png")
    found = decode(tmp_path / "x.png", (8, 16))
    assert found.shape == (8, 16, 3) and found.dtype == np.uint8
    assert np.abs(found[:, 1:-1].astype(int) - 127).max() <= 8


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA"])
def test_eight_bit_modes_become_rgb(tmp_path, mode):
    name = "x.tif" if mode == "CMYK" else "x.png"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / name)
    assert np.asarray(open_rgb(tmp_path / name)).tolist() == np.full((4, 4, 3), 255).tolist()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_deeper_images_are_refused_and_not_destroyed(tmp_path, kind):
    Image.fromarray(np.arange(16, dtype=kind).reshape(4, 4)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="8 bits"):
        open_rgb(tmp_path / "x.tif")


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch, picture):
    picture(tmp_path / "x.png", 0)
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])  # decoding would fail
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    with pytest.raises(DataError, match="30 x 20 pixels exceed 599"):
        open_rgb(tmp_path / "x.png")


def test_cache_and_files_hold_the_same_pixels(manifest, tmp_path):
    build_cache(manifest, (8, 12), tmp_path / "images.npy")
    cached, decoded = Images(manifest, (8, 12), tmp_path / "images.npy"), Images(manifest, (8, 12), None)
    rows = np.array([4, 0, 0, 2])
    assert len(cached) == len(decoded) == 5
    assert cached.batch(rows).shape == (4, 8, 12, 3) and cached.batch(rows).dtype == np.uint8
    np.testing.assert_array_equal(cached.batch(rows), decoded.batch(rows))
    np.testing.assert_array_equal(cached[3], decode(tmp_path / "3.png", (8, 12)))
    np.testing.assert_array_equal(decoded[3], cached[3])
    cached.batch(rows)[:] = 0  # a copy: the cache cannot be harmed
    assert cached.batch(rows).any()


def test_the_cache_is_not_carried_to_workers_but_opened_there(manifest, tmp_path):
    build_cache(manifest, (64, 64), tmp_path / "images.npy")
    cached = Images(manifest, (64, 64), tmp_path / "images.npy")
    carried = pickle.dumps(cached)
    assert len(carried) < 64 * 64 * 3
    np.testing.assert_array_equal(pickle.loads(carried)[1], cached[1])


def test_a_cache_that_fails_leaves_nothing_behind(manifest, tmp_path):
    (tmp_path / "3.png").write_bytes(b"not an image")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="cannot identify"):
        build_cache(manifest, (8, 8), tmp_path / "images.npy")
    assert sorted(tmp_path.iterdir()) == before


def test_a_cache_of_something_else_is_refused(manifest, tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro prepare"):
        Images(manifest, (8, 8), tmp_path / "images.npy")
    build_cache(manifest, (8, 8), tmp_path / "images.npy")
    with pytest.raises(DataError, match="run prepare again"):
        Images(manifest, (8, 9), tmp_path / "images.npy")
