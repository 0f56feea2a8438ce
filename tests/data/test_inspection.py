"""What raw images must survive."""

import os

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.inspection import changed, deduplicate, inspect, leaks, near_duplicates, twins
from pipeline.data.manifest import Item
from tests import layouts


def test_what_does_not_decode_to_its_end_is_quarantined_with_a_reason(tmp_path, picture):
    names = ["good.jpg", "cut.jpg", "empty.jpg", "page.jpg", "gone.jpg", "last.jpg"]
    for number, name in enumerate(names[:-2] + names[-1:]):
        picture(tmp_path / name, number, (64, 64))
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    items = [Item(name, "1", "c1", "train") for name in names]
    found = inspect(items, tmp_path)
    assert [item.path for item in found.good] == ["good.jpg", "last.jpg"]
    assert len({look.pixels for look in found.looks}) == 2
    assert [path for path, _ in found.quarantined] == names[1:5]
    reasons = dict(found.quarantined)
    assert "truncated" in reasons["cut.jpg"] and "UnidentifiedImageError" in reasons["page.jpg"]
    assert all(str(tmp_path) not in reason for reason in reasons.values())


def test_the_same_pixels_in_training_and_test_are_a_leak_whatever_the_file(tmp_path, picture):
    for name in ("a.png", "b.bmp", "c.png"):
        picture(tmp_path / name, 0)
    picture(tmp_path / "d.png", 1)
    splits = {"a.png": "train", "b.bmp": "gallery", "c.png": "query", "d.png": "gallery"}
    found = inspect([Item(path, split, "c1", split) for path, split in splits.items()], tmp_path)
    assert leaks(found) == [("a.png", "b.bmp"), ("a.png", "c.png")]
    tests_only = inspect([Item("b.bmp", "1", "c1", "gallery"), Item("c.png", "1", "c1", "query")], tmp_path)
    assert leaks(tests_only) == []  # VeRi-776's queries are in its gallery too


def test_copies_inside_of_the_test_set_are_told(tmp_path, picture):
    for name in ("a.png", "b.bmp", "c.png"):
        picture(tmp_path / name, name == "c.png")
    found = inspect([Item(name, "1", "c1", "query") for name in ("a.png", "b.bmp", "c.png")], tmp_path)
    assert twins(found) == [("a.png", "b.bmp")]


def test_images_of_one_colour_are_no_copies(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), (name == "a.png" and "black") or "white").save(tmp_path / name)
    found = inspect([Item("a.png", "1", "c1", "train"), Item("b.png", "2", "c1", "query")], tmp_path)
    assert near_duplicates(found, 16) == []


def test_equal_bytes_of_another_shape_are_no_duplicate(tmp_path, picture):
    for name, size in (("a.png", (4, 6)), ("b.png", (6, 4))):
        picture(tmp_path / name, 0, size)
    found = inspect([Item("a.png", "1", "c1", "train"), Item("b.png", "2", "c1", "query")], tmp_path)
    assert not leaks(found)


def test_large_images_are_hashed_in_full(tmp_path):
    pixels = np.zeros((2100, 2000, 3), np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pixels[-1, -1] = 1
    Image.fromarray(pixels).save(tmp_path / "b.png")
    found = inspect([Item(f"{name}.png", "1", "c1", "train") for name in "ab"], tmp_path)
    assert found.looks[0].pixels != found.looks[1].pixels


def test_training_images_that_two_identities_claim_go_and_test_images_stay(tmp_path, picture):
    items = []
    for number, (identity, split) in enumerate((("1", "train"), ("2", "train"), ("3", "query"), ("4", "gallery"))):
        picture(tmp_path / f"{number}.png", number // 2)
        items.append(Item(f"{number}.png", identity, "c1", split))
    found = deduplicate(inspect(items, tmp_path))
    assert [item.path for item in found.good] == ["2.png", "3.png"]
    assert found.quarantined == [
        ("0.png", "identities 2 claim the same pixels"),
        ("1.png", "identities 1 claim the same pixels"),
    ]
    assert found.warnings == [
        ("2.png", "identities 4 claim the same pixels"),
        ("3.png", "identities 3 claim the same pixels"),
    ]


def test_odd_but_usable_images_get_a_remark(tmp_path, picture):
    picture(tmp_path / "plain.png", 0)
    (tmp_path / "plain.png").rename(tmp_path / "plain.JPG")
    frames = [Image.new("L", (9, 9), level) for level in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    found = inspect([Item(name, "1", "c1", "train") for name in ("plain.JPG", "moving.gif")], tmp_path)
    assert found.warnings == [
        ("plain.JPG", "is PNG, whatever its name says"),
        ("moving.gif", "has 2 frames, of which the first is taken; is of one colour"),
    ]


def test_only_regular_files_inside_of_the_root_are_opened(tmp_path, picture):
    root = tmp_path / "root"
    picture(root / "a.png", 0)
    picture(tmp_path / "outside.png", 1)
    (root / "inside.png").symlink_to("a.png")
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    names = ["a.png", "inside.png", "out.png", "loop.png", "pipe.png", "folder.png"]
    found = inspect([Item(name, "1", "c1", "train") for name in names], root)
    assert [item.path for item in found.good] == names[:2]
    reasons = dict(found.quarantined)
    assert "leads out of `data.root`" in reasons["out.png"]
    assert "no regular file" in reasons["pipe.png"] and "no regular file" in reasons["folder.png"]


def test_files_that_changed_meanwhile_are_named(tmp_path, picture):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name, 0)
    found = inspect([Item(name, "1", "c1", "train") for name in ("a.png", "b.png", "c.png")], tmp_path)
    assert changed(found, tmp_path) == []
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes() + b" ")
    (tmp_path / "c.png").unlink()
    assert changed(found, tmp_path) == ["b.png", "c.png"]


def test_a_hundred_planted_copies_are_found_and_nothing_else_is(tmp_path):
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
            ways = (
                lambda image: image,
                lambda image: image.resize((100, 75), Image.Resampling.BICUBIC),
                ImageOps.mirror,
                lambda image: image.resize((256, 192), Image.Resampling.BICUBIC),
            )
            (tmp_path / "test").mkdir(exist_ok=True)
            ways[number % 4](image).save(tmp_path / path, quality=(50, 75, 90)[number % 3])
            planted.add((f"train/{3 * number}.png", path))
        items.append(Item(path, f"t{number}", "c1", "gallery"))
    found = inspect(items, tmp_path)
    assert not found.quarantined
    pairs = near_duplicates(found, 4)
    assert {pair[:2] for pair in pairs} == planted
    assert near_duplicates(found, -1) == []
