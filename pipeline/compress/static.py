"""Widths chosen once, before any training: the baselines that the dynamic student must beat.

Both keep to the same budget, in the same multiples, at the same sites.
"""

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


def by_magnitude(net: RetrievalNet, config: Student, cost: CostModel) -> SurgeryPlan:
    """Keep the channels whose batch norms scale most, all sites compared per saved cost, as the dynamic student does.

    Args:
        net: The teacher.
        config: Section of params.yaml.
        cost: What the budget counts.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    sites = shrinking_sites(net.spec, config)
    scores = {site: score.detach().cpu() for site, score in magnitudes(net, sites).items()}
    allotment = Allotment.of(net.spec, config, cost, {site: score.numpy() for site, score in scores.items()})
    allotment.settle(config.budget.reduction)
    orders = {site: torch.argsort(score, descending=True, stable=True) for site, score in scores.items()}
    return SurgeryPlan(
        {site: tuple(sorted(order[: allotment.widths[site]].tolist())) for site, order in orders.items()}
    )


def by_factor(spec: ArchSpec, config: Student, cost: CostModel) -> SurgeryPlan:
    """Keep the first channels of each site: the same share of all, and then what lands on the budget.

    Args:
        spec: The teacher's.
        config: Section of params.yaml.
        cost: What the budget counts.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    sites, multiple = shrinking_sites(spec, config), config.channel_multiple
    least = least_widths(spec, sites, multiple)
    allotment = Allotment.of(spec, config, cost, {site: np.ones(spec.widths[site]) for site in sites})
    for factor in np.linspace(0.0, 1.0, 1001):  # the narrowest that does not save too much
        widths = {site: max(least[site], round(factor * spec.widths[site] / multiple) * multiple) for site in sites}
        widths = {site: min(width, spec.widths[site]) for site, width in widths.items()}
        if 1 - cost({**spec.widths, **widths}) / cost(spec.widths) <= config.budget.reduction:
            break
    allotment.widths.update(widths)
    allotment.settle(config.budget.reduction)
    return SurgeryPlan({site: tuple(range(allotment.widths[site])) for site in sites})
