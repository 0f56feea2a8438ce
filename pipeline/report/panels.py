"""Ranked panels: a query and the ten images of the gallery that each network puts first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.report.style import RIGHT, WRONG, new_figure, save, styled

TOP = 10
"""Images of the gallery in a row."""

GAP = 0.14
"""Space between two images, in widths of an image."""


@dataclass(frozen=True)
class PanelQuery:
    """A query to show: its place among the queries, and the rule that picked it."""

    query: int
    reason: str


@dataclass(frozen=True)
class Ranking:
    """A row of a panel.

    Attributes:
        name: Whose ranking it is.
        images: (k, h, w, 3) uint8, best first.
        ap: Average precision of the query, over the whole gallery; None where nobody knows what is right.
        right: (k,) whether each shows the query's identity; None likewise.
    """

    name: str
    images: npt.NDArray[np.uint8]
    ap: float | None = None
    right: npt.NDArray[np.bool_] | None = None


def choose(teacher: npt.NDArray[np.float64], student: npt.NDArray[np.float64], count: int) -> list[PanelQuery]:
    """Pick queries by rule, so that nobody picks the pretty ones.

    Half (rounded down) are those on which the two differ most; the others are spread evenly over the rest, ordered by
    the mean of both AP. Ties go to the earlier query.

    Args:
        teacher: (Q,) AP of each query, NaN where it has no valid match.
        student: (Q,) the same of the student.
        count: How many to pick; all there are if they are fewer.

    Returns:
        The spread ones from best to worst, then the differing ones from the largest difference.
    """
    valid = np.flatnonzero(np.isfinite(teacher) & np.isfinite(student))
    count = min(count, len(valid))
    by_difference = valid[np.argsort(-np.abs(teacher - student)[valid], kind="stable")]
    differing, rest = by_difference[: count // 2], np.sort(by_difference[count // 2 :])
    by_ap = rest[np.argsort(-(teacher + student)[rest], kind="stable")]
    places = count - len(differing)
    spread = by_ap[((np.arange(places) + 0.5) / max(places, 1) * len(by_ap)).astype(int)]
    return [PanelQuery(int(row), "spread over the range of AP") for row in spread] + [
        PanelQuery(int(row), "teacher and student differ most") for row in differing
    ]


def rank(
    query: npt.NDArray[np.float32],
    gallery: npt.NDArray[np.float32],
    right: npt.NDArray[np.bool_],
    left_out: npt.NDArray[np.bool_],
    top: int = TOP,
) -> npt.NDArray[np.int64]:
    """Gallery rows that a query finds first; tied wrong images come first.

    Args:
        query: (D,) embedding of length 1.
        gallery: (G, D) embeddings of length 1.
        right: (G,) which images the protocol calls right for this query.
        left_out: (G,) which it leaves out.
        top: How many.
    """
    order = np.lexsort((right, -(gallery @ query)))
    found: npt.NDArray[np.int64] = order[~left_out[order]][:top]
    return found


def panel(query: npt.NDArray[np.uint8], rankings: Sequence[Ranking]) -> Figure:
    """Draw a query beside the rankings of several networks.

    Right images have a green frame and a tick, wrong ones a red frame and a cross, where that is known.

    Args:
        query: (h, w, 3) uint8.
        rankings: A row each; images of the query's size.
    """
    tall = query.shape[0] / query.shape[1]  # all lengths below are in widths of an image
    row_height = tall + 0.5
    start = 1.5 + 3 * GAP  # the query is drawn at one and a half times the size
    across, down = start + TOP * (1 + GAP), max(row_height * len(rankings), 1.5 * tall + 0.5)
    with styled():
        figure = new_figure(0.82 * down + 0.1, 0.82 * across + 0.1)
        chart = figure.subplots()
        chart.set(xlim=(-0.05, across), ylim=(down, 0), aspect="equal")
        chart.axis("off")
        top = (down - 1.5 * tall - 0.4) / 2 + 0.4
        chart.text(0, top - 0.08, "query", fontsize=12, weight="bold")
        _image(chart, query, 0, top, 1.5, tall)
        for number, ranking in enumerate(rankings):
            top = number * row_height + 0.4
            chart.text(start, top - 0.08, ranking.name, fontsize=12, weight="bold")
            if ranking.ap is not None:
                chart.text(start + 1.2 + GAP, top - 0.08, f"AP {ranking.ap:.2f}", fontsize=12)
            for place, image in enumerate(ranking.images):
                left = start + place * (1 + GAP)
                _image(chart, image, left, top, 1, tall)
                if ranking.right is not None:
                    _verdict(chart, bool(ranking.right[place]), left, top, tall)
    return figure


def save_finds(path: Path, name: str, query: npt.NDArray[np.uint8], finds: Sequence[npt.NDArray[np.uint8]]) -> None:
    """Draw a query beside the first images that a model found for it.

    Args:
        path: PNG file.
        name: Of the model.
        query: (h, w, 3) uint8.
        finds: Images of the query's size, best first.
    """
    save(panel(query, [Ranking(name, np.stack(finds[:TOP]))]), path)


def describe(ranking: Ranking) -> str:
    """A ranking in words, for readers who cannot see it: ``teacher: right at 1, 2, 5 of 10``."""
    if ranking.right is None:
        return f"{ranking.name}: the first {len(ranking.images)}"
    right = ", ".join(str(place + 1) for place in np.flatnonzero(ranking.right))
    return f"{ranking.name}: right at {right or 'none'} of the first {len(ranking.right)}, AP {ranking.ap:.2f}"


def _image(chart: Axes, image: npt.NDArray[np.uint8], left: float, top: float, width: float, tall: float) -> None:
    chart.imshow(image, extent=(left, left + width, top + width * tall, top), interpolation="bilinear", zorder=1)


def _verdict(chart: Axes, right: bool, left: float, top: float, tall: float) -> None:
    """Frame an image, with a tick or a cross in its lower right corner."""
    colour, mark = (RIGHT, "\N{CHECK MARK}") if right else (WRONG, "\N{MULTIPLICATION X}")
    chart.add_patch(Rectangle((left, top), 1, tall, fill=False, edgecolor=colour, linewidth=3, zorder=2))
    size = 0.28
    chart.add_patch(Rectangle((left + 1 - size, top + tall - size), size, size, color=colour, linewidth=0, zorder=3))
    chart.text(
        left + 1 - size / 2, top + tall - size / 2, mark, color="white", fontsize=11, ha="center", va="center", zorder=4
    )
