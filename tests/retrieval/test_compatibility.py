"""Whether an old gallery can be kept for a new network."""

import numpy as np
import pytest

from pipeline.retrieval.compatibility import Compatibility, compare
from pipeline.retrieval.scoring import Side


def side(*degrees: float, ids: str, length: int = 2) -> Side:
    vectors = np.zeros((len(degrees), length), np.float32)
    vectors[:, :2] = [(np.cos(np.radians(d)), np.sin(np.radians(d))) for d in degrees]
    return Side(vectors, np.array(list(ids)))


OLD = side(0, 90, ids="ab"), side(10, 80, 100, ids="aba")


def test_a_rotated_embedding_space_scores_the_same_alone_and_worse_in_the_old_gallery():
    rotated = side(180, 270, ids="ab"), side(190, 260, 280, ids="aba")
    result = compare("query-gallery", OLD, rotated)
    old = ((1 + 2 / 3) / 2 + 1 / 2) / 2  # a: ranks 1, 3; b: 100 degrees ties with 80, and negatives come first
    assert (result.old, result.new) == (pytest.approx(old), pytest.approx(old))
    assert result.mixed < result.old
    assert not result.compatible
    assert result.verdict.startswith("embed the gallery again: in the old gallery, new queries reach mAP 0.")


def test_better_queries_of_the_same_embedding_space_are_compatible():
    result = compare("query-gallery", OLD, (side(0, 89, ids="ab"), OLD[1]))
    assert result.mixed == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert result.compatible
    assert (
        result.verdict
        == "the gallery can be kept: in the old gallery, new queries reach mAP 0.9167, old queries 0.6667"
    )


def test_embeddings_of_another_dimension_are_not_compatible():
    longer = tuple(side(*degrees, ids=ids, length=3) for degrees, ids in (((0, 90), "ab"), ((10, 80, 100), "aba")))
    result = compare("query-gallery", OLD, longer)
    assert (result.mixed, result.compatible) == (None, False)
    assert result.verdict == "embeddings have different dimensions: embed the gallery again"


def test_equal_map_is_compatible_and_nan_is_not():
    assert Compatibility(0.5, 0.9, 0.5).compatible
    assert not Compatibility(0.5, 0.9, float("nan")).compatible
