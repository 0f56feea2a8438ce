"""All protocols against slow, literal implementations of their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.protocols import PROTOCOLS
from pipeline.retrieval.metrics import average_precision
from pipeline.retrieval.scoring import DRAWS, Side, evaluate, positives, scores
from pipeline.search.reranking import Reranked

DIM = 16  # vectors of +-1 have length 4: cosines are multiples of 1/16, exact in float32, with many ties


def walk(ranked, trapezoid):
    """Return AP, first rank and INP by walking down (positive, ignored) pairs, best first."""
    ranked = [positive for positive, ignored in ranked if not ignored]
    hits, first, area, last, before = 0, 0, 0.0, 0, 1.0
    for position, positive in enumerate(ranked, start=1):
        hits += positive
        precision = hits / position
        if positive:
            first, last = first or position, position
            area += (before + precision) / 2 if trapezoid else precision
        before = precision
    return (area / hits, first, hits / last) if hits else (np.nan, 0, np.nan)


def literal(query, gallery, positive, ignored, trapezoid=False, optimistic=False):
    """Score every query by its masks (G,) of the positives and of the ignored images."""
    results = []
    for vector, right, out in zip(query, positive, ignored, strict=True):
        cosines = gallery @ vector / np.maximum(np.linalg.norm(gallery, axis=1) * np.linalg.norm(vector), 1e-300)
        keys = [(-cosine, is_positive != optimistic) for cosine, is_positive in zip(cosines, right, strict=True)]
        order = sorted(range(len(gallery)), key=lambda index, keys=keys: keys[index])
        results.append(walk([(right[index], out[index]) for index in order], trapezoid))
    return [np.array(column) for column in zip(*results, strict=True)]


def masks(protocol, query_ids, gallery_ids, query_cameras, gallery_cameras):
    same = query_ids[:, None] == gallery_ids
    if protocol.startswith("market"):
        ignored = (gallery_ids == "-1") | (same & (query_cameras[:, None] == gallery_cameras))
    elif protocol == "loo":
        ignored = np.eye(len(query_ids), dtype=bool)
    else:
        ignored = np.zeros_like(same)
    return same & ~ignored, ignored


def agrees(run, expected):
    if not expected[1].any():
        with pytest.raises(ValueError, match="has a match"):
            run()
        return
    result = run()
    np.testing.assert_allclose(result.ap, expected[0], atol=1e-12, rtol=0)
    np.testing.assert_array_equal(result.first_rank, expected[1])
    np.testing.assert_allclose(result.inp, expected[2], atol=1e-12, rtol=0)


def sides(draw, smallest=1):
    signs = st.sampled_from([-1.0, 1.0])
    result = []
    for largest in (9, 40):
        n = draw(st.integers(smallest, largest))
        vectors = draw(hnp.arrays(np.float64, (n, DIM), elements=signs))
        ids = draw(st.lists(st.sampled_from(["-1", "0", "007", "7", "b"]), min_size=n, max_size=n))
        cameras = draw(st.lists(st.sampled_from(["c1", "c2", "c3"]), min_size=n, max_size=n))
        result.append(Side(vectors, np.array(ids), np.array(cameras)))
    return result


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 10), st.sampled_from(["negatives first", "positives first"]))
@pytest.mark.parametrize("protocol", ["market", "market-trapezoid", "query-gallery"])
def test_a_given_gallery_agrees_with_the_definition(protocol, data, block, ties):
    query, gallery = sides(data.draw)
    positive, ignored = masks(protocol, query.identities, gallery.identities, query.cameras, gallery.cameras)
    expected = literal(
        query.vectors, gallery.vectors, positive, ignored, protocol == "market-trapezoid", ties == "positives first"
    )
    agrees(lambda: evaluate(protocol, query, gallery, block=block, ties=ties), expected)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 10))
def test_protocol_loo_agrees_with_the_definition(data, block):
    query = sides(data.draw)[1]
    expected = literal(query.vectors, query.vectors, *masks("loo", query.identities, query.identities, None, None))
    agrees(lambda: evaluate("loo", query, block=block), expected)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_galleries_have_one_image_per_identity_and_agree_with_the_definition(data):
    query = sides(data.draw)[1]
    if len(set(query.identities)) == len(query.identities):
        return
    result = evaluate("vehicleid", query)
    means = []
    for draw in range(DRAWS):
        selected = result.draw == draw
        queries = result.query[selected]
        gallery = np.setdiff1d(np.arange(len(query.identities)), queries)
        assert sorted(query.identities[gallery]) == sorted(set(query.identities))
        same = query.identities[queries][:, None] == query.identities[gallery]
        ap, first, _ = literal(query.vectors[queries], query.vectors[gallery], same, np.zeros_like(same))
        np.testing.assert_allclose(result.ap[selected], ap, atol=1e-12, rtol=0)
        np.testing.assert_array_equal(result.first_rank[selected], first)
        means.append(ap.mean())
    reported = scores("vehicleid", result)
    assert reported.map == pytest.approx(np.mean(means), abs=1e-12)
    assert reported.map_deviation == pytest.approx(np.std(means, ddof=1), abs=1e-12)
    np.testing.assert_array_equal(evaluate("vehicleid", query).query, result.query)


def test_trapezoidal_ap_is_that_of_the_official_script():
    # positives at 2 and 3: (0/1 + 1/2) / 2, then (1/2 + 2/3) / 2
    assert average_precision(np.array([2, 3]), True) == pytest.approx(((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision(np.array([1]), True) == 1.0


@given(st.sets(st.integers(1, 60), min_size=1))
def test_trapezoidal_ap_is_never_above_the_mean_of_precisions(ranks):
    ranks = np.array(sorted(ranks))
    assert average_precision(ranks, True) <= average_precision(ranks, False) + 1e-15


def angles(*degrees, ids):
    radians = np.deg2rad(degrees)
    return Side(np.stack([np.cos(radians), np.sin(radians)], 1), np.array(ids))


def test_recall_is_reported_under_protocols_that_use_it():
    result = scores("loo", evaluate("loo", angles(0, 10, 21, 90, ids=["a", "b", "a", "b"])))
    assert result.recall == {"1": 0.0, "2": 0.75, "4": 1.0, "8": 1.0, "10": 1.0, "100": 1.0, "1000": 1.0}
    assert scores("query-gallery", evaluate("query-gallery", *[angles(0, ids=["a"])] * 2)).recall["30"] == 1.0


def test_loo_drops_and_counts_single_images_and_matches_equal_images():
    images = angles(0, 0, 50, ids=["a", "a", "single"])
    result = scores("loo", evaluate("loo", images))
    assert (result.map, result.queries, result.dropped) == (1.0, 3, 1)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_positives_returns_the_masks_that_are_scored(name):
    rng = np.random.default_rng(0)
    ids, cameras = rng.integers(-1, 4, 30).astype(str), rng.integers(0, 3, 30).astype(str)
    query = Side(rng.normal(size=(30, 8)), ids, cameras)
    result = evaluate(name, query, query if PROTOCOLS[name].gallery == "given" else None)
    if PROTOCOLS[name].gallery == "drawn":
        return
    pairs = [positives(PROTOCOLS[name], query, index, query) for index in range(30)]
    positive, ignored = (np.array(column) for column in zip(*pairs, strict=True))
    ap, *_ = literal(query.vectors, query.vectors, positive, ignored, PROTOCOLS[name].trapezoid)
    np.testing.assert_allclose(result.ap, ap, atol=1e-12, rtol=0)


def test_missing_galleries_and_cameras_are_refused_with_a_remedy():
    side = angles(0, 90, ids=["a", "b"])
    with pytest.raises(ValueError, match="needs the cameras of the query; without them use query-gallery"):
        evaluate("market", side, side)
    with pytest.raises(ValueError, match="loo takes no gallery"):
        evaluate("loo", side, angles(0, 90, ids=["a", "c"]))
    with pytest.raises(ValueError, match="query-gallery needs a gallery"):
        evaluate("query-gallery", side)
    with pytest.raises(ValueError, match="no protocol 'voc'; use one of market, "):
        evaluate("voc", side)


def zhong(query, gallery, k1, k2, weight):
    """Re-rank as the published code does, loop by loop, in float64."""
    vectors = np.concatenate([query, gallery])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distance = np.maximum(2 - 2 * vectors @ vectors.T, 0)
    distance = (distance / distance.max(axis=0)).T
    count = len(vectors)
    ranks = np.argsort(distance, axis=1, kind="stable")
    encoded = np.zeros((count, count))
    for i in range(count):
        forward = ranks[i, : k1 + 1]
        reciprocal = forward[[i in ranks[j, : k1 + 1] for j in forward]]
        expansion = list(reciprocal)
        half = round(k1 / 2)
        for candidate in reciprocal:
            near = ranks[candidate, : half + 1]
            theirs = near[[candidate in ranks[j, : half + 1] for j in near]]
            if len(set(theirs) & set(reciprocal)) > 2 / 3 * len(theirs):
                expansion.extend(theirs)
        expansion = sorted(set(expansion))
        weights = np.exp(-distance[i, expansion])
        encoded[i, expansion] = weights / weights.sum()
    encoded = np.array([encoded[ranks[i, :k2]].mean(axis=0) for i in range(count)])
    final = np.empty((len(query), len(gallery)))
    for i in range(len(query)):
        for j in range(len(gallery)):
            common = np.minimum(encoded[i], encoded[len(query) + j]).sum()
            final[i, j] = (1 - common / (2 - common)) * (1 - weight) + distance[i, len(query) + j] * weight
    return final


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (5, 1), (3, 2)])
def test_reranking_agrees_with_the_published_code(k1, k2):
    rng = np.random.default_rng(k1)
    centres = rng.normal(size=(6, 8))
    query, gallery = (centres[rng.integers(0, 6, n)] + 0.5 * rng.normal(size=(n, 8)) for n in (11, 47))
    query, gallery = query.astype(np.float32), gallery.astype(np.float32)
    distances = 1 - Reranked(query, gallery, k1, k2)(0, len(query))
    expected = zhong(query.astype(np.float64), gallery.astype(np.float64), k1, k2, 0.3)
    np.testing.assert_allclose(distances, expected, atol=2e-6, rtol=0)  # cosines are float32


def test_reranking_helps_if_identities_are_curves_in_embedding_space():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(4), 30)
    position = rng.uniform(0, 1.5, len(ids))
    vectors = np.stack([np.cos(position), np.sin(position), 0.35 * ids, 1 + 0 * position], 1) + 0.01 * rng.normal(
        size=(120, 4)
    )
    query = Side(vectors, ids.astype(str))
    assert evaluate("loo", query, similarity=Reranked).map > evaluate("loo", query).map + 0.05


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e39, 1e300])
def test_vectors_of_any_length_keep_their_direction(scale):
    rng = np.random.default_rng(0)
    query, gallery = (Side(rng.normal(size=(20, 8)), rng.integers(0, 4, 20).astype(str)) for _ in range(2))
    expected = evaluate("query-gallery", query, gallery)
    scaled = [Side(side.vectors * scale, side.identities) for side in (query, gallery)]
    np.testing.assert_array_equal(evaluate("query-gallery", *scaled).ap, expected.ap)
    if 1e-38 < scale < 1e38:
        single = [Side((side.vectors * scale).astype(np.float32), side.identities) for side in (query, gallery)]
        np.testing.assert_array_equal(evaluate("query-gallery", *single).first_rank, expected.first_rank)


def test_queries_are_counted_once_for_all_draws():
    query = Side(np.eye(6), np.array(list("aabbcc")))
    assert scores("vehicleid", evaluate("vehicleid", query)).queries == 3


@pytest.mark.parametrize("name", ["loo", "vehicleid"])
def test_the_same_images_by_another_network_can_be_the_gallery(name):
    """A query is still ignored in its own gallery, which has another network's embeddings."""
    rng = np.random.default_rng(4)
    ids = np.repeat([str(number) for number in range(8)], 4)
    query, gallery = (Side(rng.standard_normal((32, 6)).astype(np.float32), ids) for _ in range(2))
    assert evaluate(name, query, query).map == evaluate(name, query).map
    result = evaluate(name, query, gallery)
    if name == "loo":
        same = ids[:, None] == ids
        ignored = np.eye(32, dtype=bool)
        ap, *_ = literal(query.vectors, gallery.vectors, same & ~ignored, ignored, False)
        np.testing.assert_allclose(result.ap, ap, atol=1e-12, rtol=0)
    assert result.map != evaluate(name, query).map
