"""The pruning schedule: how much is masked at which step, and when the masks are revised."""

import math
from dataclasses import dataclass

from pipeline.config import Budget


def cubic_schedule(progress: float, start: float, end: float) -> float:
    """Return the share of the reduction that must be masked: 0 until `start`, 1 from `end`, cubic in between.

    It rises fast at first, while the network is wide, and slowly at the end.

    Source: Zhu and Gupta, "To Prune, or Not to Prune", 2017, equation 1.

    Args:
        progress: Share of the training done, in [0, 1].
        start: Progress at which masking starts.
        end: Progress at which the whole reduction must be masked.
    """
    passed = min(1.0, max(0.0, (progress - start) / (end - start)))
    return 1.0 - (1.0 - passed) ** 3


@dataclass(frozen=True)
class Schedule:
    """The pruning schedule of one training, in optimiser steps counted from 0.

    Nothing is masked before `budget.start`, the warm-up of Xie et al. (CVPR 2023).

    Attributes:
        budget: Section `student.budget` of params.yaml.
        steps: Steps of the whole training.
    """

    budget: Budget
    steps: int

    @property
    def fade_steps(self) -> int:
        """Steps that a masked channel takes to become zero."""
        return max(1, math.floor(self.budget.fade * self.steps))

    @property
    def final_step(self) -> int:
        """Step of the last revision; it leaves every masked channel enough steps to become zero."""
        return min(math.ceil(self.budget.end * self.steps - 1e-6), self.steps - 1)

    def revises(self, step: int) -> bool:
        """Return whether the masks are revised at a step."""
        started = step / self.steps >= self.budget.start
        return step == self.final_step or (started and step < self.final_step and step % self.budget.every == 0)

    def reduction(self, progress: float) -> float:
        """Return the reduction that must be masked at a progress in [0, 1]."""
        return self.budget.reduction * cubic_schedule(progress, self.budget.start, self.budget.end)
