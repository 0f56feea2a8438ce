"""The search for the final widths; for a latency budget the chosen networks are timed.

The layer table predicts the latency of networks with random widths to within a few per cent, but the widths that a
budget chooses are not random. So the chosen network is timed together with the full one, the savings in the table are
scaled to agree with the timing, and the widths are chosen again, until the timed saving lies in the window. The scale
is interpolated linearly between the networks timed so far.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.compress.budget import WINDOW, BudgetError, narrowest_widths
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.spec import ArchSpec

log = logging.getLogger(__name__)

ATTEMPTS = 6
"""Networks that are timed at most in one search: one or two suffice on an idle machine, a busy one needs more."""

DISAGREEMENT = 2.0
"""Factor between the predicted and the timed saving above which a warning is logged."""


class _Timed(NamedTuple):
    """A timed network, the saving that the layer table predicted for it, and the table corrected to agree."""

    widths: dict[str, int]
    predicted: float
    corrected: CostModel


def final_widths(
    choose: Callable[[CostModel], dict[str, int]],
    spec: ArchSpec,
    config: Student,
    table: CostModel,
    start: float = 1.0,
) -> tuple[dict[str, int], CostModel]:
    """Choose the widths that keep a budget; if the budget is latency, by timing the chosen networks.

    If no timed network lies in the window, the one with the smallest saving above the target is taken, because timing
    noise must not end a training that has run for hours (`StudentTask.check` warns). The search fails only if no timed
    network saves enough. It also runs before the first training step, with equal scores, so an unreachable budget is
    found before any time is spent.

    Args:
        choose: Returns widths in the window by a cost model; widths that save more if no channel can be given back.
        spec: The uncompressed network.
        config: Section `student` of params.yaml.
        table: The cost that the budget limits.
        start: Correction of the table from an earlier search.

    Returns:
        The widths, and the cost model corrected to agree with their timing.

    Raises:
        BudgetError: If no widths keep the budget.
    """
    full, target = spec.widths, config.budget.reduction
    if table.measured is None or not target:
        return choose(table), table
    # Only timing decides what is unreachable: every correction is large enough for the table to allow the target.
    lower_bound = (target + WINDOW / 2) / max(table.reduction(full, narrowest_widths(spec, config)), 1e-9)
    correction, timed = max(start, lower_bound), dict[float, _Timed]()
    for attempt in range(ATTEMPTS):
        try:
            widths = choose(table.corrected(full, correction))
        except BudgetError:
            if not timed:
                raise
            break
        if any(widths == net.widths for net in timed.values()):
            break
        predicted, saved = table.reduction(full, widths), 1 - table.measured(widths)
        log.info("the chosen network saves %.1f %% of the time (layer table: %.1f %%)", 100 * saved, 100 * predicted)
        if not attempt and not predicted / DISAGREEMENT <= saved <= predicted * DISAGREEMENT:
            log.warning("the layer table predicts a saving of %.1f %%, but the timed network saves %.1f %%, which "
                        "counts; if this machine was busy, start again when it is idle",
                        100 * predicted, 100 * saved)  # fmt: skip
        corrected = table.corrected(full, saved / predicted)
        reached = corrected.reduction(full, widths)
        if target <= reached <= target + WINDOW:
            return widths, corrected
        timed[reached] = _Timed(widths, predicted, corrected)
        if max(timed) >= target:
            points = [(0.0, 0.0), *sorted((saving, net.predicted) for saving, net in timed.items() if saving > 0)]
            savings, predictions = np.array(points).T
            correction = target / float(np.interp(target, savings, predictions))
        else:  # from the fourth attempt on the aim rises, so that noise below the window cannot use up all attempts
            correction = saved / predicted * target / (target + WINDOW * max(0, attempt - 1))
        correction = max(correction, lower_bound)
    if max(timed) < target:
        raise BudgetError(
            f"`student.budget.reduction` {target:g} of the latency cannot be reached: of {len(timed)} timed networks "
            f"the fastest saves {max(timed):.4f}; request less, add sites, lower `student.channel_multiple`, or keep "
            "this machine idle"
        )
    closest = min(reached for reached in timed if reached >= target)
    return timed[closest].widths, timed[closest].corrected
