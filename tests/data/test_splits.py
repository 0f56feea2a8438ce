"""Splitting identities into training, validation and test, and images into queries and gallery."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.layout import UNASSIGNED, UNASSIGNED_TEST
from pipeline.data.manifest import Item
from pipeline.data.splits import split_test, split_validation
from pipeline.protocols import PROTOCOLS

NAMES = ("market", "query-gallery", "loo", "vehicleid")


def items_of(views, split="train"):
    """Return one item for each (identity, camera) in `views`, in their order."""
    return [Item(f"{n}.jpg", identity, camera, split) for n, (identity, camera) in enumerate(views)]


def test_the_first_image_of_every_camera_is_a_query_and_the_others_are_the_gallery():
    views = [("1", "b"), ("1", "a"), ("1", "b"), ("1", "a"), ("1", "a"), ("2", "a"), ("3", "a")]
    result = split_validation(items_of(views), 0.34, 0, "market")
    assert [item.split.removeprefix("validation-") for item in result[:5]] == ["query"] * 2 + ["gallery"] * 3
    assert [item.split for item in result[5:]] == ["train", "train"]


def test_every_other_camera_has_the_query_if_cameras_have_one_image():
    result = split_validation(items_of([("1", camera) for camera in "abcd"]), 1.0, 0, "market")
    assert [item.split.removeprefix("validation-") for item in result] == ["query", "gallery", "query", "gallery"]


@pytest.mark.parametrize(("protocol", "queries"), [("query-gallery", 1), ("loo", 3), ("vehicleid", 3)])
def test_without_cameras_one_image_is_a_query_or_all_are(protocol, queries):
    result = split_validation(items_of([("1", "unknown")] * 3 + [("2", "unknown")]), 0.5, 0, protocol)
    assert [item.split for item in result] == [
        *["validation-query"] * queries,
        *["validation-gallery"] * (3 - queries),
        "train",
    ]


def test_share_zero_holds_nothing_out_and_test_images_are_never_held_out():
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
def test_whole_identities_are_held_out_and_each_query_has_a_match(protocol, views, share, seed):
    items = items_of(views)
    result = split_validation(items, share, seed, protocol)
    assert [replace(item, split="train") for item in result] == items
    splits = by_identity(result)
    held_out = {identity for identity, names in splits.items() if "train" not in names}
    assert all("train" not in names or len(names) == 1 for names in splits.values())
    cameras_of = {identity: [camera for i, camera in views if i == identity] for identity in splits}
    has_match = [len(set(cameras)) > 1 if protocol == "market" else len(cameras) > 1 for cameras in cameras_of.values()]
    assert len(held_out) == min(int(share * len(splits)), sum(has_match))
    gallery_split = "validation-gallery" if protocol in ("market", "query-gallery") else "validation-query"
    for query in (item for item in result if item.split == "validation-query"):
        assert any(
            item.split == gallery_split
            and item.identity == query.identity
            and (item.camera != query.camera if protocol == "market" else item.path != query.path)
            for item in result
        )


def test_the_held_out_identities_depend_on_the_seed_alone():
    items = items_of([(str(n), camera) for n in range(40) for camera in "ab"])

    def held_out(seed, items=items):
        return {item.identity for item in split_validation(items, 0.25, seed, "market") if item.split != "train"}

    assert len(held_out(0)) == 10
    assert held_out(0) == held_out(0, items[::-1])
    assert held_out(0) != held_out(1)


def test_too_few_identities_with_a_match_are_logged(caplog):
    split_validation(items_of([("1", "a"), ("2", "a")]), 0.5, 0, "market")
    assert "only 0 of 1 identities were seen by two cameras" in caplog.text
    split_validation(items_of([("1", "a"), ("2", "a")]), 0.5, 0, "loo")
    assert "only 0 of 1 identities have two images" in caplog.text


def test_an_empty_list_stays_empty():
    assert split_validation([], 0.5, 0, "market") == [] == split_test([], 0.5, 0, "market")


@settings(deadline=None, max_examples=60)
@given(VIEWS, st.integers(0, 5))
@pytest.mark.parametrize("protocol", NAMES)
def test_custom_identities_are_in_one_split_and_each_query_has_a_match(protocol, views, seed):
    result = split_test(items_of(views, UNASSIGNED), 0.5, seed, protocol)
    for names in by_identity(result).values():
        assert names == {"train"} or names <= {"query", "gallery"}
    tested = [item for item in result if item.split != "train"]
    for query in (item for item in tested if item.split == "query"):
        if PROTOCOLS[protocol].all_query and sum(item.identity == query.identity for item in tested) == 1:
            continue  # scoring drops and counts it
        assert any(
            item.identity == query.identity
            and (item.camera != query.camera if protocol == "market" else item.path != query.path)
            for item in tested
        )


def test_no_identity_moves_between_training_and_test_when_images_are_added_or_removed():
    few = items_of([(str(n), camera) for n in range(50) for camera in "ab"], UNASSIGNED)
    more = [*items_of([(f"new {n}", camera) for n in range(50) for camera in "ab"], UNASSIGNED), *few]
    before, after = (by_identity(split_test(items, 0.3, 7, "market")) for items in (few, more))
    assert all(after[identity] == names for identity, names in before.items())
    assert 5 <= sum("train" not in names for names in before.values()) <= 25
    assert by_identity(split_test(few, 0.3, 8, "market")) != before
    fewer = by_identity(split_test(few[::2], 0.3, 7, "market"))  # one camera is left: no identity has a match
    assert {name for name in fewer if "train" in fewer[name]} == {name for name in before if "train" in before[name]}
    assert {"query"} not in fewer.values()


def test_junk_is_in_the_gallery_and_is_never_a_query():
    items = [*items_of([("1", "a"), ("1", "b"), ("2", "a"), ("2", "b")], UNASSIGNED), Item("j", "-1", "a", UNASSIGNED)]
    for seed in range(5):
        assert split_test(items, 0.5, seed, "market")[-1].split == "gallery"


def test_a_given_test_split_is_divided_into_query_and_gallery():
    items = [
        *items_of([("1", "a"), ("1", "b")]),
        *(Item(f"t{camera}.jpg", "2", camera, UNASSIGNED_TEST) for camera in "ab"),
    ]
    assert [item.split for item in split_test(items, 0.5, 0, "market")] == ["train", "train", "query", "gallery"]
    assert [item.split for item in split_test(items, 0.5, 0, "loo")] == ["train", "train", "query", "query"]


def test_given_splits_are_kept():
    items = [Item("a", "1", "a", "train"), Item("b", "2", "a", "query"), Item("c", "2", "b", "gallery")]
    assert split_test(items, 0.5, 0, "market") == items


@pytest.mark.parametrize(("identities", "warned"), [(20, True), (2000, False)])
def test_a_share_of_few_identities_that_scatters_is_named(identities, warned, caplog):
    items = items_of([(f"car{n}", camera) for n in range(identities) for camera in "ab"], UNASSIGNED)
    tested = {item.identity for item in split_test(items, 0.5, 0, "market") if item.split != "train"}
    assert (f"{len(tested)} of 20 identities are drawn for the test set" in caplog.text) == warned
