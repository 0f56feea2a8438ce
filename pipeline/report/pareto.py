"""Chart of retrieval quality against computational cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from pipeline.report.style import OTHER_COLORS, STUDENT_COLOR, TEACHER_COLOR, new_figure, styled

MARKERS = "soD^vP*X"
SMALLEST_SPAN = 0.1
"""Smallest height of the mAP axis, so that differences of a few thousandths do not look large."""


@dataclass(frozen=True)
class Point:
    """An evaluated network or file.

    Attributes:
        map: mAP on the test set, in [0, 1].
        macs: Multiply-accumulates per image.
    """

    name: str
    map: float
    macs: int


def plot_pareto(points: Sequence[Point]) -> Figure:
    """Plot mAP against MACs.

    Markers are hollow and differ in shape and size, so that coinciding points stay visible.

    Args:
        points: The teacher, then the student, then any others.

    Raises:
        ValueError: If there are no points.
    """
    if not points:
        raise ValueError("no network was evaluated, so there is nothing to plot")
    colours = [TEACHER_COLOR, STUDENT_COLOR, *OTHER_COLORS]
    with styled():
        figure = new_figure(4.4)
        chart = figure.subplots()
        for number, point in enumerate(points):
            chart.plot(
                point.macs / 1e6,
                point.map,
                MARKERS[number % len(MARKERS)],
                markersize=9 + 5 * (number % 3),
                markerfacecolor="none",
                markeredgewidth=2.2,
                markeredgecolor=colours[number % len(colours)],
                label=point.name,
            )
        scores = [point.map for point in points]
        middle, span = (max(scores) + min(scores)) / 2, max(SMALLEST_SPAN, 1.4 * (max(scores) - min(scores)))
        chart.set_ylim(max(0.0, middle - span / 2), min(1.0, middle + span / 2))
        chart.set_xlim(0, 1.12 * max(point.macs for point in points) / 1e6)
        chart.set(xlabel="million MACs per image (left is cheaper)", ylabel="mAP (up is better)")
        figure.legend(*chart.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure
