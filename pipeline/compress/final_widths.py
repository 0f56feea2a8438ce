"""The final widths of a budget; a latency budget is checked by timing the network that was chosen.

A layer table predicts the time of networks with random widths to some per cent, and widths that a budget chooses are
not random. So the chosen network is timed beside the full one, the table's savings are scaled until they agree, and the
choice is made again, until the timed saving lies in the window: linear interpolation between the networks timed so far.
"""

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.compress.budget import WINDOW, BudgetError
from pipeline.models.cost import CostModel

log = logging.getLogger(__name__)

ATTEMPTS = 6
"""Networks that are timed at most for one choice: one or two do on a quiet machine, the others are for a noisy one."""

DISAGREEMENT = 2.0
"""Factor between the predicted and the timed saving above which a warning says so."""

Widths = Mapping[str, int]


class _Timed(NamedTuple):
    """A network that was timed, the saving that the layer table predicted, and the table corrected to agree."""

    widths: dict[str, int]
    predicted: float
    corrected: CostModel


def final_widths(
    choose: Callable[[CostModel], dict[str, int]],
    table: CostModel,
    full: Widths,
    narrowest: Widths,
    asked: float,
    start: float = 1.0,
) -> tuple[dict[str, int], CostModel]:
    """Choose widths that keep to a budget, by the timed network where time is the budget.

    If no timed network lies in the window, the one that saves least above what was asked is taken, since timing noise
    must not end a training that has run for hours (`StudentTask.check` warns). Only if none saves enough the budget is
    refused; the same search with equal scores runs before the first step, so that is known before time is spent.

    Args:
        choose: Chooses widths in the window by a cost model; widths that save more if nothing can be given back.
        table: What the budget counts.
        full: Widths of the uncompressed network.
        narrowest: Widths with every site at its least.
        asked: Reduction in [0, 1); the window is [asked, asked + `WINDOW`].
        start: Correction of the table that an earlier search found.

    Returns:
        The widths, and the cost model corrected so that it agrees with their timing.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    if table.measured is None or not asked:
        return choose(table), table
    # What is out of reach is known from timing alone: no correction makes the table refuse what was asked.
    least = (asked + WINDOW / 2) / max(table.reduction(full, narrowest), 1e-9)
    correction, timed = max(start, least), dict[float, _Timed]()
    for attempt in range(ATTEMPTS):
        try:
            widths = choose(table.corrected(full, correction))
        except BudgetError:
            if not timed:
                raise
            break
        if any(widths == other.widths for other in timed.values()):
            break
        predicted, saved = table.reduction(full, widths), 1 - table.measured(widths)
        log.info("the chosen network saves %.1f %% of the time (layer table: %.1f %%)", 100 * saved, 100 * predicted)
        if not attempt and not predicted / DISAGREEMENT <= saved <= predicted * DISAGREEMENT:
            log.warning("the layer table predicts that %.1f %% of the time are saved, the timed network saves %.1f %%, "
                        "which counts; if this machine was busy, start again when it is idle",
                        100 * predicted, 100 * saved)  # fmt: skip
        corrected = table.corrected(full, saved / predicted)
        reached = corrected.reduction(full, widths)
        if asked <= reached <= asked + WINDOW:
            return widths, corrected
        timed[reached] = _Timed(widths, predicted, corrected)
        if max(timed) >= asked:
            known = [(0.0, 0.0), *sorted((saving, one.predicted) for saving, one in timed.items() if saving > 0)]
            savings, predictions = np.array(known).T
            correction = asked / float(np.interp(asked, savings, predictions))
        else:  # from the fourth attempt on the aim rises, so that noise below the window cannot use all of them up
            correction = saved / predicted * asked / (asked + WINDOW * max(0, attempt - 1))
        correction = max(correction, least)
    if max(timed) < asked:
        raise BudgetError(
            f"`student.budget.reduction` {asked:g} of the latency cannot be reached: of {len(timed)} networks that "
            f"were timed the fastest saves {max(timed):.4f}; ask for less, add sites, lower "
            "`student.channel_multiple`, or leave this machine idle"
        )
    closest = min(reached for reached in timed if reached >= asked)
    return timed[closest].widths, timed[closest].corrected
