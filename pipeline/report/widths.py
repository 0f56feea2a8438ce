"""Chart of the channels of each layer before and after compression."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from pipeline.report.style import GRID_COLOR, STUDENT_COLOR, TEACHER_COLOR, new_figure, styled

ROW_HEIGHT = 0.24
"""Height of a layer in the chart, inches."""


def plot_widths(teacher: Mapping[str, int], student: Mapping[str, int], sites: Sequence[str]) -> Figure:
    """Draw one line per layer, from the channels of the teacher to those of the student, on a logarithmic axis.

    Layers of a removed block have 0 channels and end left of the first tick.

    Args:
        teacher: Channels by dimension name.
        student: Channels by dimension name.
        sites: Dimensions to show, from input to output.

    Raises:
        KeyError: If teacher or student lacks a site; the error names it.
        ValueError: If there are no sites.
    """
    if not sites:
        raise ValueError("no layer was compressed, so there are no widths to compare")
    before, after = (np.array([net[site] for site in sites]) for net in (teacher, student))
    rows = np.arange(len(sites))
    ticks = 2 ** np.arange(
        np.floor(np.log2(after[after > 0].min(initial=before.min()))), np.ceil(np.log2(before.max())) + 1
    )
    drawn = np.where(after > 0, after, ticks[0] / 1.5)
    with styled():
        figure = new_figure(1.3 + ROW_HEIGHT * len(sites))
        chart = figure.subplots()
        chart.hlines(rows, drawn, before, color="#9fb8c8", linewidth=3)
        chart.plot(before, rows, "s", color="white", markeredgecolor=TEACHER_COLOR, markeredgewidth=1.8, label="before")
        chart.plot(drawn, rows, "o", color=STUDENT_COLOR, markersize=7, label="after")
        for row in rows:
            chart.annotate(
                f"{after[row]} of {before[row]}",
                (before[row], row),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color="#4a555c",
            )
        chart.set_xscale("log", base=2)
        chart.set_xlim(min(drawn.min(), ticks[0]) / 1.2, before.max() * 3)  # room for the numbers at the right
        chart.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
        chart.xaxis.set_minor_locator(NullLocator())
        chart.xaxis.set_major_formatter(ScalarFormatter())
        chart.set_yticks(rows, sites, fontsize=8.5)
        chart.set_ylim(len(sites) - 0.4, -0.6)
        chart.set_xlabel("channels")
        chart.grid(axis="y", visible=False)
        for row in rows[1:]:
            if sites[row].split(".")[0] != sites[row - 1].split(".")[0]:
                chart.axhline(row - 0.5, color=GRID_COLOR, linewidth=0.8)
        figure.legend(*chart.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure
