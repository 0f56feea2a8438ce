"""The chart of channels per layer."""

import pytest
from numpy.testing import assert_array_equal

from pipeline.report.widths import plot_widths

TEACHER = {"conv1": 32, "layer1.0.conv1": 32, "layer1.0.conv2": 32, "layer2.0.conv1": 64}
STUDENT = {"conv1": 32, "layer1.0.conv1": 8, "layer1.0.conv2": 32, "layer2.0.conv1": 24}
SITES = ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"]


def test_each_site_shows_both_widths_by_name():
    (chart,) = plot_widths(TEACHER, STUDENT, SITES).axes
    drawn = {line.get_label(): line.get_xdata() for line in chart.get_lines()}
    assert_array_equal(drawn["before"], [32, 32, 64])
    assert_array_equal(drawn["after"], [8, 32, 24])
    assert [text.get_text() for text in chart.texts] == ["8 of 32", "32 of 32", "24 of 64"]
    assert [label.get_text() for label in chart.get_yticklabels()] == SITES
    low, high = chart.get_xlim()
    assert low < 8
    assert high > 64


def test_a_removed_block_is_drawn_too():
    student = STUDENT | {"layer1.0.conv1": 0, "layer1.0.conv2": 0}
    (chart,) = plot_widths(TEACHER, student, SITES).axes
    assert [text.get_text() for text in chart.texts] == ["0 of 32", "0 of 32", "24 of 64"]
    low, _ = chart.get_xlim()
    drawn = {line.get_label(): line.get_xdata() for line in chart.get_lines()}["after"]
    assert all(low < x < 16 for x in drawn[:2])
    assert drawn[2] == 24


def test_the_first_layer_is_on_top():
    (chart,) = plot_widths(TEACHER, STUDENT, SITES).axes
    bottom, top = chart.get_ylim()
    assert bottom > top


def test_a_deep_network_gets_a_taller_chart():
    many = {f"layer1.{block}.conv1": 64 for block in range(60)}
    assert (
        plot_widths(many, many, list(many)).get_figheight() > 3 * plot_widths(TEACHER, STUDENT, SITES).get_figheight()
    )


def test_the_error_names_an_unknown_site():
    with pytest.raises(KeyError, match=r"layer9\.0\.conv1"):
        plot_widths(TEACHER, STUDENT, [*SITES, "layer9.0.conv1"])


def test_no_sites_are_an_error():
    with pytest.raises(ValueError, match="no layer"):
        plot_widths(TEACHER, STUDENT, [])
