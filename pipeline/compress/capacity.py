"""The student's capacity over time: what is scored, masked, dying and gone.

A row of a compactor is *present* while it is in the network, *masked* once the budget has chosen it (retrieval no
longer moves it, the proximal step shrinks it), and *committed* when a masked row of its site has reached zero: until
then the choice may be revised. Whole groups are masked and committed together, so widths stay multiples throughout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.compress.budget import Allotment, Site, least_widths, scheduled
from pipeline.compress.compactor import row_norms, shrink_rows
from pipeline.compress.resetting import contributions, reset_gradients
from pipeline.config import Budget
from pipeline.models.cost import CostModel
from pipeline.models.resnet import Compactor
from pipeline.models.spec import ArchSpec


@dataclass
class SiteState:
    """One site's rows, in the order in which they stand in the compactor.

    Attributes:
        kept: (C,) int64, each row's channel index in the uncompressed network.
        score: (C,) float32, moving average of its contribution to retrieval.
        masked: (C,) bool.
        committed: (C,) bool, a subset of masked.
    """

    kept: Tensor
    score: Tensor
    masked: Tensor
    committed: Tensor

    def select(self, rows: Tensor) -> "SiteState":
        """The same for some of the rows."""
        return SiteState(self.kept[rows], self.score[rows], self.masked[rows], self.committed[rows])


@dataclass
class Capacity:
    """Decides which rows must go and drives them to zero.

    Attributes:
        spec: The uncompressed network.
        cost: What the budget counts.
        budget: Section of params.yaml.
        multiple: Widths stay whole multiples of it.
        momentum: Of the moving average of contributions.
        sites: State by site; filled from the spec.
        settled: Whether the final choice is made.
    """

    spec: ArchSpec
    cost: CostModel
    budget: Budget
    multiple: int
    momentum: float
    sites: dict[str, SiteState] = field(default_factory=dict)
    settled: bool = False

    @classmethod
    def start(
        cls, spec: ArchSpec, sites: tuple[str, ...], cost: CostModel, budget: Budget, multiple: int, momentum: float
    ) -> "Capacity":
        """Everything present, nothing masked."""
        states = {
            site: SiteState(
                kept=torch.arange(spec.widths[site]),
                score=torch.zeros(spec.widths[site]),
                masked=torch.zeros(spec.widths[site], dtype=torch.bool),
                committed=torch.zeros(spec.widths[site], dtype=torch.bool),
            )
            for site in sites
        }
        return cls(spec, cost, budget, multiple, momentum, states)

    @property
    def masked_widths(self) -> dict[str, int]:
        """Widths of the whole network once every masked row is gone."""
        return {**self.spec.widths, **{name: int((~site.masked).sum()) for name, site in self.sites.items()}}

    @property
    def reduction(self) -> float:
        """Share of the budgeted cost that is masked or gone."""
        return 1 - self.cost(self.masked_widths) / self.cost(self.spec.widths)

    def due(self, progress: float) -> float:
        """Reduction that must be masked by now."""
        return self.budget.reduction * scheduled(progress, self.budget.start, self.budget.end)

    def observe(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], neighbours: Tensor) -> None:
        """Update the scores from one batch.

        Args:
            student: By site, (B, C) pooled features behind the compactor.
            teacher: By site, (B, C of the uncompressed network).
            neighbours: (B, k), the teacher's.
        """
        for name, site in self.sites.items():
            kept = site.kept.to(teacher[name].device)
            score = contributions(student[name], teacher[name][:, kept], neighbours).cpu()
            site.score = torch.lerp(score, site.score, self.momentum)

    def revise(self, progress: float) -> None:
        """Choose anew which rows are masked; the last choice, at the end of the schedule, is final."""
        if self.settled or progress < self.budget.start:
            return
        least = least_widths(self.spec, self.sites, self.multiple)
        offers = {}
        for name, site in self.sites.items():
            free = site.score[~site.committed].numpy().astype(np.float64)
            offers[name] = Site(len(free), least[name], np.sort(free, kind="stable"))
        allotment = Allotment(self.cost, self.spec.widths, offers, self.multiple)
        if progress >= self.budget.end:
            allotment.settle(self.budget.reduction)
            self.settled = True
        else:
            allotment.spend(self.due(progress), limit=self.budget.reduction)
        for name, site in self.sites.items():
            order = torch.argsort(site.score.masked_fill(site.committed, -torch.inf), stable=True)
            site.masked = torch.zeros_like(site.masked)
            site.masked[order[: len(order) - allotment.widths[name]]] = True

    def reset(self, compactors: Mapping[str, Compactor]) -> None:
        """After the backward pass: masked rows get no gradient from retrieval."""
        reset_gradients(compactors, {name: site.masked for name, site in self.sites.items()})

    def before_step(self, compactors: Mapping[str, Compactor]) -> dict[str, Tensor]:
        """Masked rows as they are before the optimiser, whose momentum would move them on."""
        return {name: compactors[name].weight.detach()[site.masked] for name, site in self.sites.items()}

    @torch.no_grad()
    def after_step(self, compactors: Mapping[str, Compactor], before: Mapping[str, Tensor], threshold: float) -> None:
        """Shrink the masked rows, and commit the sites where one has reached zero.

        Args:
            compactors: By site.
            before: From `before_step`.
            threshold: What the norm of each masked row loses.
        """
        for name, site in self.sites.items():
            if not bool(site.masked.any()):
                continue
            rows = shrink_rows(before[name], threshold)
            compactors[name].weight[site.masked] = rows
            if bool((row_norms(rows) == 0).any()):
                site.committed = site.masked.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, as tensors by name."""
        tensors = {"settled": torch.tensor(self.settled)}
        for name, site in self.sites.items():
            for key in ("kept", "score", "masked", "committed"):
                tensors[f"{name}/{key}"] = getattr(site, key)
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.settled = bool(tensors["settled"])
        for name in self.sites:
            values = (tensors[f"{name}/{key}"] for key in ("kept", "score", "masked", "committed"))
            self.sites[name] = SiteState(*values)
