"""Widths chosen once, before any training: the baselines that the dynamic student must beat.

Both keep to the same budget, in the same multiples, at the same sites.
"""

from collections.abc import Callable

import numpy as np
import torch

from pipeline.compress.allotment import Allotment
from pipeline.compress.budget import least_widths, shrinking_sites
from pipeline.compress.importance import magnitudes
from pipeline.compress.surgery import SurgeryPlan
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec


def by_magnitude(net: RetrievalNet, config: Student, cost: CostModel) -> tuple[SurgeryPlan, CostModel]:
    """Keep the channels whose batch norms scale most, all sites compared per saved cost, as the dynamic student does.

    Args:
        net: The teacher.
        config: Section of params.yaml.
        cost: What the budget counts.

    Returns:
        What is kept, and the cost model, corrected where it could be measured.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    sites = shrinking_sites(net.spec, config)
    scores = {site: score.detach().cpu() for site, score in magnitudes(net, sites).items()}

    def settled(cost: CostModel) -> Allotment:
        allotment = Allotment.of(net.spec, config, cost, {site: score.numpy() for site, score in scores.items()})
        allotment.settle(config.budget.reduction)
        return allotment

    allotment, cost = _corrected(settled, net.spec, cost)
    orders = {site: torch.argsort(score, descending=True, stable=True) for site, score in scores.items()}
    kept = {site: tuple(sorted(order[: allotment.widths[site]].tolist())) for site, order in orders.items()}
    return SurgeryPlan(kept), cost


def by_factor(spec: ArchSpec, config: Student, cost: CostModel) -> tuple[SurgeryPlan, CostModel]:
    """Keep the first channels of each site: the same share of all, and then what lands on the budget.

    Args:
        spec: The teacher's.
        config: Section of params.yaml.
        cost: What the budget counts.

    Returns:
        What is kept, and the cost model, corrected where it could be measured.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    sites, multiple = shrinking_sites(spec, config), config.channel_multiple
    least = least_widths(spec, sites, multiple)

    def settled(cost: CostModel) -> Allotment:
        allotment = Allotment.of(spec, config, cost, {site: np.ones(spec.widths[site]) for site in sites})
        for factor in np.linspace(0.0, 1.0, 1001):  # the narrowest that does not save too much
            widths = {site: max(least[site], round(factor * spec.widths[site] / multiple) * multiple) for site in sites}
            widths = {site: min(width, spec.widths[site]) for site, width in widths.items()}
            if 1 - cost({**spec.widths, **widths}) / cost(spec.widths) <= config.budget.reduction:
                break
        allotment.widths.update(widths)
        allotment.settle(config.budget.reduction)
        return allotment

    allotment, cost = _corrected(settled, spec, cost)
    return SurgeryPlan({site: tuple(range(allotment.widths[site])) for site in sites}), cost


def _corrected(
    settled: Callable[[CostModel], Allotment], spec: ArchSpec, cost: CostModel
) -> tuple[Allotment, CostModel]:
    """Widths that keep to the budget by what those chosen first turned out to cost."""
    allotment = settled(cost)
    stretch = cost.stretch(spec.widths, allotment.widths)
    if stretch == 1:
        return allotment, cost
    cost = cost.stretched(spec.widths, stretch)
    return settled(cost), cost
