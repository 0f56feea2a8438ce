"""Whether a gallery may stay."""

import numpy as np
import pytest

from pipeline.retrieval.compatibility import Compatibility, compare
from pipeline.retrieval.scoring import Side


def side(*degrees: float, ids: str, length: int = 2) -> Side:
    vectors = np.zeros((len(degrees), length), np.float32)
    vectors[:, :2] = [(np.cos(np.radians(d)), np.sin(np.radians(d))) for d in degrees]
    return Side(vectors, np.array(list(ids)))


OLD = side(0, 90, ids="ab"), side(10, 80, 100, ids="aba")


def test_a_turned_space_finds_as_much_alone_and_nothing_in_the_old_gallery():
    turned = side(180, 270, ids="ab"), side(190, 260, 280, ids="aba")
    found = compare("query-gallery", OLD, turned)
    old = ((1 + 2 / 3) / 2 + 1 / 2) / 2  # a: ranks 1, 3; b: 100 degrees ties with 80, and wrong ones come first
    assert (found.old, found.new) == (pytest.approx(old), pytest.approx(old))
    assert found.mixed < found.old
    assert not found.compatible
    assert found.verdict.startswith("embed the gallery anew: new queries find 0.")


def test_better_queries_of_the_same_space_may_use_it():
    found = compare("query-gallery", OLD, (side(0, 89, ids="ab"), OLD[1]))
    assert found.mixed == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert found.compatible
    assert found.verdict == "the gallery may stay: new queries find 0.9167 in it, old ones 0.6667"


def test_embeddings_of_another_length_never_fit():
    longer = tuple(side(*degrees, ids=ids, length=3) for degrees, ids in (((0, 90), "ab"), ((10, 80, 100), "aba")))
    found = compare("query-gallery", OLD, longer)
    assert (found.mixed, found.compatible) == (None, False)
    assert found.verdict == "embeddings of different lengths: embed the gallery anew"


def test_as_good_as_before_is_compatible_and_not_a_number_is_not():
    assert Compatibility(0.5, 0.9, 0.5).compatible
    assert not Compatibility(0.5, 0.9, float("nan")).compatible
