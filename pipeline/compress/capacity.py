"""The student's capacity over time: what is scored, masked, dying and gone.

A row of a compactor or gate is *present* while it is in the network, *masked* once the budget has chosen it (retrieval
no longer moves it, the proximal step shrinks it), and *committed* when it, or a row masked beside it, has reached zero:
until then the choice may be revised. Whole groups are masked and committed together, so widths stay multiples. A block
all of whose rows are masked fades as a whole: scale and shift of its last norm shrink in step with its last rows.

No step waits for the device, but those that revise the masks.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.compress.allotment import Allotment
from pipeline.compress.budget import WINDOW, BudgetMissedError, droppable, scheduled, shrinking_sites
from pipeline.compress.compactor import by_row, last_norm, reset_gradients, row_norms, shrink_rows
from pipeline.compress.importance import chances, magnitudes, taylor
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import Indicator, RetrievalNet
from pipeline.models.spec import ArchSpec

log = logging.getLogger(__name__)


@dataclass
class SiteState:
    """One site's rows, in the order in which they stand in the compactor or gate.

    Attributes:
        kept: (C,) int64, each row's channel index in the uncompressed network.
        score: (C,) float32, its importance.
        masked: (C,) bool.
        committed: (C,) bool, a subset of masked.
        left: (C,) int32, steps until a masked row is zero; 0 where it is, and where it is not masked.
        length: (C,) float32, norm of a masked row when it was masked; else 0.
    """

    kept: Tensor
    score: Tensor
    masked: Tensor
    committed: Tensor
    left: Tensor
    length: Tensor

    @classmethod
    def start(cls, width: int, device: torch.device) -> "SiteState":
        """Everything present, nothing masked."""
        none = torch.zeros(width, dtype=torch.bool, device=device)
        zeros = torch.zeros(width, device=device)
        return cls(torch.arange(width, device=device), zeros, none, none.clone(), none.to(torch.int32), zeros.clone())

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
        config: Section of params.yaml.
        cost: What the budget counts.
        steps: Steps of the whole training.
        sites: State by site.
        blocks: Inner sites, by last norm, of the blocks that may go altogether.
        stretch: How much more is saved than the cost model told before the final choice was measured.
        settled: Whether the final choice is made.
    """

    spec: ArchSpec
    config: Student
    cost: CostModel
    steps: int
    sites: dict[str, SiteState]
    blocks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stretch: float = 1.0
    settled: bool = False

    whole: ClassVar[bool] = True
    observed: ClassVar[tuple[str, ...]] = ()
    """It looks at gradients, not at features."""

    @classmethod
    def start(
        cls, spec: ArchSpec, config: Student, cost: CostModel, steps: int, seed: int, device: torch.device
    ) -> "Capacity":
        """Everything present, nothing masked.

        Args:
            spec: The uncompressed network.
            config: Section of params.yaml.
            cost: What the budget counts.
            steps: Steps of the whole training.
            seed: Of importance `random`.
            device: Where the student lives.

        Raises:
            BudgetError: If no widths keep to the budget.
        """
        names = shrinking_sites(spec, config)
        sites = {name: SiteState.start(spec.widths[name], device) for name in names}
        if config.resetting.importance == "random":
            for number, site in enumerate(sites.values()):
                site.score = chances(len(site.score), seed + number).to(device)
        dropped = droppable(spec, config, names)
        blocks = {last_norm(block): block.sites for block in spec.removable if block.sites in dropped}
        capacity = cls(spec, config, cost, steps, sites, blocks)
        even = {name: np.ones(spec.widths[name]) for name in names}
        Allotment.of(spec, config, cost, even).settle(config.budget.reduction)  # coarse widths may jump over the window
        return capacity

    @property
    def widths(self) -> dict[str, int]:
        """Widths of the whole network once every masked row is gone."""
        return {**self.spec.widths, **{name: int((~site.masked).sum()) for name, site in self.sites.items()}}

    @property
    def kept(self) -> dict[str, Tensor]:
        """Channels of the uncompressed network that are still present, by site."""
        return {name: site.kept for name, site in self.sites.items()}

    @property
    def compared(self) -> dict[str, Tensor]:
        """Which of the present channels are to stay, (C,) bool by site."""
        return {name: ~site.masked for name, site in self.sites.items()}

    @property
    def fade(self) -> int:
        """Steps in which a masked row becomes zero."""
        return max(1, math.floor(self.config.budget.fade * self.steps))

    def remaining(self, net: RetrievalNet) -> dict[str, int]:
        """The same widths: what is masked will go."""
        return self.widths

    def due(self, progress: float) -> float:
        """Reduction that must be masked by now."""
        budget = self.config.budget
        return budget.reduction * scheduled(progress, budget.start, budget.end)

    def observe(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Features say nothing to it."""

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """After the backward pass: score, revise the masks now and then, and let all rows go their way.

        Args:
            net: The student, with gradients.
            optimizer: Steps.
            progress: Share of the training done before this step.
        """
        number = round(progress * self.steps)
        last_choice = min(math.ceil(self.config.budget.end * self.steps - 1e-6), self.steps - 1)
        self.score(net)
        if number % self.config.budget.every == 0 or number == last_choice:
            self.revise(net, 1.0 if number >= last_choice else progress)
        present = self._present(net)
        reset_gradients((indicator.weight, site.masked) for indicator, site in present.values())
        before = {name: indicator.weight.detach().clone() for name, (indicator, _) in present.items()}
        norms = {name: parameter.detach().clone() for name, parameter, _ in self._norms(net)}
        optimizer()  # its momentum moves masked rows too, which is undone
        self._fade(net, before, norms)

    def score(self, net: RetrievalNet) -> None:
        """Update the importance of all rows from the gradients of this step."""
        resetting = self.config.resetting
        if self.settled or resetting.importance != "taylor":
            return
        levels = self.levels(net)
        for _, names, left in self._going():
            for name in names:  # what a fading block adds is faded twice, by its rows and by its last norm
                levels[name] = levels[name] * torch.where(left > 0, left / self.fade, 1.0)
        for name, (indicator, site) in self._present(net).items():
            site.score = torch.lerp(taylor(indicator, levels[name]), site.score, resetting.momentum)

    @torch.no_grad()
    def revise(self, net: RetrievalNet, progress: float) -> None:
        """Choose anew which rows are masked; the last choice, at the end of the schedule, is final.

        A row that is masked no more has its length back at once: it would not grow back to it in the time that is left.
        """
        budget = self.config.budget
        if self.settled or progress < budget.start:
            return
        if self.config.resetting.importance == "magnitude":
            for name, values in magnitudes(net, self._present(net)).items():
                self.sites[name].score = values.detach().clone()
        free = {name: site.score[~site.committed].cpu().numpy() for name, site in self.sites.items()}
        allotment = Allotment.of(self.spec, self.config, self.cost, free)
        if progress >= budget.end:
            allotment.settle(budget.reduction)
            self._correct(self.cost.stretch(self.spec.widths, allotment.widths))
            if self.stretch != 1:
                allotment = Allotment.of(self.spec, self.config, self.cost, free)
                allotment.settle(budget.reduction)
            if allotment.reduction > budget.reduction + WINDOW:
                log.warning("what is gone saves %.1f %% by what was measured just now, more than the %.1f %% asked; no "
                            "more goes", 100 * allotment.reduction, 100 * budget.reduction)  # fmt: skip
            self.settled = True
        else:
            allotment.spend(self.due(progress), limit=budget.reduction)
        present, levels = self._present(net), self.levels(net)
        going = {name: left for name, _, left in self._norms(net)}
        for name, site in self.sites.items():
            order = torch.argsort(site.score.masked_fill(site.committed, -torch.inf), stable=True)
            masked = torch.zeros_like(site.masked)
            masked[order[: len(order) - allotment.widths[name]]] = True
            site.left = torch.where(masked & site.masked, site.left, masked * self.fade).to(torch.int32)
            if name in present:
                weight = present[name][0].weight
                weight.div_(by_row(torch.where(site.masked & ~masked, levels[name], 1.0), weight))
                norms = row_norms(present[name][0].matrix)
                site.length = torch.where(site.masked, site.length, norms) * masked
            site.masked = masked
        for name, parameter, left in self._norms(net):  # of a block that stays after all
            parameter.div_(torch.where((going[name] > 0) & (left == 0), going[name] / self.fade, 1.0))

    def _correct(self, factor: float) -> None:
        """Count as the network that was to be the last one turned out."""
        if factor != self.stretch:
            self.cost, self.stretch = self.cost.stretched(self.spec.widths, factor), factor

    def _present(self, net: RetrievalNet) -> dict[str, tuple[Indicator, SiteState]]:
        """Indicators that are still in the network, and their states."""
        return {name: (indicator, self.sites[name]) for name, indicator in net.indicators().items()}

    def _going(self) -> Iterator[tuple[str, tuple[str, ...], Tensor]]:
        """Blocks that may go: last norm, sites, and steps until they are gone, 0 where they stay or are."""
        for norm, names in self.blocks.items():
            sites = [self.sites[name] for name in names]
            if all(len(site.kept) for site in sites):
                going = torch.stack([site.masked.all() for site in sites]).all()
                yield norm, names, torch.stack([site.left.max() for site in sites]).max() * going

    def _norms(self, net: RetrievalNet) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Scale and shift of the last norms of blocks that may go, and steps until they are zero (0: they stay)."""
        for norm, _, left in self._going():
            module = net.get_submodule(norm)
            for name in ("weight", "bias"):
                yield f"{norm}.{name}", module.get_parameter(name), left

    @torch.no_grad()
    def _fade(self, net: RetrievalNet, before: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Shrink the masked rows; where one has just reached zero, those masked by then are committed.

        Args:
            net: The student after the optimiser's step.
            before: Indicators by site as they were before it.
            norms: Scale and shift of the last norms of blocks that may go, before it.
        """
        for name, parameter, left in self._norms(net):
            gone = torch.stack(
                [self.sites[site].committed.all() for site in self.blocks[name.rpartition(".")[0]]]
            ).all()
            shrunk = norms[name] * ((left - 1).clamp_min(0) / left.clamp_min(1))
            parameter.copy_(torch.where((left > 0) | gone, shrunk, parameter))
        died = {}
        for name, (indicator, site) in self._present(net).items():
            weight = indicator.weight
            shrunk = shrink_rows(before[name], site.left)
            site.left = (site.left - 1).clamp_min(0)
            weight.copy_(torch.where(by_row(site.masked, weight), shrunk, weight))
            died[name] = (site.masked & ~site.committed & (site.left == 0)).any()
            site.committed = torch.where(died[name], site.masked, site.committed)
        for names in self.blocks.values():  # a block goes as a whole
            if died.keys() >= set(names):
                going = torch.stack([self.sites[name].masked.all() for name in names]).all()
                begun = torch.stack([died[name] for name in names]).any()
                for name in names:
                    self.sites[name].committed |= going & begun

    def levels(self, net: RetrievalNet) -> dict[str, Tensor]:
        """What is left of each row, (C,) by site: a share of its length when it was masked; 1 for zeros and others."""
        found = {}
        for name, (indicator, site) in self._present(net).items():
            norms = row_norms(indicator.matrix.detach())
            shortened = (norms > 0) & (norms < site.length)
            found[name] = torch.where(shortened, norms / site.length, torch.ones_like(norms))
        return found

    def check(self, widths: Mapping[str, int]) -> None:
        """Refuse a trained student whose living channels do not keep to the budget.

        More than asked may be gone where the last choice was to take no more: what it had measured then, in time, was
        that channels which were gone by then save more than they had been counted for.

        Args:
            widths: What is left.

        Raises:
            BudgetMissedError: With the reduction that was reached.
        """
        asked = self.config.budget.reduction
        reached = 1 - self.cost(widths) / self.cost(self.spec.widths)
        if reached < asked or (reached > asked + WINDOW and dict(widths) != self.widths):
            raise BudgetMissedError(
                f"the student ended at a reduction of {reached:.4f}, not in [{asked:g}, {asked + WINDOW:g}]: rows that "
                "were not chosen are zero, or chosen ones are not; lower `student.optimizer.lr`, and report it"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, as tensors by name."""
        tensors = {
            "settled": torch.tensor(self.settled),
            "stretch": torch.tensor(self.stretch, dtype=torch.float64),
        }
        for name, site in self.sites.items():
            tensors |= {f"{name}/{key}": value for key, value in site.tensors().items()}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.settled = bool(tensors["settled"])
        self._correct(float(tensors["stretch"]))
        for name, site in self.sites.items():
            values = {key: tensors[f"{name}/{key}"].to(value.device) for key, value in site.tensors().items()}
            self.sites[name] = SiteState(**values)
