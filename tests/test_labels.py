"""Labels of identities and cameras."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.labels import clean_label, is_fraction, is_missing_value, look_alikes


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [
        ("car1 ", "car1"),
        ("\tcar1\r\n", "car1"),
        ("\u00a0car1\u200b ", "car1"),
        ("\ufeffcar1", "car1"),
        ("car1\u200e", "car1"),
        ("\u200b", ""),
        ("Mu\u0308ller", "M\u00fcller"),
        ("car  1", "car  1"),
        ("007", "007"),
    ],
)
def test_labels_are_trimmed_and_normalised(written, cleaned):
    assert clean_label(written) == cleaned


@given(st.text())
def test_a_clean_label_stays_as_it_is_in_every_normal_form(text):
    cleaned = clean_label(text)
    assert clean_label(cleaned) == cleaned
    assert clean_label(unicodedata.normalize("NFD", cleaned)) == cleaned


def test_labels_that_look_alike_are_grouped():
    labels = ["Car1", "car1", "car01", "7", "007", "7.0", "70", "700", "-1", "1", "a.0", "a", "0", "00"]
    assert look_alikes(labels) == [["0", "00"], ["007", "7", "7.0"], ["Car1", "car01", "car1"]]
    assert look_alikes(["car 1", "car\u00a01", "car  1", "'7", "7", "\uff17", "car1"]) == [
        ["'7", "7", "\uff17"],
        ["car  1", "car 1", "car\u00a01"],
    ]


def test_numbers_with_a_fraction_of_zero_are_found():
    assert [label for label in ("12.0", "-1.0", "12", "v1.0", "1.5", "1.00") if is_fraction(label)] == ["12.0", "-1.0"]


def test_labels_that_programs_write_for_missing_values_are_found():
    labels = ("nan", "NaN", "None", "nancy", "0", "NA", "-1")
    assert [label for label in labels if is_missing_value(label)] == ["nan", "NaN", "None", "NA"]
