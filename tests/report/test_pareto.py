"""The chart of quality against cost."""

import pytest

from pipeline.report.pareto import SMALLEST_SPAN, Point, plot_pareto

POINTS = [
    Point("teacher", 0.668, 80_300_000),
    Point("student", 0.672, 27_900_000),
    Point("model.onnx", 0.672, 27_900_000),
]


def test_points_lie_at_their_macs_and_map():
    (chart,) = plot_pareto(POINTS).axes
    drawn = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in chart.get_lines()}
    assert drawn == {point.name: (point.macs / 1e6, point.map) for point in POINTS}


def test_coinciding_points_differ_in_shape_and_size():
    (chart,) = plot_pareto(POINTS).axes
    looks = [(line.get_marker(), line.get_markersize()) for line in chart.get_lines()]
    assert len({shape for shape, _ in looks}) == len({size for _, size in looks}) == len(POINTS)
    assert all(line.get_markerfacecolor() == "none" for line in chart.get_lines())


def test_small_differences_do_not_look_large():
    (chart,) = plot_pareto(POINTS).axes
    low, high = chart.get_ylim()
    assert high - low == pytest.approx(SMALLEST_SPAN)
    assert chart.get_xlim()[0] == 0


def test_the_axis_stays_within_zero_and_one_and_includes_all_points():
    points = [Point("good", 1.0, 10), Point("bad", 0.0, 5)]
    (chart,) = plot_pareto(points).axes
    assert chart.get_ylim() == (0, 1)


def test_any_number_of_further_points_is_drawn():
    (chart,) = plot_pareto([*POINTS, *(Point(f"baseline {n}", 0.6, 10 * n) for n in range(1, 12))]).axes
    assert len(chart.get_lines()) == len(POINTS) + 11


def test_no_points_are_an_error():
    with pytest.raises(ValueError, match="nothing"):
        plot_pareto([])
