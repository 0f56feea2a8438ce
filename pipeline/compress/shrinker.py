"""Method `budget`: the student gives channels up while it learns, until a budget is kept.

Shrinker dynamic distillation (Xie et al., "Towards a Smaller Student", CVPR 2023) with a budget in the place of the
lasso's weight. In every step: channels are scored by the gradients of the whole loss; every few steps `Schedule` says
how much must be masked, `WidthAllocation` how many channels that leaves each site, and `ChannelMasks` which ones these
are; masked channels lose their gradient (section 3.3) and shrink by the proximal step. `BlockRemoval` does the same
for whole blocks.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.compress.block_removal import BlockRemoval
from pipeline.compress.budget import WINDOW, BudgetMissedError, droppable, narrowest_widths, shrinking_sites
from pipeline.compress.compactor import last_norm, reset_gradients
from pipeline.compress.compression import Compression
from pipeline.compress.final_widths import final_widths
from pipeline.compress.importance import magnitude_scores, random_scores, taylor_scores
from pipeline.compress.masks import ChannelMasks
from pipeline.compress.schedule import Schedule
from pipeline.compress.width_allocation import WidthAllocation
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import Indicator, RetrievalNet
from pipeline.models.spec import ArchSpec


class Shrinker(Compression):
    """Chooses the channels that must go and drives them to zero.

    Raises:
        BudgetError: If no widths keep to the budget; for a latency budget, networks are timed to know that.
    """

    def __init__(
        self, spec: ArchSpec, config: Student, cost: CostModel, steps: int, seed: int, device: torch.device
    ) -> None:
        super().__init__(cost)
        self.spec, self.config, self.table = spec, config, cost
        self.schedule = Schedule(config.budget, steps)
        sites = shrinking_sites(spec, config)
        self.masks = {site: ChannelMasks.start(spec.widths[site], device) for site in sites}
        blocks = droppable(spec, config, sites)
        self.blocks = BlockRemoval({last_norm(b): b.sites for b in spec.removable if b.sites in blocks})
        self.finalized = False
        if config.resetting.importance == "random":
            for number, masks in enumerate(self.masks.values()):
                masks.score = random_scores(len(masks.score), seed + number).to(device)
        # The same search as at the end, with equal scores: what cannot be reached is refused before any training.
        _, self.cost = self._final_widths({site: np.ones(spec.widths[site]) for site in sites})

    @property
    def widths(self) -> dict[str, int]:
        """Widths of the whole network once every masked channel is gone."""
        return {**self.spec.widths, **{site: int((~masks.masked).sum()) for site, masks in self.masks.items()}}

    @property
    def kept(self) -> dict[str, Tensor]:
        """Channels of the uncompressed network that are still present, by site."""
        return {site: masks.kept for site, masks in self.masks.items()}

    @property
    def compared(self) -> dict[str, Tensor]:
        """Which of the present channels are to stay, (C,) bool by site; on the CPU."""
        return {site: ~masks.masked for site, masks in self.masks.items()}

    def remaining(self, net: RetrievalNet) -> dict[str, int]:
        """Return the widths once every masked channel is gone."""
        return self.widths

    def due(self, progress: float) -> float:
        """Return the reduction that must be masked by now."""
        return self.schedule.due(progress)

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Score the channels, revise the masks where that is due, step, and shrink the masked channels."""
        step = round(progress * self.schedule.steps)
        if not self.finalized:
            self.score(net)
            if self.schedule.revises(step):
                self.revise(net, step)
        self.shrink(net, optimizer)

    def score(self, net: RetrievalNet) -> None:
        """Update the importance of all channels from the gradients of this step."""
        resetting = self.config.resetting
        if resetting.importance != "taylor":
            return
        block_levels = self.blocks.levels(self.masks, self.schedule.fade_steps)
        for site, indicator, masks in self._present(net):
            level = masks.level(indicator.matrix) * block_levels.get(site, 1.0)
            masks.score = torch.lerp(taylor_scores(indicator, level), masks.score, resetting.momentum)

    @torch.no_grad()
    def revise(self, net: RetrievalNet, step: int) -> None:
        """Choose anew which channels are masked; the last choice, at the end of the schedule, is final."""
        if self.config.resetting.importance == "magnitude":
            for site, values in magnitude_scores(net, net.indicators()).items():
                self.masks[site].score = values.detach().clone()
        free = {site: masks.score.cpu()[~masks.committed].numpy() for site, masks in self.masks.items()}
        if step >= self.schedule.final_step:
            widths, self.cost = self._final_widths(free)
            self.finalized = True
        else:
            allocation = WidthAllocation.of(self.spec, self.config, self.cost, free)
            allocation.allocate(self.due(step / self.schedule.steps), limit=self.config.budget.reduction)
            widths = allocation.widths
        fading = self.blocks.steps_left(self.masks)
        for site, indicator, masks in self._present(net):
            masks.revise(widths[site], self.schedule.fade_steps, indicator)
        self.blocks.restore(net, fading, self.masks, self.schedule.fade_steps)

    @torch.no_grad()
    def shrink(self, net: RetrievalNet, optimizer: Callable[[], object]) -> None:
        """Let the optimiser step; masked channels and fading blocks move by the proximal step alone."""
        present = [(indicator.weight, masks) for _, indicator, masks in self._present(net) if masks.masked.any()]
        reset_gradients((weight, masks.masked) for weight, masks in present)
        rows = [masks.shrunk_rows(weight) for weight, masks in present]
        norms = list(self.blocks.shrunk_norms(net, self.masks))
        optimizer()  # its momentum moves masked channels too, which the next lines undo
        for (weight, masks), shrunk in zip(present, rows, strict=True):
            weight[masks.masked_indices()] = shrunk
            masks.count_step()
        for parameter, faded in norms:
            parameter.copy_(faded)
        self.blocks.commit(self.masks)

    def check(self, widths: Mapping[str, int]) -> None:
        """Refuse a trained student whose living channels do not keep to the budget.

        The reduction may exceed the window if the final timing showed that channels which were already removed saved
        more than estimated.

        Raises:
            BudgetMissedError: With the reduction that was reached.
        """
        asked, reached = self.config.budget.reduction, self.cost.reduction(self.spec.widths, widths)
        if reached < asked or (reached > asked + WINDOW and dict(widths) != self.widths):
            raise BudgetMissedError(
                f"the student ended at a reduction of {reached:.4f}, not in [{asked:g}, {asked + WINDOW:g}]: rows that "
                "were not chosen are zero, or chosen ones are not; lower `student.optimizer.lr`, and report it"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that changes, as tensors by name."""
        return {
            "finalized": torch.tensor(self.finalized),
            "latency_correction": torch.tensor(self.cost.correction, dtype=torch.float64),
            **{
                f"{site}/{name}": value for site, masks in self.masks.items() for name, value in masks.tensors().items()
            },
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.finalized = bool(tensors["finalized"])
        self.cost = self.table.corrected(self.spec.widths, float(tensors["latency_correction"]))
        for site, masks in self.masks.items():
            values = {name: tensors[f"{site}/{name}"].to(value.device) for name, value in masks.tensors().items()}
            self.masks[site] = ChannelMasks(**values)

    def _present(self, net: RetrievalNet) -> list[tuple[str, Indicator, ChannelMasks]]:
        """Return the sites that are still in the network, with compactor or gate and masks."""
        return [(site, indicator, self.masks[site]) for site, indicator in net.indicators().items()]

    def _final_widths(self, scores: Mapping[str, np.ndarray]) -> tuple[dict[str, int], CostModel]:
        """Return the widths that the whole budget leaves, and the cost model that agrees with their timing."""
        asked = self.config.budget.reduction

        def choose(cost: CostModel) -> dict[str, int]:
            allocation = WidthAllocation.of(self.spec, self.config, cost, scores)
            allocation.finalize(asked)
            return allocation.widths

        narrowest = narrowest_widths(self.spec, self.config)
        return final_widths(choose, self.table, self.spec.widths, narrowest, asked, self.cost.correction)
