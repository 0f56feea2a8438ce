"""Chart of method `paper` in ladder `paper`: masks, rows and remaining cost of each student by epoch."""

from collections.abc import Mapping
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.curves import EPOCH, Curves
from pipeline.report.style import OTHER_COLORS, STUDENT_COLOR, new_figure, percent, styled

COLORS = (STUDENT_COLOR, *OTHER_COLORS)


def plot_rows(students: Mapping[str, Curves]) -> Figure:
    """Plot the share of masked rows, the mean norm of masked and of other rows, and the remaining MACs.

    Args:
        students: Curves of each student by its name; a norm is missing if there never were such rows.
    """
    with styled():
        figure = new_figure(7.2)
        masks, norms, cost = figure.subplots(3, 1, sharex=True)
        for color, (name, curves) in zip(cycle(COLORS), students.items(), strict=False):
            epochs = curves[EPOCH]
            masks.plot(epochs, curves["masked_rows"], color=color, label=name)
            for rows, line in (("masked", "--"), ("other", "-")):
                if (column := f"norm_of_{rows}_rows") in curves:
                    norms.plot(epochs, curves[column], line, color=color)
            cost.plot(epochs, 1 - curves["macs_reduction"], color=color)
        masks.set(title="Masked rows", ylim=(0, 1.05))
        norms.set(title="Mean norm of a compactor row (dashed: masked rows)")
        norms.set_ylim(bottom=0)
        cost.set(title="Remaining MACs", ylim=(0, 1.05), xlabel="epoch")
        cost.xaxis.set_major_locator(MaxNLocator(integer=True))
        percent(masks)
        percent(cost)
        figure.legend(*masks.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure
