"""How every picture of the report looks: one palette, safe for colour-blind readers, and one way to the disk.

The colours are those of Okabe and Ito (Color Universal Design, 2008) and a grey; what a colour says, a shape or a word
says too.
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

TEACHER, STUDENT = "#5b6770", "#0072b2"
RIGHT, WRONG = "#009e73", "#d55e00"
INK, RULE = "#1d2429", "#d9dee2"
OTHERS = ("#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#d55e00")

WIDTH = 6.4
"""Width of a chart, inches: its 11 pt text stays readable on a phone, where the chart is 360 pixels wide."""

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that pictures are the same on every machine
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#7c878f",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
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
    """Draw inside of this, with the house's style and nothing of the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of this size in inches that needs no display and no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, atomically; same figure, same bytes."""
    with styled():
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def percent(axis: Axes, which: str = "y") -> None:
    """Label a 0..1 axis in percent."""
    getattr(axis, f"{which}axis").set_major_formatter(lambda value, _: f"{value:.0%}".replace("%", " %"))
