"""Image panels: a query and the ten gallery images that each network ranks first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.report.style import CORRECT_COLOR, WRONG_COLOR, new_figure, save, styled

TOP = 10
"""Gallery images per ranking."""

GAP = 0.14
"""Space between two images, in image widths."""


@dataclass(frozen=True)
class PanelQuery:
    """A query to show.

    Attributes:
        query: Index among the queries.
        reason: The rule that selected it.
    """

    query: int
    reason: str


@dataclass(frozen=True)
class Ranking:
    """The first gallery images of a ranking; one row of a panel.

    Attributes:
        name: Network or file that ranked them.
        images: (k, h, w, 3) uint8, best first.
        ap: Average precision of the query over the whole gallery; None without ground truth.
        matches: (k,) whether each image shows the identity of the query; None without ground truth.
    """

    name: str
    images: npt.NDArray[np.uint8]
    ap: float | None = None
    matches: npt.NDArray[np.bool_] | None = None


def choose_queries(teacher: npt.NDArray[np.float64], student: npt.NDArray[np.float64], count: int) -> list[PanelQuery]:
    """Choose queries by rule, so that the report cannot be cherry-picked.

    Half (rounded down) are those with the largest difference in AP; the others are spread evenly over the remaining
    queries, ordered by the mean AP of both networks. The earlier query wins ties.

    Args:
        teacher: (Q,) AP of each query, NaN if it has no valid match.
        student: (Q,) AP of each query, NaN if it has no valid match.
        count: Number of queries; all valid ones if they are fewer.

    Returns:
        The evenly spread queries from best to worst, then the others from the largest difference.
    """
    valid = np.flatnonzero(np.isfinite(teacher) & np.isfinite(student))
    count = min(count, len(valid))
    by_difference = valid[np.argsort(-np.abs(teacher - student)[valid], kind="stable")]
    differing, rest = by_difference[: count // 2], np.sort(by_difference[count // 2 :])
    by_ap = rest[np.argsort(-(teacher + student)[rest], kind="stable")]
    remaining = count - len(differing)
    spread = by_ap[((np.arange(remaining) + 0.5) / max(remaining, 1) * len(by_ap)).astype(int)]
    return [PanelQuery(int(query), "spread evenly over the range of AP") for query in spread] + [
        PanelQuery(int(query), "largest difference in AP between teacher and student") for query in differing
    ]


def rank(
    query: npt.NDArray[np.float32],
    gallery: npt.NDArray[np.float32],
    matches: npt.NDArray[np.bool_],
    excluded: npt.NDArray[np.bool_],
    top: int = TOP,
) -> npt.NDArray[np.int64]:
    """Return the gallery indices most similar to a query, (top,); wrong images come first in ties.

    Args:
        query: (D,) embedding, L2-normalised.
        gallery: (G, D) embeddings, L2-normalised.
        matches: (G,) whether the protocol counts an image as correct for this query.
        excluded: (G,) whether the protocol ignores an image for this query.
        top: Number of indices.
    """
    order = np.lexsort((matches, -(gallery @ query)))
    first: npt.NDArray[np.int64] = order[~excluded[order]][:top]
    return first


def plot_panel(query: npt.NDArray[np.uint8], rankings: Sequence[Ranking]) -> Figure:
    """Draw a query beside the rankings of several networks.

    With ground truth, correct images get a green frame and a tick, wrong ones a red frame and a cross.

    Args:
        query: (h, w, 3) uint8.
        rankings: One row each; their images have the size of the query.
    """
    aspect = query.shape[0] / query.shape[1]  # all lengths below are in image widths
    row_height = aspect + 0.5
    start = 1.5 + 3 * GAP  # the query is drawn at 1.5 times the size
    width, height = start + TOP * (1 + GAP), max(row_height * len(rankings), 1.5 * aspect + 0.5)
    with styled():
        figure = new_figure(0.82 * height + 0.1, 0.82 * width + 0.1)
        chart = figure.subplots()
        chart.set(xlim=(-0.05, width), ylim=(height, 0), aspect="equal")
        chart.axis("off")
        top = (height - 1.5 * aspect - 0.4) / 2 + 0.4
        chart.text(0, top - 0.08, "query", fontsize=12, weight="bold")
        _draw_image(chart, query, 0, top, 1.5, aspect)
        for number, ranking in enumerate(rankings):
            top = number * row_height + 0.4
            chart.text(start, top - 0.08, ranking.name, fontsize=12, weight="bold")
            if ranking.ap is not None:
                chart.text(start + 1.2 + GAP, top - 0.08, f"AP {ranking.ap:.2f}", fontsize=12)
            for place, image in enumerate(ranking.images):
                left = start + place * (1 + GAP)
                _draw_image(chart, image, left, top, 1, aspect)
                if ranking.matches is not None:
                    _draw_frame(chart, bool(ranking.matches[place]), left, top, aspect)
    return figure


def save_finds(path: Path, name: str, query: npt.NDArray[np.uint8], finds: Sequence[npt.NDArray[np.uint8]]) -> None:
    """Save a PNG with a query beside the search results of one model.

    Args:
        path: PNG file.
        name: Name of the model.
        query: (h, w, 3) uint8.
        finds: Images of the size of the query, best first.
    """
    save(plot_panel(query, [Ranking(name, np.stack(finds[:TOP]))]), path)


def describe(ranking: Ranking) -> str:
    """Describe a ranking for screen readers: ``teacher: correct at rank 1, 2, 5 of the first 10, AP 0.61``."""
    if ranking.matches is None:
        return f"{ranking.name}: the first {len(ranking.images)} images"
    ranks = ", ".join(str(place + 1) for place in np.flatnonzero(ranking.matches))
    correct = f"correct at rank {ranks}" if ranks else "none correct"
    return f"{ranking.name}: {correct} of the first {len(ranking.matches)}, AP {ranking.ap:.2f}"


def _draw_image(
    chart: Axes, image: npt.NDArray[np.uint8], left: float, top: float, width: float, aspect: float
) -> None:
    chart.imshow(image, extent=(left, left + width, top + width * aspect, top), interpolation="bilinear", zorder=1)


def _draw_frame(chart: Axes, correct: bool, left: float, top: float, aspect: float) -> None:
    """Frame an image, with a tick or a cross in its lower right corner."""
    colour, mark = (CORRECT_COLOR, "\N{CHECK MARK}") if correct else (WRONG_COLOR, "\N{MULTIPLICATION X}")
    chart.add_patch(Rectangle((left, top), 1, aspect, fill=False, edgecolor=colour, linewidth=3, zorder=2))
    size = 0.28
    chart.add_patch(Rectangle((left + 1 - size, top + aspect - size), size, size, color=colour, linewidth=0, zorder=3))
    x, y = left + 1 - size / 2, top + aspect - size / 2
    chart.text(x, y, mark, color="white", fontsize=11, ha="center", va="center", zorder=4)
