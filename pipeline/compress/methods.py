"""The compression methods of stage `student` by their name in params.yaml."""

import torch

from pipeline.compress import static_pruning
from pipeline.compress.compression import Compression
from pipeline.compress.paper import PaperMethod
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.surgery import SurgeryPlan
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet, TeacherNet
from pipeline.models.spec import ArchSpec


def build_compression(
    config: Student,
    teacher: TeacherNet,
    full: ArchSpec,
    cost: CostModel,
    steps: int,
    seed: int,
    device: torch.device,
) -> Compression:
    """Build the method that params.yaml names, for a training of `steps` steps.

    Raises:
        BudgetError: If no widths keep the budget.
        TypeError: If the teacher is no ResNet, and the method prunes it.
    """
    if config.method == "budget":
        return Shrinker(full, config, cost, steps, seed, device)
    if config.method == "paper":
        return PaperMethod(full, config, cost, steps, device)
    plan = SurgeryPlan({})
    if config.method == "static-magnitude":
        if not isinstance(teacher, RetrievalNet):
            raise TypeError("method static-magnitude prunes the teacher, which must be a ResNet")
        plan, cost = static_pruning.prune_by_magnitude(teacher, config, cost)
    elif config.method == "static-random":
        plan, cost = static_pruning.prune_uniformly(full, config, cost)
    return Compression(
        full, cost, {site: torch.tensor(channels, device=device) for site, channels in plan.kept.items()}
    )


def kept_plan(compression: Compression) -> SurgeryPlan:
    """Return the channels of the uncompressed network that are still present."""
    return SurgeryPlan({site: tuple(channels.tolist()) for site, channels in compression.kept.items()})
