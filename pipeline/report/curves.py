"""Charts of the training: losses, validation mAP, and the remaining cost of the student after each epoch."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.style import STUDENT_COLOR, TEACHER_COLOR, new_figure, percent, styled

Curves = Mapping[str, npt.NDArray[np.float64]]
"""Columns of plots/<stage>.csv by name, (epochs,) each; NaN where nothing was measured."""

EPOCH, VALIDATION = "epoch", "validation_map"
REDUCTIONS = {
    "target_reduction": ("allowed by the schedule", "--", TEACHER_COLOR),
    "macs_reduction": ("MACs", "o-", STUDENT_COLOR),
    "params_reduction": ("parameters", "s-", "#e69f00"),
    "latency_reduction": ("latency", "^-", "#cc79a7"),
}
"""Label, line style and colour of the remaining share, by column; which columns exist depends on the method."""


ROWS = ("masked_rows", "norm_of_masked_rows", "norm_of_other_rows")
"""Columns of method `paper`: the share of masked compactor rows, and the mean norm of these and of the other rows."""


def read_curves(path: Path) -> Curves:
    """Read plots/<stage>.csv.

    Raises:
        FileNotFoundError: If the stage has not run.
        ValueError: If the file has no epochs.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or EPOCH not in rows[0]:
        raise ValueError(f"{path} has no epochs; run `dvc repro --force` for its stage")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def loss_names(curves: Curves) -> list[str]:
    """Return the columns that are neither the epoch, nor a reduction, nor the validation mAP, nor about rows."""
    return [name for name in curves if name not in (EPOCH, VALIDATION, *REDUCTIONS, *ROWS)]


def plot_capacity(student: Curves) -> Figure:
    """Plot the remaining cost of the student, as a share of that before compression, and its validation mAP by epoch.

    Args:
        student: Curves with some of `REDUCTIONS`, and with `VALIDATION` if identities were held out.
    """
    with styled():
        validated = VALIDATION in student
        figure = new_figure(5.4 if validated else 3.4)
        charts = figure.subplots(1 + validated, 1, sharex=True, squeeze=False, height_ratios=(3, 2)[: 1 + validated])
        remaining, last = charts[0, 0], charts[-1, 0]
        epochs = student[EPOCH]
        for column, (label, line, colour) in REDUCTIONS.items():
            if column in student:
                remaining.plot(epochs, 1 - student[column], line, color=colour, label=label)
        remaining.set(title="Remaining share of the network", ylim=(0, 1.05))
        figure.legend(*remaining.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        percent(remaining)
        if validated:
            _plot_measured(last, epochs, student[VALIDATION], "o-", STUDENT_COLOR, "student")
            last.set_title("Validation mAP, on held-out training identities")
        last.set_xlabel("epoch")
        last.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_training(teacher: Curves, student: Curves) -> Figure:
    """Plot validation mAP, every loss of teacher and student, and rows of compactors, one small chart each."""
    validation = [VALIDATION] if VALIDATION in {*teacher, *student} else []
    losses = dict.fromkeys([*loss_names(teacher), *loss_names(student)])
    names = [*validation, *losses, *(name for name in ROWS if name in student)]
    titles = {VALIDATION: "validation mAP"}
    lines = (("teacher", teacher, "s--", TEACHER_COLOR), ("student", student, "o-", STUDENT_COLOR))
    rows = -(-len(names) // 2)
    with styled():
        figure = new_figure(0.4 + 2.1 * rows)
        charts = figure.subplots(rows, 2, squeeze=False).flat
        for name, chart in zip(names, charts, strict=False):
            for label, curves, style, colour in lines:
                if name in curves:
                    _plot_measured(chart, curves[EPOCH], curves[name], style, colour, label)
            chart.set_title(titles.get(name, name.replace("_", " ")))
            chart.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        for chart in list(figure.axes)[len(names) :]:
            chart.remove()
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        figure.supxlabel("epoch", fontsize=11)
    return figure


def _plot_measured(
    chart: Axes, epochs: npt.NDArray[np.float64], values: npt.NDArray[np.float64], style: str, colour: str, label: str
) -> None:
    """Plot the measured epochs, connected across those without a value."""
    measured = np.isfinite(values)
    chart.plot(epochs[measured], values[measured], style, color=colour, label=label)
