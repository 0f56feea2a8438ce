"""Who is trained on, validated on and tested with, where the data set does not say."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.custom import UNDEALT, UNSPLIT
from pipeline.data.manifest import DataError, Item
from pipeline.data.splits import check_test_set, split_test, split_validation
from pipeline.protocols import PROTOCOLS

NAMES = ("market", "query-gallery", "loo", "vehicleid")


def items_of(views, split="train"):
    """One item for each (identity, camera) in `views`, in that order."""
    return [Item(f"{n}.jpg", identity, camera, split) for n, (identity, camera) in enumerate(views)]


def test_the_first_image_of_every_camera_asks_and_the_rest_is_the_gallery():
    views = [("1", "b"), ("1", "a"), ("1", "b"), ("1", "a"), ("1", "a"), ("2", "a"), ("3", "a")]
    found = split_validation(items_of(views), 0.34, 0, "market")
    assert [item.split.removeprefix("validation-") for item in found[:5]] == ["query"] * 2 + ["gallery"] * 3
    assert [item.split for item in found[5:]] == ["train", "train"]


def test_where_cameras_have_one_image_every_other_one_asks():
    found = split_validation(items_of([("1", camera) for camera in "abcd"]), 1.0, 0, "market")
    assert [item.split.removeprefix("validation-") for item in found] == ["query", "gallery", "query", "gallery"]


@pytest.mark.parametrize(("protocol", "asking"), [("query-gallery", 1), ("loo", 3), ("vehicleid", 3)])
def test_without_cameras_one_image_asks_or_all_do(protocol, asking):
    found = split_validation(items_of([("1", "unknown")] * 3 + [("2", "unknown")]), 0.5, 0, protocol)
    assert [item.split for item in found] == [
        *["validation-query"] * asking,
        *["validation-gallery"] * (3 - asking),
        "train",
    ]


def test_without_a_share_nothing_is_held_out_and_test_images_never_are():
    items = [
        *items_of([("1", "a"), ("1", "b")]),
        Item("q.jpg", "2", "a", "query"),
        Item("g.jpg", "2", "b", "gallery"),
    ]
    assert split_validation(items, 0.0, 0, "market") == items
    assert split_validation(items, 1.0, 0, "market")[2:] == items[2:]


def by_identity(items):
    splits = defaultdict(set)
    for item in items:
        splits[item.identity].add(item.split)
    return splits


VIEWS = st.lists(st.tuples(st.sampled_from("12345"), st.sampled_from("abc")), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(VIEWS, st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.integers(0, 3))
@pytest.mark.parametrize("protocol", NAMES)
def test_whole_identities_are_held_out_and_each_query_has_something_to_find(protocol, views, share, seed):
    items = items_of(views)
    found = split_validation(items, share, seed, protocol)
    assert [replace(item, split="train") for item in found] == items
    splits = by_identity(found)
    held_out = {identity for identity, names in splits.items() if "train" not in names}
    assert all("train" not in names or len(names) == 1 for names in splits.values())
    seen = {identity: [camera for i, camera in views if i == identity] for identity in splits}
    fit = [len(set(cameras)) > 1 if protocol == "market" else len(cameras) > 1 for cameras in seen.values()]
    assert len(held_out) == min(int(share * len(splits)), sum(fit))
    asked = ("validation-gallery",) if protocol in ("market", "query-gallery") else ("validation-query",)
    for query in (item for item in found if item.split == "validation-query"):
        assert any(
            item.split in asked
            and item.identity == query.identity
            and (item.camera != query.camera if protocol == "market" else item.path != query.path)
            for item in found
        )


def test_the_seed_alone_decides_who_is_held_out():
    items = items_of([(str(n), camera) for n in range(40) for camera in "ab"])

    def held_out(seed, given=items):
        return {item.identity for item in split_validation(given, 0.25, seed, "market") if item.split != "train"}

    assert len(held_out(0)) == 10
    assert held_out(0) == held_out(0, items[::-1])
    assert held_out(0) != held_out(1)


def test_too_few_fit_identities_are_said(caplog):
    split_validation(items_of([("1", "a"), ("2", "a")]), 0.5, 0, "market")
    assert "only 0 of 1 identities were seen by two cameras" in caplog.text
    split_validation(items_of([("1", "a"), ("2", "a")]), 0.5, 0, "loo")
    assert "only 0 of 1 identities have two images" in caplog.text


def test_an_empty_list_stays_empty():
    assert split_validation([], 0.5, 0, "market") == [] == split_test([], 0.5, 0, "market")


@settings(deadline=None, max_examples=60)
@given(VIEWS, st.integers(0, 5))
@pytest.mark.parametrize("protocol", NAMES)
def test_own_identities_are_on_one_side_and_can_be_found_there(protocol, views, seed):
    found = split_test(items_of(views, UNSPLIT), 0.5, seed, protocol)
    for names in by_identity(found).values():
        assert names == {"train"} or names <= {"query", "gallery"}
    tested = [item for item in found if item.split != "train"]
    for query in (item for item in tested if item.split == "query"):
        if PROTOCOLS[protocol].all_query and sum(item.identity == query.identity for item in tested) == 1:
            continue  # it is dropped from the mean, and counted
        assert any(
            item.identity == query.identity
            and (item.camera != query.camera if protocol == "market" else item.path != query.path)
            for item in tested
        )


def test_no_identity_changes_sides_when_images_come_or_go():
    few = items_of([(str(n), camera) for n in range(50) for camera in "ab"], UNSPLIT)
    more = [*items_of([(f"new {n}", camera) for n in range(50) for camera in "ab"], UNSPLIT), *few]
    before, after = (by_identity(split_test(given, 0.3, 7, "market")) for given in (few, more))
    assert all(after[identity] == names for identity, names in before.items())
    assert 5 <= sum("train" not in names for names in before.values()) <= 25
    assert by_identity(split_test(few, 0.3, 8, "market")) != before
    fewer = by_identity(split_test(few[::2], 0.3, 7, "market"))  # one camera is left: nobody can be found
    assert {name for name in fewer if "train" in fewer[name]} == {name for name in before if "train" in before[name]}
    assert {"query"} not in fewer.values()


def test_junk_is_asked_of_and_asks_nothing():
    items = [*items_of([("1", "a"), ("1", "b"), ("2", "a"), ("2", "b")], UNSPLIT), Item("j", "-1", "a", UNSPLIT)]
    for seed in range(5):
        assert split_test(items, 0.5, seed, "market")[-1].split == "gallery"
    with pytest.raises(DataError, match="junk, which asks nothing"):
        check_test_set(split_test(items, 0.99, 0, "loo"), "loo")


def test_a_given_test_half_is_dealt_out_and_training_stays():
    items = [*items_of([("1", "a"), ("1", "b")]), *(Item(f"t{camera}.jpg", "2", camera, UNDEALT) for camera in "ab")]
    assert [item.split for item in split_test(items, 0.5, 0, "market")] == ["train", "train", "query", "gallery"]
    assert [item.split for item in split_test(items, 0.5, 0, "loo")] == ["train", "train", "query", "query"]


def test_given_splits_are_left_alone():
    items = [Item("a", "1", "a", "train"), Item("b", "2", "a", "query"), Item("c", "2", "b", "gallery")]
    assert split_test(items, 0.5, 0, "market") == items


@pytest.mark.parametrize(
    ("protocol", "test", "message"),
    [
        ("loo", [("1", "a", "query"), ("1", "a", "gallery"), ("2", "a", "query")], "1 are in a gallery"),
        ("market", [("1", "a", "query"), ("2", "b", "query")], "needs a gallery, and there is none; set .* to loo"),
        ("market", [("1", "a", "query"), ("1", "b", "gallery")], "of 1 identities, and 1 of them ask; two .* cameras"),
        ("market", [("1", "a", "gallery"), ("2", "b", "gallery")], "0 of them ask; .* raise `data.custom.test`"),
        ("loo", [], "has 0 images of 0 identities"),
        ("market", [("1", "a", "query"), ("2", "unknown", "gallery")], "needs the camera of every test image, and 1"),
    ],
)
def test_a_test_set_that_cannot_be_asked_is_refused_with_a_remedy(protocol, test, message):
    items = [Item(f"{n}.jpg", *what) for n, what in enumerate(test)]
    with pytest.raises(DataError, match=message):
        check_test_set(items, protocol)
