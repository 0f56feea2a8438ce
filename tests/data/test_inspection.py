"""The inspection of raw images: decoding, duplicates, leaks."""

import os

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.inspection import (
    changed_files,
    deduplicate,
    duplicates_in_test,
    find_leaks,
    inspect,
    near_duplicates,
)
from pipeline.data.manifest import Item
from tests import layouts


def test_images_that_cannot_be_decoded_completely_are_quarantined_with_a_reason(tmp_path, picture):
    names = ["good.jpg", "cut.jpg", "empty.jpg", "page.jpg", "gone.jpg", "last.jpg"]
    for number, name in enumerate(names[:-2] + names[-1:]):
        picture(tmp_path / name, number, (64, 64))
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    items = [Item(name, "1", "c1", "train") for name in names]
    inspection = inspect(items, tmp_path)
    assert [item.path for item in inspection.good] == ["good.jpg", "last.jpg"]
    assert len({image.pixels for image in inspection.decoded}) == 2
    assert [path for path, _ in inspection.quarantined] == names[1:5]
    reasons = dict(inspection.quarantined)
    assert "truncated" in reasons["cut.jpg"] and "UnidentifiedImageError" in reasons["page.jpg"]
    assert all(str(tmp_path) not in reason for reason in reasons.values())


def test_the_same_pixels_in_training_and_test_are_a_leak_whatever_the_file(tmp_path, picture):
    for name in ("a.png", "b.bmp", "c.png"):
        picture(tmp_path / name, 0)
    picture(tmp_path / "d.png", 1)
    splits = {"a.png": "train", "b.bmp": "gallery", "c.png": "query", "d.png": "gallery"}
    inspection = inspect([Item(path, split, "c1", split) for path, split in splits.items()], tmp_path)
    assert find_leaks(inspection) == [("a.png", "b.bmp"), ("a.png", "c.png")]
    test_only = inspect([Item("b.bmp", "1", "c1", "gallery"), Item("c.png", "1", "c1", "query")], tmp_path)
    assert find_leaks(test_only) == []  # VeRi-776's queries are in its gallery too


def test_duplicates_within_the_test_set_are_listed(tmp_path, picture):
    for name in ("a.png", "b.bmp", "c.png"):
        picture(tmp_path / name, name == "c.png")
    inspection = inspect([Item(name, "1", "c1", "query") for name in ("a.png", "b.bmp", "c.png")], tmp_path)
    assert duplicates_in_test(inspection) == [("a.png", "b.bmp")]


def test_flat_images_are_not_near_duplicates(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), (name == "a.png" and "black") or "white").save(tmp_path / name)
    inspection = inspect([Item("a.png", "1", "c1", "train"), Item("b.png", "2", "c1", "query")], tmp_path)
    assert near_duplicates(inspection, 16) == []


def test_equal_bytes_of_another_shape_are_not_duplicates(tmp_path, picture):
    for name, size in (("a.png", (4, 6)), ("b.png", (6, 4))):
        picture(tmp_path / name, 0, size)
    inspection = inspect([Item("a.png", "1", "c1", "train"), Item("b.png", "2", "c1", "query")], tmp_path)
    assert not find_leaks(inspection)


def test_large_images_are_hashed_completely(tmp_path):
    pixels = np.zeros((2100, 2000, 3), np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pixels[-1, -1] = 1
    Image.fromarray(pixels).save(tmp_path / "b.png")
    inspection = inspect([Item(f"{name}.png", "1", "c1", "train") for name in "ab"], tmp_path)
    assert inspection.decoded[0].pixels != inspection.decoded[1].pixels


def test_duplicates_of_two_identities_are_quarantined_in_training_and_kept_in_test(tmp_path, picture):
    items = []
    for number, (identity, split) in enumerate((("1", "train"), ("2", "train"), ("3", "query"), ("4", "gallery"))):
        picture(tmp_path / f"{number}.png", number // 2)
        items.append(Item(f"{number}.png", identity, "c1", split))
    inspection = deduplicate(inspect(items, tmp_path))
    assert [item.path for item in inspection.good] == ["2.png", "3.png"]
    assert inspection.quarantined == [
        ("0.png", "has the same pixels as an image of another identity: 2"),
        ("1.png", "has the same pixels as an image of another identity: 1"),
    ]
    assert inspection.warnings == [
        ("2.png", "has the same pixels as an image of another identity", "4"),
        ("3.png", "has the same pixels as an image of another identity", "3"),
    ]


def test_unusual_but_usable_images_get_a_warning(tmp_path, picture):
    picture(tmp_path / "plain.png", 0)
    (tmp_path / "plain.png").rename(tmp_path / "plain.JPG")
    frames = [Image.new("L", (9, 9), level) for level in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    inspection = inspect([Item(name, "1", "c1", "train") for name in ("plain.JPG", "moving.gif")], tmp_path)
    assert inspection.warnings == [
        ("plain.JPG", "the suffix is not that of the format", "is PNG"),
        ("moving.gif", "only the first frame is used", "of 2"),
        ("moving.gif", "has only one colour", ""),
    ]


def test_only_regular_files_are_opened_and_links_to_them_are_followed(tmp_path, picture):
    root = tmp_path / "root"
    picture(root / "a.png", 0)
    picture(tmp_path / "outside.png", 1)
    (root / "inside.png").symlink_to("a.png")
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    names = ["a.png", "inside.png", "out.png", "loop.png", "pipe.png", "folder.png"]
    inspection = inspect([Item(name, "1", "c1", "train") for name in names], root)
    assert [item.path for item in inspection.good] == names[:3]
    reasons = dict(inspection.quarantined)
    assert reasons.keys() == {"loop.png", "pipe.png", "folder.png"}
    assert "not a regular file" in reasons["pipe.png"] and "not a regular file" in reasons["folder.png"]


def test_files_that_changed_after_the_inspection_are_listed(tmp_path, picture):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name, 0)
    inspection = inspect([Item(name, "1", "c1", "train") for name in ("a.png", "b.png", "c.png")], tmp_path)
    assert changed_files(inspection, tmp_path) == []
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes() + b" ")
    (tmp_path / "c.png").unlink()
    assert changed_files(inspection, tmp_path) == ["b.png", "c.png"]


def test_a_hundred_planted_near_duplicates_are_found_and_nothing_else(tmp_path):
    items, planted = [], set()
    for identity in range(400):
        path = f"train/{identity}.png"
        layouts.picture(tmp_path / path, identity, size=(96, 128))
        items.append(Item(path, str(identity), "c1", "train"))
    for number in range(300):
        path = f"test/{number}.jpg"
        if number >= 100:
            layouts.picture(tmp_path / path, 1000 + number, size=(96, 128))
        else:
            image = Image.open(tmp_path / f"train/{3 * number}.png")
            edits = (
                lambda image: image,
                lambda image: image.resize((100, 75), Image.Resampling.BICUBIC),
                ImageOps.mirror,
                lambda image: image.resize((256, 192), Image.Resampling.BICUBIC),
            )
            (tmp_path / "test").mkdir(exist_ok=True)
            edits[number % 4](image).save(tmp_path / path, quality=(50, 75, 90)[number % 3])
            planted.add((f"train/{3 * number}.png", path))
        items.append(Item(path, f"t{number}", "c1", "gallery"))
    inspection = inspect(items, tmp_path)
    assert not inspection.quarantined
    pairs = near_duplicates(inspection, 4)
    assert {pair[:2] for pair in pairs} == planted
    assert near_duplicates(inspection, -1) == []
