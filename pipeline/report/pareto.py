"""Quality against cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from pipeline.report.style import OTHERS, STUDENT, TEACHER, new_figure, styled

MARKERS = "soD^vP*X"
SMALLEST_SPAN = 0.1
"""Least height of the mAP axis: differences of some thousandths must not look like cliffs."""


@dataclass(frozen=True)
class Point:
    """A network or file that was evaluated.

    Attributes:
        name: What the reader calls it.
        map: Its mAP on query and gallery, a fraction.
        macs: Multiply-accumulates for one image.
    """

    name: str
    map: float
    macs: int


def pareto(points: Sequence[Point]) -> Figure:
    """MACs and mAP of all points; the first is the teacher, the second the student, others may follow.

    Args:
        points: At least one. Points that coincide stay visible: markers are hollow and differ in shape and size.

    Raises:
        ValueError: If there is no point.
    """
    if not points:
        raise ValueError("no network was evaluated, so there is nothing to plot")
    colours = [TEACHER, STUDENT, *OTHERS]
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
        chart.set(xlabel="million MACs an image (left is cheaper)", ylabel="mAP (up is better)")
        figure.legend(*chart.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure
