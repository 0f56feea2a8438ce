"""Image panels."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from pipeline.protocols import PROTOCOLS
from pipeline.report.panels import Ranking, choose_queries, describe, plot_panel, rank
from pipeline.report.style import CORRECT_COLOR, WRONG_COLOR
from pipeline.retrieval.scoring import Side, evaluate, positives

NAN = float("nan")
precisions = st.lists(
    st.tuples(*[st.one_of(st.just(NAN), st.integers(0, 8).map(lambda n: n / 8))] * 2), min_size=1, max_size=30
)


def test_half_of_the_queries_are_spread_over_ap_and_half_differ_most():
    teacher = np.array([0.9, 0.1, 0.5, 0.8, 0.2, 0.6])
    student = np.array([0.9, 0.9, 0.5, 0.1, 0.2, 0.6])
    choices = choose_queries(teacher, student, 4)
    # differing: 1 (by 0.8), 3 (by 0.7); of the rest with AP 0.9, 0.6, 0.5, 0.2 those at one and three quarters
    assert [choice.query for choice in choices] == [5, 4, 1, 3]
    assert [choice.reason.split()[0] for choice in choices] == ["spread", "spread", "largest", "largest"]


def test_a_single_panel_shows_the_query_of_median_ap():
    ap = np.array([1.0, 0.5, 0.0])
    assert [choice.query for choice in choose_queries(ap, ap, 1)] == [1]


@settings(deadline=None)
@given(precisions, st.integers(1, 12))
def test_chosen_queries_are_distinct_valid_and_as_many_as_possible(pairs, count):
    teacher, student = np.array(pairs).T
    queries = [choice.query for choice in choose_queries(teacher, student, count)]
    valid = np.isfinite(teacher) & np.isfinite(student)
    assert len(queries) == len(set(queries)) == min(count, valid.sum())
    assert valid[queries].all()


@settings(deadline=None)
@given(precisions, st.integers(1, 12))
def test_no_other_query_differs_more_than_those_chosen_for_their_difference(pairs, count):
    teacher, student = np.array(pairs).T
    choices = choose_queries(teacher, student, count)
    differing = [choice.query for choice in choices if choice.reason.startswith("largest")]
    gaps = np.abs(teacher - student)
    others = np.delete(gaps, differing)
    if differing and np.isfinite(others).any():
        assert gaps[differing].min() >= np.nanmax(others)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_the_ranking_is_the_one_that_is_evaluated(seed):
    rng = np.random.default_rng(seed)
    ids, cameras = rng.choice(["-1", "0", "1", "2"], 40), rng.choice(["a", "b", "c"], 40)
    # Unit vectors with exact dot products in any order of summation, so that ties are ties on every processor.
    halves = np.array(list(itertools.product((-0.5, 0.5), repeat=4)))
    exact = np.concatenate([halves, np.eye(4), -np.eye(4), np.zeros((1, 4))]).astype(np.float32)
    gallery, query = rng.choice(exact, 40), rng.choice(exact, 1)
    gallery[0], ids[0], cameras[0] = query[0], "1", "b"

    sides = Side(query, np.array(["1"]), np.array(["a"])), Side(gallery, ids, cameras)
    order = rank(query[0], gallery, *positives(PROTOCOLS["market"], sides[0], 0, sides[1]), top=40)

    assert not (ids[order] == "-1").any()
    assert not ((ids[order] == "1") & (cameras[order] == "a")).any()
    ranks = np.flatnonzero(ids[order] == "1") + 1
    ap = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    expected = evaluate("market", *sides).ap[0]
    assert ap == pytest.approx(expected, abs=1e-12)


def rankings(height=8, width=8):
    images = np.zeros((3, height, width, 3), dtype=np.uint8)
    return [
        Ranking("teacher", images, 0.5, np.array([True, False, True])),
        Ranking("student", images, 0.25, np.array([False, False, True])),
    ]


def test_correct_and_wrong_images_differ_in_colour_and_mark():
    (chart,) = plot_panel(np.zeros((8, 8, 3), dtype=np.uint8), rankings()).axes
    frames = [
        to_hex(patch.get_edgecolor())
        for patch in chart.patches
        if isinstance(patch, Rectangle) and not patch.get_fill()
    ]
    assert frames == [CORRECT_COLOR, WRONG_COLOR, CORRECT_COLOR, WRONG_COLOR, WRONG_COLOR, CORRECT_COLOR]
    marks = [text.get_text() for text in chart.texts if text.get_text() in "✓✕"]
    assert marks == ["✓", "✕", "✓", "✕", "✕", "✓"]


def test_a_panel_shows_the_name_and_ap_of_each_ranking():
    (chart,) = plot_panel(np.zeros((8, 8, 3), dtype=np.uint8), rankings()).axes
    assert {"query", "teacher", "student", "AP 0.50", "AP 0.25"} <= {text.get_text() for text in chart.texts}


def test_images_keep_their_aspect_ratio():
    (chart,) = plot_panel(np.zeros((16, 8, 3), dtype=np.uint8), rankings(16, 8)).axes
    assert len(chart.images) == 1 + 3 + 3
    for image in chart.images:
        left, right, bottom, top = image.get_extent()
        assert (bottom - top) / (right - left) == pytest.approx(2)


def test_a_ranking_is_described_in_words():
    first, second = rankings()
    assert describe(first) == "teacher: correct at rank 1, 3 of the first 3, AP 0.50"
    nothing = Ranking("student", second.images, 0.0, np.zeros(3, dtype=bool))
    assert describe(nothing) == "student: none correct of the first 3, AP 0.00"
