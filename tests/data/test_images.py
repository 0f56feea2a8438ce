"""Decoding image files, and the cache of decoded images."""

import pickle

import numpy as np
import pytest
from PIL import Image

from pipeline.data import images
from pipeline.data.images import Images, build_cache, decode, open_image, upright_rgb
from pipeline.data.manifest import DataError


def open_rgb(path):
    with open_image(path) as image:
        return upright_rgb(image)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = np.asarray(open_rgb(tmp_path / "x.png"))
    assert upright.shape == (40, 20, 3)
    assert upright[:20].min() == 255 and upright[20:].max() == 0


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing: all black or all white
    Image.fromarray(stripes).save(tmp_path / "x.png")
    resized = decode(tmp_path / "x.png", (8, 16))
    assert resized.shape == (8, 16, 3) and resized.dtype == np.uint8
    assert np.abs(resized[:, 1:-1].astype(int) - 127).max() <= 8


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
def test_each_mode_is_converted_to_the_right_colours(tmp_path, name):
    image, suffix, expected = GOLDEN[name]
    image.save(tmp_path / f"x.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    rgb = np.asarray(open_rgb(tmp_path / f"x.{suffix}")).astype(int)
    assert np.abs(rgb - expected).max() <= (2 if suffix == "jpg" or name == "LAB" else "half" in name)


def test_16_bit_grey_keeps_its_levels(tmp_path):
    Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)).save(tmp_path / "x.png")
    assert len(np.unique(np.asarray(open_rgb(tmp_path / "x.png")))) == 256  # 2 with Pillow's own conversion


def test_16_bit_grey_with_fewer_used_bits_is_refused(tmp_path):
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="values up to 4095 only; scale it"):
        open_rgb(tmp_path / "x.png")


def test_too_large_files_and_unsupported_formats_are_refused(tmp_path):
    with (tmp_path / "long.webp").open("wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(DataError, match="bytes exceed"):
        open_rgb(tmp_path / "long.webp")
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop")
    with pytest.raises(OSError, match="cannot identify"):
        open_rgb(tmp_path / "program.jpg")


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_modes_without_defined_colours_are_refused(tmp_path, kind):
    Image.fromarray(np.arange(16, dtype=kind).reshape(4, 4)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="8 bits"):
        open_rgb(tmp_path / "x.tif")


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch, picture):
    picture(tmp_path / "x.png", 0)
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])  # decoding would fail
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    with pytest.raises(DataError, match="30 x 20 pixels exceed 599"):
        open_rgb(tmp_path / "x.png")


def test_cache_and_files_have_the_same_pixels(manifest, tmp_path):
    build_cache(manifest, (8, 12), tmp_path / "images.npy")
    cached, decoded = Images(manifest, (8, 12), tmp_path / "images.npy"), Images(manifest, (8, 12), None)
    indices = np.array([4, 0, 0, 2])
    assert len(cached) == len(decoded) == 5
    assert cached.batch(indices).shape == (4, 8, 12, 3) and cached.batch(indices).dtype == np.uint8
    np.testing.assert_array_equal(cached.batch(indices), decoded.batch(indices))
    np.testing.assert_array_equal(cached.batch([3])[0], decode(tmp_path / "3.png", (8, 12)))
    cached.batch(indices)[:] = 0  # a copy: the cache is not modified
    assert cached.batch(indices).any()


def test_workers_open_the_cache_instead_of_receiving_its_pixels(manifest, tmp_path):
    build_cache(manifest, (64, 64), tmp_path / "images.npy")
    cached = Images(manifest, (64, 64), tmp_path / "images.npy")
    pickled = pickle.dumps(cached)
    assert len(pickled) < 64 * 64 * 3
    np.testing.assert_array_equal(pickle.loads(pickled).batch([1]), cached.batch([1]))


def test_building_a_cache_leaves_nothing_behind_if_it_fails(manifest, tmp_path):
    (tmp_path / "3.png").write_bytes(b"not an image")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="cannot identify"):
        build_cache(manifest, (8, 8), tmp_path / "images.npy")
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_cache_or_one_of_another_size_is_refused(manifest, tmp_path):
    with pytest.raises(FileNotFoundError, match="dvc repro prepare"):
        Images(manifest, (8, 8), tmp_path / "images.npy")
    build_cache(manifest, (8, 8), tmp_path / "images.npy")
    with pytest.raises(DataError, match="run prepare again"):
        Images(manifest, (8, 9), tmp_path / "images.npy")
