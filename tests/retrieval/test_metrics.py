"""Protocol `market` against a slow, literal implementation, and known mistakes of public evaluation code."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.records import Scores
from pipeline.retrieval.metrics import Retrieval
from pipeline.retrieval.scoring import Side, evaluate, scores

DIM = 16  # vectors of +-1 have length 4: cosines are multiples of 1/16, exact in float32, with many ties


def market(query, gallery, query_ids, gallery_ids, query_cameras, gallery_cameras, **options) -> Retrieval:
    sides = Side(query, query_ids, query_cameras), Side(gallery, gallery_ids, gallery_cameras)
    return evaluate("market", *sides, **options)


def literal(query, gallery, query_ids, gallery_ids, query_cameras, gallery_cameras):
    """Return AP, first rank and INP of each query, by walking down its ranked list."""
    results = []
    for vector, identity, camera in zip(query, query_ids, query_cameras, strict=True):
        ranked = []
        for other, other_identity, other_camera in zip(gallery, gallery_ids, gallery_cameras, strict=True):
            same = other_identity == identity
            if other_identity == "-1" or (same and other_camera == camera):
                continue
            cosine = np.dot(vector, other) / np.sqrt(np.dot(vector, vector) * np.dot(other, other))
            ranked.append((-cosine, same))  # at equal cosine False (a negative) sorts first
        ranked.sort()
        hits, precisions, ranks = 0, [], []
        for position, (_, same) in enumerate(ranked, start=1):
            if same:
                hits += 1
                precisions.append(hits / position)
                ranks.append(position)
        results.append((np.mean(precisions), ranks[0], hits / ranks[-1]) if hits else (np.nan, 0, np.nan))
    return [np.array(column) for column in zip(*results, strict=True)]


@st.composite
def retrievals(draw):
    queries, gallery = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    signs = st.sampled_from([-1.0, 1.0])
    identities = st.sampled_from(["-1", "0", "007", "7", "b"])
    cameras = st.sampled_from(["c1", "c2", "c3"])
    vectors = [draw(hnp.arrays(np.float64, (n, DIM), elements=signs)) for n in (queries, gallery)]
    labels = [
        np.array(draw(st.lists(kind, min_size=n, max_size=n)))
        for kind in (identities, cameras)
        for n in (queries, gallery)
    ]
    return (*vectors, *labels)


def agrees(result: Retrieval, arrays) -> None:
    ap, first, inp = literal(*arrays)
    np.testing.assert_allclose(result.ap, ap, atol=1e-12, rtol=0)
    np.testing.assert_array_equal(result.first_rank, first)
    np.testing.assert_allclose(result.inp, inp, atol=1e-12, rtol=0)


@settings(deadline=None)
@given(retrievals(), st.integers(1, 10))
def test_scores_agree_with_the_definition_for_every_block_size(arrays, block):
    if not literal(*arrays)[1].any():
        with pytest.raises(ValueError, match="has a match"):
            market(*arrays, block=block)
    else:
        agrees(market(*arrays, block=block), arrays)


@settings(deadline=None)
@given(retrievals(), st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_a_gallery_full_of_ties(arrays, random):
    if not literal(*arrays)[1].any():
        return
    query, gallery, query_ids, gallery_ids, query_cameras, gallery_cameras = arrays
    order = random.sample(range(len(gallery)), len(gallery))
    shuffled = market(query, gallery[order], query_ids, gallery_ids[order], query_cameras, gallery_cameras[order])
    np.testing.assert_array_equal(shuffled.ap, market(*arrays).ap)


def test_duplicates_tie_at_any_position_in_the_gallery():
    # BLAS rounds equal columns differently by their position: a copy of the positive under another identity would be
    # sometimes before it, sometimes behind it.
    count = 103
    rng = np.random.default_rng(0)
    query, images = rng.normal(size=(count, 512)), rng.normal(size=(count, 512))
    images[:, 0] = 0.0
    gallery = np.concatenate([images, images, images])
    gallery[count : 2 * count, 0] = -0.0
    identities, cameras = np.arange(count).astype(str), np.full(3 * count, "c2")
    ids = np.concatenate([identities, np.full(2 * count, "other")])
    results = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(3 * count)
        result = market(query, gallery[order], identities, ids[order], np.full(count, "c1"), cameras[order])
        assert (result.first_rank % 3 == 0).all()  # every image occurs three times, the positive after its copies
        results.append(result.ap)
    assert all(np.array_equal(results[0], result) for result in results[1:])


def line(*gallery: tuple[str, str]) -> Scores:
    """Score one query (identity 1, camera c1) in a gallery of (identity, camera), sorted by similarity."""
    angles = np.linspace(0.1, 1.5, len(gallery))
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ids, cameras = (np.array(column) for column in zip(*gallery, strict=True))
    return scores("market", market(np.array([[1.0, 0.0]]), vectors, np.array(["1"]), ids, np.array(["c1"]), cameras))


def test_average_precision_is_the_mean_of_precisions_at_the_positives():
    result = line(("2", "c1"), ("1", "c2"), ("1", "c3"), ("3", "c2"), ("1", "c2"))
    assert result.map == pytest.approx((1 / 2 + 2 / 3 + 3 / 5) / 3, abs=1e-15)
    assert result.minp == pytest.approx(3 / 5, abs=1e-15)
    assert (result.rank1, result.rank5, result.queries, result.dropped) == (0.0, 1.0, 1, 0)


def test_images_of_the_same_identity_and_camera_are_ignored_and_others_of_the_camera_are_not():
    assert line(("1", "c1"), ("1", "c2")).map == 1.0
    assert line(("2", "c1"), ("1", "c2")).map == 1 / 2


def test_junk_is_ignored_and_identity_zero_is_a_distractor():
    assert line(("-1", "c2"), ("1", "c2")).map == 1.0
    assert line(("0", "c2"), ("1", "c2")).map == 1 / 2


def test_identities_are_strings():
    assert line(("01", "c2"), ("1", "c2")).map == 1 / 2


def test_a_gallery_smaller_than_ten_has_a_rank_ten():
    assert line(("2", "c2"), ("1", "c2")).rank10 == 1.0


def test_a_gallery_image_with_the_index_of_the_query_is_not_ignored():
    assert line(("1", "c2"), ("2", "c2"), ("1", "c3")).map == pytest.approx((1 + 2 / 3) / 2)


def test_near_duplicates_do_not_tie():
    gallery = np.array([[1.0, 2e-3], [1.0, 1e-3]])  # cosines 1 - 2e-6 and 1 - 5e-7
    result = market(
        np.array([[1.0, 0.0]]),
        gallery,
        np.array(["1"]),
        np.array(["2", "1"]),
        np.array(["c1"]),
        np.array(["c2", "c2"]),
    )
    assert result.rank(1) == 1.0


def test_a_collapsed_network_gets_the_worst_score():
    assert market(
        np.zeros((1, 4)),
        np.zeros((4, 4)),
        np.array(["1"]),
        np.array(["1", "2", "3", "4"]),
        np.array(["c1"]),
        np.array(["c2"] * 4),
    ).ap == pytest.approx([1 / 4])


def test_queries_without_a_match_are_not_in_the_mean_but_are_counted():
    gallery = np.array([[1.0, 0.0], [0.0, 1.0]])
    result = market(
        np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        gallery,
        np.array(["1", "nobody", "2"]),
        np.array(["1", "2"]),
        np.array(["c1", "c1", "c2"]),
        np.array(["c2", "c2"]),
    )
    means = scores("market", result)
    assert (means.map, means.rank1, means.queries, means.dropped) == (1.0, 1.0, 3, 2)


@pytest.mark.parametrize("which", ["query", "gallery"])
def test_an_embedding_that_is_not_finite_raises_with_its_row(which):
    arrays = {"query": np.ones((3, 2)), "gallery": np.ones((3, 2))}
    arrays[which][2, 1] = np.nan
    labels = np.array(["1", "2", "3"])
    with pytest.raises(ValueError, match=f"{which} embedding in row 2"):
        market(*arrays.values(), labels, labels, labels, labels)


def test_shapes_that_disagree_are_refused():
    labels = np.array(["1", "2"])
    with pytest.raises(ValueError, match="3 dimensions"):
        market(np.ones((2, 3)), np.ones((2, 4)), labels, labels, labels, labels)
    with pytest.raises(ValueError, match="gallery: 3 embeddings and 2 identities"):
        market(np.ones((2, 3)), np.ones((3, 3)), labels, labels, labels, labels)
    with pytest.raises(ValueError, match="n >= 1"):
        market(np.ones((2, 3)), np.ones((0, 3)), labels, np.array([]), labels, np.array([]))
