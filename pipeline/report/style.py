"""Style of all charts of the report: palette, fonts, and how they are saved.

The palette is that of Okabe and Ito (Color Universal Design, 2008) plus a grey, which colour-blind readers can tell
apart; shapes or words repeat what colours show.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.files import write_atomically

TEACHER_COLOR, STUDENT_COLOR = "#5b6770", "#0072b2"
CORRECT_COLOR, WRONG_COLOR = "#009e73", "#d55e00"
TEXT_COLOR, GRID_COLOR = "#1d2429", "#d9dee2"
OTHER_COLORS = ("#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#d55e00")

WIDTH = 6.4
"""Width of a chart, inches: its 11 pt text stays readable on a phone, which shows the chart 360 pixels wide."""

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",  # ships with matplotlib, so charts look the same on every machine
    "text.color": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": "#7c878f",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID_COLOR,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.2,
    "lines.markersize": 5,
    "xtick.color": "#4a555c",
    "ytick.color": "#4a555c",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style inside the block, ignoring the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Create a figure without a display or global state; height and width are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically; equal figures give equal bytes."""
    with styled():
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def percent(axis: Axes, which: str = "y") -> None:
    """Label an axis with range [0, 1] in percent."""
    getattr(axis, f"{which}axis").set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
