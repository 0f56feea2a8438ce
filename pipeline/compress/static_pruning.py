"""Baselines that choose the widths once, before training: methods `static-magnitude` and `static-random`.

Both keep the same budget as method `budget`, in the same multiples, at the same sites.
"""

from functools import partial

import numpy as np
import torch

from pipeline.compress.budget import minimum_widths, shrinking_sites
from pipeline.compress.final_widths import final_widths
from pipeline.compress.importance import magnitude_scores
from pipeline.compress.surgery import SurgeryPlan
from pipeline.compress.width_allocation import WidthAllocation, allocate_budget
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec


def prune_by_magnitude(net: RetrievalNet, config: Student, cost: CostModel) -> tuple[SurgeryPlan, CostModel]:
    """Keep the channels with the largest batch-norm scales; sites compete by importance per saved cost.

    Returns:
        The channels to keep, and the cost model, corrected by timing if the budget is latency.

    Raises:
        BudgetError: If no widths keep the budget.
    """
    sites = shrinking_sites(net.spec, config)
    scores = {site: score.detach().cpu() for site, score in magnitude_scores(net, sites).items()}
    choose = partial(allocate_budget, net.spec, config, {site: score.numpy() for site, score in scores.items()})
    widths, cost = final_widths(choose, net.spec, config, cost)
    orders = {site: torch.argsort(score, descending=True, stable=True) for site, score in scores.items()}
    return SurgeryPlan({site: tuple(sorted(order[: widths[site]].tolist())) for site, order in orders.items()}), cost


def prune_uniformly(spec: ArchSpec, config: Student, cost: CostModel) -> tuple[SurgeryPlan, CostModel]:
    """Multiply all widths by one factor, then adjust them to reach the budget; the first channels of each site stay.

    Returns:
        The channels to keep, and the cost model, corrected by timing if the budget is latency.

    Raises:
        BudgetError: If no widths keep the budget.
    """
    sites, multiple, target = shrinking_sites(spec, config), config.channel_multiple, config.budget.reduction
    minimum = minimum_widths(spec, sites, multiple)

    def choose(cost: CostModel) -> dict[str, int]:
        allocation = WidthAllocation.of(spec, config, cost, {site: np.ones(spec.widths[site]) for site in sites})
        for factor in np.linspace(0.0, 1.0, 1001):  # the smallest factor that does not exceed the target
            widths = {
                site: max(minimum[site], round(factor * spec.widths[site] / multiple) * multiple) for site in sites
            }
            widths = {site: min(width, spec.widths[site]) for site, width in widths.items()}
            if cost.reduction(spec.widths, {**spec.widths, **widths}) <= target:
                break
        allocation.widths.update(widths)
        allocation.finalize(target)
        return allocation.widths

    widths, cost = final_widths(choose, spec, config, cost)
    return SurgeryPlan({site: tuple(range(widths[site])) for site in sites}), cost
