"""Parts of images: a table with boxes."""

import csv

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import Images, build_cache, decode
from pipeline.data.inspection import deduplicate, find_leaks, inspect
from pipeline.data.manifest import DataError, Item, Manifest
from pipeline.data.sources import read_source
from tests.data.test_prepare import Run, prepare
from tests.data.test_sources import section


@pytest.fixture
def frame(tmp_path):
    """A picture of 60 x 40 pixels (width, height), stored upright and, with an EXIF orientation, on its side."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "phone.png", exif=exif)
    return pixels


def crops(*boxes, path="frame.png", splits=("train",) * 9):
    return [Item(path, str(n), "c1", split, box) for n, (box, split) in enumerate(zip(boxes, splits, strict=False))]


def test_a_part_has_the_pixels_of_its_box_in_the_upright_image(tmp_path, frame):
    for path in ("frame.png", "phone.png"):
        assert np.array_equal(decode(tmp_path / path, (10, 20), (5, 8, 25, 18)), frame[8:18, 5:25])
        whole = Item("frame.png", "whole", "c1", "query")
        images = Images(Manifest([*crops((5, 8, 25, 18), path=path), whole], tmp_path), (10, 20), None)
        assert np.array_equal(images.original(0), frame[8:18, 5:25])
        assert np.array_equal(images.original(1), frame)


def test_the_cache_holds_the_parts_in_the_order_of_the_manifest(tmp_path, frame):
    Image.fromarray(frame[::-1].copy()).save(tmp_path / "other.png")
    first, second = crops((0, 0, 20, 10), (40, 30, 60, 40))
    other = Item("other.png", "9", "c1", "query", (0, 0, 20, 10))
    manifest = Manifest([first, other, second], tmp_path)
    build_cache(manifest, (10, 20), tmp_path / "images.npy")
    cached = Images(manifest, (10, 20), tmp_path / "images.npy").batch([0, 1, 2])
    assert np.array_equal(cached, np.stack([frame[:10, :20], frame[:-11:-1, :20], frame[30:, 40:]]))
    assert np.array_equal(cached, Images(manifest, (10, 20), None).batch([0, 1, 2]))


def test_a_box_is_clipped_and_one_without_area_is_unusable(tmp_path, frame):
    items = crops((-5, 0, 10, 10), (50, 30, 70, 50), (0, 0, 60, 40), (60, 0, 70, 10), (5, 5, 5, 9), (9, 9, 4, 12))
    inspection = inspect(items, tmp_path)
    assert [item.box for item in inspection.good] == [(0, 0, 10, 10), (50, 30, 60, 40), (0, 0, 60, 40)]
    assert [(w.path, w.warning, w.detail) for w in inspection.warnings] == [
        ("frame.png [0 0 10 10]", "the box leaves the image and is clipped", "-5 0 10 10 in 60 x 40 pixels"),
        ("frame.png [50 30 60 40]", "the box leaves the image and is clipped", "50 30 70 50 in 60 x 40 pixels"),
    ]
    assert [name for name, _ in inspection.quarantined] == [item.name for item in items[3:]]
    assert all("no area inside of the upright image of 60 x 40" in reason for _, reason in inspection.quarantined)


def test_leaks_and_duplicates_are_those_of_the_parts(tmp_path, frame):
    boxes = [(0, 0, 10, 10), (20, 20, 30, 30), (0, 0, 10, 10), (20, 20, 30, 30)]
    items = crops(*boxes, splits=["train", "train", "query", "train"])
    inspection = inspect(items, tmp_path)
    assert find_leaks(inspection) == [("frame.png [0 0 10 10]", "frame.png [0 0 10 10]")]
    assert [name for name, _ in deduplicate(inspection).quarantined] == ["frame.png [20 20 30 30]"] * 2


def test_a_manifest_with_parts_is_read_back_and_names_them(tmp_path):
    tested = Item("b.png", "other", "c1", "query", (1, 0, 10, 10))
    manifest = Manifest([*crops((0, 0, 10, 10), None), tested], tmp_path)
    manifest.write(tmp_path / "manifest.csv")
    assert Manifest.read(tmp_path / "manifest.csv", tmp_path).items == manifest.items
    with pytest.raises(DataError, match=r"listed more than once: frame.png \[0 0 10 10\]"):
        Manifest(crops((0, 0, 10, 10), (0, 0, 10, 10)), tmp_path)
    text = (tmp_path / "manifest.csv").read_text()
    for broken in ("0 0 10", "a b c d"):
        (tmp_path / "manifest.csv").write_text(text.replace("0 0 10 10", broken))
        with pytest.raises(DataError, match="a box must be four whole numbers"):
            Manifest.read(tmp_path / "manifest.csv", tmp_path)


def test_frames_with_boxes_go_through_the_stage(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "data").mkdir()
    rows = []
    for number in range(6):
        for camera in "ab":
            Image.fromarray(rng.integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(
                tmp_path / "data" / f"{number}{camera}.png"
            )
            rows += [(f"{number}{camera}.png", f"{number}-{x}", camera, 30 * x, 4, 28, 30) for x in range(3)]
    with (tmp_path / "data" / "images.csv").open("w") as file:
        csv.writer(file).writerows([("path", "identity", "camera", "x", "y", "width", "height"), *rows])
    assert len(read_source(section("csv"), tmp_path / "data").items) == 36
    record = prepare(Run(tmp_path, source="csv", validation=0.3))
    assert (record.images, record.identities) == (36, 18)
    table = list(csv.DictReader((tmp_path / "artifacts/prepare/manifest.csv").open()))
    assert {(row["path"], row["box"]) for row in table} == {
        (path, f"{x} {y} {x + width} {y + height}") for path, _, _, x, y, width, height in rows
    }
