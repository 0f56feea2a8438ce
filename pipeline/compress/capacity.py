"""The student's capacity over time: what is scored, masked, dying and gone.

A row of a compactor or gate is *present* while it is in the network, *masked* once the budget has chosen it (retrieval
no longer moves it, the proximal step shrinks it), and *committed* when it, or a row masked beside it, has reached zero:
until then the choice may be revised. Whole groups are masked and committed together, so widths stay multiples.

No step waits for the device, but those that revise the masks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from pipeline.compress.budget import Allotment, Site, least_widths, scheduled
from pipeline.compress.compactor import by_row, row_norms, shrink_rows
from pipeline.compress.resetting import contributions, reset_gradients
from pipeline.config import Budget
from pipeline.models.cost import CostModel
from pipeline.models.resnet import Indicator
from pipeline.models.spec import ArchSpec


@dataclass
class SiteState:
    """One site's rows, in the order in which they stand in the compactor or gate.

    Attributes:
        kept: (C,) int64, each row's channel index in the uncompressed network.
        score: (C,) float32, moving average of its contribution to retrieval.
        masked: (C,) bool.
        committed: (C,) bool, a subset of masked.
        left: (C,) int32, steps until a masked row is zero; 0 where it is, and where it is not masked.
    """

    kept: Tensor
    score: Tensor
    masked: Tensor
    committed: Tensor
    left: Tensor

    @classmethod
    def start(cls, width: int, device: torch.device) -> "SiteState":
        """Everything present, nothing masked."""
        none = torch.zeros(width, dtype=torch.bool, device=device)
        score = torch.zeros(width, device=device)
        return cls(torch.arange(width, device=device), score, none, none.clone(), none.to(torch.int32))

    def select(self, rows: Tensor) -> "SiteState":
        """The same for some of the rows."""
        return SiteState(**{key: value[rows.to(value.device)] for key, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass
class Capacity:
    """Decides which rows must go and drives them to zero.

    Attributes:
        spec: The uncompressed network.
        cost: What the budget counts.
        budget: Section of params.yaml.
        multiple: Widths stay whole multiples of it.
        momentum: Of the moving average of contributions.
        fade: Steps in which a masked row becomes zero.
        sites: State by site; filled from the spec.
        settled: Whether the final choice is made.
    """

    spec: ArchSpec
    cost: CostModel
    budget: Budget
    multiple: int
    momentum: float
    fade: int
    sites: dict[str, SiteState] = field(default_factory=dict)
    settled: bool = False

    @classmethod
    def start(
        cls,
        spec: ArchSpec,
        sites: tuple[str, ...],
        cost: CostModel,
        budget: Budget,
        multiple: int,
        momentum: float,
        fade: int,
        device: torch.device,
    ) -> "Capacity":
        """Everything present, nothing masked."""
        states = {site: SiteState.start(spec.widths[site], device) for site in sites}
        return cls(spec, cost, budget, multiple, momentum, fade, states)

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
            score = contributions(student[name], teacher[name][:, site.kept], neighbours)
            site.score = torch.lerp(score, site.score, self.momentum)

    def revise(self, progress: float) -> None:
        """Choose anew which rows are masked; the last choice, at the end of the schedule, is final."""
        if self.settled or progress < self.budget.start:
            return
        least = least_widths(self.spec, self.sites, self.multiple)
        offers = {}
        for name, site in self.sites.items():
            free = site.score[~site.committed].cpu().numpy().astype(np.float64)
            offers[name] = Site(len(free), least[name], np.sort(free, kind="stable"))
        allotment = Allotment(self.cost, self.spec.widths, offers, self.multiple)
        if progress >= self.budget.end:
            allotment.settle(self.budget.reduction)
            self.settled = True
        else:
            allotment.spend(self.due(progress), limit=self.budget.reduction)
        for name, site in self.sites.items():
            order = torch.argsort(site.score.masked_fill(site.committed, -torch.inf), stable=True)
            masked = torch.zeros_like(site.masked)
            masked[order[: len(order) - allotment.widths[name]]] = True
            site.left = torch.where(masked & site.masked, site.left, masked * self.fade).to(torch.int32)
            site.masked = masked

    def reset(self, indicators: Mapping[str, Indicator]) -> None:
        """After the backward pass: masked rows get no gradient from retrieval."""
        reset_gradients(indicators, {name: site.masked for name, site in self.sites.items()})

    def before_step(self, indicators: Mapping[str, Indicator]) -> dict[str, Tensor]:
        """Indicators as they are before the optimiser, whose momentum would move masked rows on."""
        return {name: indicators[name].weight.detach().clone() for name in self.sites}

    @torch.no_grad()
    def after_step(self, indicators: Mapping[str, Indicator], before: Mapping[str, Tensor]) -> None:
        """Shrink the masked rows; where one has just reached zero, those masked by then are committed.

        Args:
            indicators: By site.
            before: From `before_step`.
        """
        for name, site in self.sites.items():
            weight = indicators[name].weight
            shrunk = shrink_rows(before[name], site.left)
            site.left = (site.left - 1).clamp_min(0)
            weight.copy_(torch.where(by_row(site.masked, weight), shrunk, weight))
            died = site.masked & ~site.committed & (site.left == 0)
            site.committed = torch.where(died.any(), site.masked, site.committed)

    def levels(self, indicators: Mapping[str, Indicator]) -> dict[str, Tensor]:
        """How far each row has faded, (C,) by site: its norm where it is masked and not yet zero, else 1."""
        found = {}
        for name, site in self.sites.items():
            norms = row_norms(indicators[name].matrix.detach())
            found[name] = torch.where(site.masked & (norms > 0), norms, torch.ones_like(norms))
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, as tensors by name."""
        tensors = {"settled": torch.tensor(self.settled)}
        for name, site in self.sites.items():
            tensors |= {f"{name}/{key}": value for key, value in site.tensors().items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.settled = bool(tensors["settled"])
        for name, site in self.sites.items():
            values = {key: tensors[f"{name}/{key}"].to(value.device) for key, value in site.tensors().items()}
            self.sites[name] = SiteState(**values)
