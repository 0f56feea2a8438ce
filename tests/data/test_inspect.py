"""What raw data must survive."""

from collections import defaultdict
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.inspect import inspect, leaks, split_validation
from pipeline.data.manifest import Item


def train_items(views):
    """One item for each (identity, camera) in `views`, in that order."""
    return [Item(f"{n}.jpg", identity, camera, "train") for n, (identity, camera) in enumerate(views)]


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
    assert [item.path for item in found.good] == ["good.jpg", "last.jpg"] and len(set(found.pixels)) == 2
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


def test_equal_bytes_of_another_shape_are_no_duplicate(tmp_path, picture):
    for name, size in (("a.png", (4, 6)), ("b.png", (6, 4))):
        picture(tmp_path / name, 0, size)
    found = inspect([Item("a.png", "1", "c1", "train"), Item("b.png", "2", "c1", "query")], tmp_path)
    assert not leaks(found)


def test_the_first_image_of_every_camera_asks_and_the_rest_is_the_gallery():
    views = [("1", "b"), ("1", "a"), ("1", "b"), ("1", "a"), ("1", "a"), ("2", "a"), ("3", "a")]
    found = split_validation(train_items(views), 0.34, seed=0)
    assert [item.split.removeprefix("validation-") for item in found[:5]] == ["query"] * 2 + ["gallery"] * 3
    assert [item.split for item in found[5:]] == ["train", "train"]


def test_where_cameras_have_one_image_every_other_one_asks():
    found = split_validation(train_items([("1", camera) for camera in "abcd"]), 1.0, seed=0)
    assert [item.split.removeprefix("validation-") for item in found] == ["query", "gallery", "query", "gallery"]


def test_without_a_share_nothing_is_held_out_and_test_images_never_are():
    items = [
        *train_items([("1", "a"), ("1", "b")]),
        Item("q.jpg", "2", "a", "query"),
        Item("g.jpg", "2", "b", "gallery"),
    ]
    assert split_validation(items, 0.0, seed=0) == items
    assert split_validation(items, 1.0, seed=0)[2:] == items[2:]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("12345"), st.sampled_from("abc")), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.integers(0, 3),
)
def test_whole_identities_are_held_out_and_each_query_has_something_to_find(views, share, seed):
    items = train_items(views)
    found = split_validation(items, share, seed)
    assert [replace(item, split="train") for item in found] == items
    splits = defaultdict(set)
    for item in found:
        splits[item.identity].add(item.split)
    held_out = {identity for identity, names in splits.items() if "train" not in names}
    assert all("train" not in names or len(names) == 1 for names in splits.values())
    cameras = {identity: {camera for i, camera in views if i == identity} for identity in splits}
    assert len(held_out) == min(int(share * len(splits)), sum(len(seen) > 1 for seen in cameras.values()))
    for query in (item for item in found if item.split == "validation-query"):
        assert any(
            item.split == "validation-gallery" and item.identity == query.identity and item.camera != query.camera
            for item in found
        )


def test_the_seed_alone_decides_who_is_held_out():
    items = train_items([(str(n), camera) for n in range(40) for camera in "ab"])

    def held_out(seed, given=items):
        return {item.identity for item in split_validation(given, 0.25, seed) if item.split != "train"}

    assert len(held_out(0)) == 10
    assert held_out(0) == held_out(0, items[::-1])
    assert held_out(0) != held_out(1)


def test_too_few_fit_identities_are_said(caplog):
    split_validation(train_items([("1", "a"), ("2", "a")]), 0.5, seed=0)
    assert "only 0 of 1 identities" in caplog.text


def test_an_empty_list_stays_empty(tmp_path):
    assert split_validation([], 0.5, 0) == [] and inspect([], tmp_path).good == []
