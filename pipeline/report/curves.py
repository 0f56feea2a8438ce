"""What happened in training: losses, validation mAP and, for the student, what was left of it after each epoch."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.style import STUDENT, TEACHER, new_figure, percent, styled

Curves = Mapping[str, npt.NDArray[np.float64]]
"""Columns of plots/<stage>.csv by name, (epochs,) each; NaN where nothing was measured."""

EPOCH, VALIDATION = "epoch", "validation_map"
REDUCTIONS = {
    "target_reduction": ("allowed by the schedule", "--", TEACHER),
    "macs_reduction": ("MACs", "o-", STUDENT),
    "params_reduction": ("parameters", "s-", "#e69f00"),
    "latency_reduction": ("latency", "^-", "#cc79a7"),
}
"""Columns that tell what is gone: name, line and colour of what is left. A method has those that it knows."""


def read_curves(path: Path) -> Curves:
    """Read plots/<stage>.csv.

    Raises:
        FileNotFoundError: Where the stage has not run.
        ValueError: If there is no epoch in it.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or EPOCH not in rows[0]:
        raise ValueError(f"{path} holds no epochs; run `dvc repro --force` for its stage")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def loss_names(curves: Curves) -> list[str]:
    """Columns that are neither the epoch, nor a reduction, nor a score."""
    return [name for name in curves if name not in (EPOCH, VALIDATION, *REDUCTIONS)]


def capacity(student: Curves) -> Figure:
    """What is left of the student and how well it retrieves, epoch by epoch.

    Args:
        student: Curves with some of `REDUCTIONS` and `VALIDATION`.
    """
    with styled():
        figure = new_figure(5.4)
        left, score = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        epochs = student[EPOCH]
        for column, (label, line, colour) in REDUCTIONS.items():
            if column in student:
                left.plot(epochs, 1 - student[column], line, color=colour, label=label)
        left.set(title="Share of the network that is left", ylim=(0, 1.05))
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=4)
        percent(left)
        _measured(score, epochs, student[VALIDATION], "o-", STUDENT, "student")
        score.set(title="Validation mAP, held-out training identities", xlabel="epoch")
        score.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def training(teacher: Curves, student: Curves) -> Figure:
    """Every loss and the validation mAP of teacher and student, one small chart each.

    Args:
        teacher: Curves of stage teacher.
        student: Curves of stage student; they may have losses that the teacher has not.
    """
    names = [VALIDATION, *dict.fromkeys([*loss_names(teacher), *loss_names(student)])]
    titles = {VALIDATION: "validation mAP"}
    lines = (("teacher", teacher, "s--", TEACHER), ("student", student, "o-", STUDENT))
    rows = -(-len(names) // 2)
    with styled():
        figure = new_figure(0.4 + 2.1 * rows)
        charts = figure.subplots(rows, 2, squeeze=False).flat
        for name, chart in zip(names, charts, strict=False):
            for label, curves, style, colour in lines:
                if name in curves:
                    _measured(chart, curves[EPOCH], curves[name], style, colour, label)
            chart.set_title(titles.get(name, name.replace("_", " ")))
            chart.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        for chart in list(figure.axes)[len(names) :]:
            chart.remove()
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        figure.supxlabel("epoch", fontsize=11)
    return figure


def _measured(
    chart: Axes, epochs: npt.NDArray[np.float64], values: npt.NDArray[np.float64], style: str, colour: str, label: str
) -> None:
    """Plot the epochs in which something was measured, joined across the others."""
    there = np.isfinite(values)
    chart.plot(epochs[there], values[there], style, color=colour, label=label)
