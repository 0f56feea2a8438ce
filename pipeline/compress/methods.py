"""The methods of stage `student` by name."""

import torch

from pipeline.compress import cut_once
from pipeline.compress.compression import Compression
from pipeline.compress.paper import PaperMethod
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.surgery import SurgeryPlan
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet


def compression(
    config: Student, teacher: RetrievalNet, cost: CostModel, steps: int, seed: int, device: torch.device
) -> Compression:
    """Return the method that params.yaml names, before the first step.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    spec = teacher.spec
    if config.method == "budget":
        return Shrinker(spec, config, cost, steps, seed, device)
    if config.method == "paper":
        return PaperMethod(spec, config, cost, steps, device)
    plan = SurgeryPlan({})
    if config.method == "static-magnitude":
        plan, cost = cut_once.by_magnitude(teacher, config, cost)
    elif config.method == "static-random":
        plan, cost = cut_once.by_factor(spec, config, cost)
    return Compression(cost, {site: torch.tensor(rows, device=device) for site, rows in plan.kept.items()})


def plan_of(chosen: Compression) -> SurgeryPlan:
    """Return the channels of the uncompressed network that are still present."""
    return SurgeryPlan({site: tuple(channels.tolist()) for site, channels in chosen.kept.items()})
