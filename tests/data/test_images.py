"""From files to pixels."""

import pickle

import numpy as np
import pytest
from PIL import Image

from pipeline.data import images
from pipeline.data.images import Images, build_cache, decode, opened, upright_rgb
from pipeline.data.manifest import DataError


def open_rgb(path):
    with opened(path) as image:
        return upright_rgb(image)


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


def palette(transparent=None):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


GOLDEN = {
    "L": (Image.new("L", (4, 4), 77), "png", (77, 77, 77)),
    "1": (Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
    "P": (palette(), "png", (200, 100, 50)),
    "P, transparent": (palette(1), "png", (255, 255, 255)),
    "LA": (Image.new("LA", (4, 4), (10, 0)), "png", (255, 255, 255)),
    "LA, opaque": (Image.new("LA", (4, 4), (10, 255)), "png", (10, 10, 10)),
    "RGB": (Image.new("RGB", (4, 4), (1, 2, 3)), "png", (1, 2, 3)),
    "RGBA": (Image.new("RGBA", (4, 4), (200, 100, 50, 0)), "png", (255, 255, 255)),
    "RGBA, half": (Image.new("RGBA", (4, 4), (200, 100, 50, 128)), "png", (227, 177, 152)),
    "CMYK": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "tif", (255, 0, 0)),
    "CMYK, Adobe": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpg", (255, 0, 0)),
    "YCbCr": (Image.new("YCbCr", (8, 8), (76, 85, 255)), "jpg", (254, 0, 0)),
    "LAB": (Image.new("LAB", (4, 4), (255, 128, 128)), "tif", (255, 255, 255)),
    "I;16": (Image.fromarray(np.full((4, 4), 0xAB12, np.uint16)), "png", (0xAB, 0xAB, 0xAB)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_each_mode_becomes_the_colours_that_it_means(tmp_path, name):
    image, ending, expected = GOLDEN[name]
    image.save(tmp_path / f"x.{ending}", **({"quality": 100} if ending == "jpg" else {}))
    found = np.asarray(open_rgb(tmp_path / f"x.{ending}")).astype(int)
    assert np.abs(found - expected).max() <= (2 if ending == "jpg" or name == "LAB" else "half" in name)


def test_deep_grey_keeps_its_steps(tmp_path):
    Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "x.png")
    assert len(np.unique(np.asarray(open_rgb(tmp_path / "x.png")))) == 256  # Pillow itself leaves two


def test_deep_grey_that_is_not_used_to_its_depth_is_refused(tmp_path):
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="values up to 4095 only; scale it"):
        open_rgb(tmp_path / "x.png")


def test_files_that_are_too_long_and_kinds_that_are_not_read_are_refused(tmp_path):
    with (tmp_path / "long.webp").open("wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(DataError, match="bytes exceed"):
        open_rgb(tmp_path / "long.webp")
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop")
    with pytest.raises(OSError, match="cannot identify"):
        open_rgb(tmp_path / "program.jpg")


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_modes_without_a_meaning_are_refused_and_not_destroyed(tmp_path, kind):
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
    np.testing.assert_array_equal(cached.batch([3])[0], decode(tmp_path / "3.png", (8, 12)))
    cached.batch(rows)[:] = 0  # a copy: the cache cannot be harmed
    assert cached.batch(rows).any()


def test_the_cache_is_not_carried_to_workers_but_opened_there(manifest, tmp_path):
    build_cache(manifest, (64, 64), tmp_path / "images.npy")
    cached = Images(manifest, (64, 64), tmp_path / "images.npy")
    carried = pickle.dumps(cached)
    assert len(carried) < 64 * 64 * 3
    np.testing.assert_array_equal(pickle.loads(carried).batch([1]), cached.batch([1]))


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
