"""The methods of stage `student`, behind one face."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pipeline.compress import static
from pipeline.compress.capacity import Capacity
from pipeline.compress.paper import PaperCapacity
from pipeline.compress.surgery import SurgeryPlan
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet


class Compression(Protocol):
    """What becomes of the student's channels while it learns."""

    @property
    def whole(self) -> bool:
        """Whether the student starts with all of the teacher's channels."""
        ...

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """Channels of the uncompressed network that are still present, (C,) int64 by site."""
        ...

    @property
    def cost(self) -> CostModel:
        """What the budget counts."""
        ...

    @property
    def compared(self) -> Mapping[str, Tensor]:
        """Which of them are compared with the teacher's, (C,) bool by site; all where a site is not named."""
        ...

    @property
    def observed(self) -> tuple[str, ...]:
        """Sites where student and teacher are compared, for `observe`; where there are none, the stages' ends are."""
        ...

    def observe(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Look at the features (B, C) of a batch, by site."""
        ...

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Let the optimiser step, and do what must be done around it."""
        ...

    def remaining(self, net: RetrievalNet) -> dict[str, int]:
        """Widths of the whole network once what has been given up is gone."""
        ...

    def due(self, progress: float) -> float | None:
        """Reduction that must be given up by now; None where none is promised."""
        ...

    def check(self, widths: Mapping[str, int]) -> None:
        """Refuse a trained student that does not keep to its budget."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, as tensors by name."""
        ...

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Fixed:
    """No compression while learning: methods `static-magnitude`, `static-random` and `none`.

    Attributes:
        kept: Channels of the teacher, by site.
        cost: What the budget counts.
        compared: All of them.
        observed: Nothing.
    """

    kept: Mapping[str, Tensor]
    cost: CostModel
    compared: Mapping[str, Tensor] = field(default_factory=dict)
    observed: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Where nothing was cut."""
        return not self.kept

    def observe(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Nothing to look at."""

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Only the optimiser."""
        optimizer()

    def remaining(self, net: RetrievalNet) -> dict[str, int]:
        """All that is there."""
        return dict(net.spec.widths)

    def due(self, progress: float) -> None:
        """Everything was given up before."""

    def check(self, widths: Mapping[str, int]) -> None:
        """The widths were chosen to fit."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


def compression(
    config: Student, teacher: RetrievalNet, cost: CostModel, steps: int, seed: int, device: torch.device
) -> Compression:
    """The method that params.yaml names, before the first step.

    Args:
        config: Section of params.yaml.
        teacher: The uncompressed network.
        cost: What the budget counts.
        steps: Steps of the whole training.
        seed: Of random importance.
        device: Where the student lives.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    spec = teacher.spec
    if config.method == "budget":
        return Capacity.start(spec, config, cost, steps, seed, device)
    if config.method == "paper":
        return PaperCapacity.start(spec, config, cost, steps, device)
    plan = SurgeryPlan({})
    if config.method == "static-magnitude":
        plan, cost = static.by_magnitude(teacher, config, cost)
    elif config.method == "static-random":
        plan, cost = static.by_factor(spec, config, cost)
    return Fixed({site: torch.tensor(rows, device=device) for site, rows in plan.kept.items()}, cost)


def plan_of(chosen: Compression) -> SurgeryPlan:
    """Channels of the uncompressed network that are still present."""
    return SurgeryPlan({name: tuple(rows.tolist()) for name, rows in chosen.kept.items()})
