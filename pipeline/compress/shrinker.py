"""Method `budget`: the student shrinks while it learns, until it keeps a budget.

Capacity dynamic distillation (Xie et al., "Towards a Smaller Student", CVPR 2023) with a budget instead of a weight of
the lasso. Every step scores the channels by the gradients of the whole loss. Every few steps the masks are revised:
`Schedule` gives the reduction to mask, `WidthAllocation` the width that it leaves each site, and `ChannelMasks` selects
the least important channels. Masked channels have their gradients reset (section 3.3) and shrink by a proximal step, so
that they are exactly zero at a known step. `BlockRemoval` does the same for whole blocks.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.compress.block_removal import BlockRemoval
from pipeline.compress.budget import WINDOW, BudgetMissedError, removable_blocks, shrinking_sites
from pipeline.compress.compactor import last_norm, reset_gradients
from pipeline.compress.compression import Compression
from pipeline.compress.final_widths import final_widths
from pipeline.compress.importance import magnitude_scores, random_scores, taylor_scores
from pipeline.compress.masks import ChannelMasks
from pipeline.compress.schedule import Schedule
from pipeline.compress.width_allocation import WidthAllocation, allocate_budget
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import Indicator, RetrievalNet
from pipeline.models.spec import ArchSpec


class Shrinker(Compression):
    """Selects the channels to remove and drives them to zero.

    Raises:
        BudgetError: If no widths keep the budget; a latency budget is checked by timing networks.
    """

    def __init__(
        self, spec: ArchSpec, config: Student, cost: CostModel, steps: int, seed: int, device: torch.device
    ) -> None:
        super().__init__(spec, cost)
        self.config, self.table = config, cost
        self.schedule = Schedule(config.budget, steps)
        sites = shrinking_sites(spec, config)
        self.masks = {site: ChannelMasks.start(spec.widths[site], device) for site in sites}
        blocks = removable_blocks(spec, config, sites)
        self.blocks = BlockRemoval({last_norm(b): b.sites for b in spec.removable if b.sites in blocks})
        self.finalized = False
        self._batch_scores: dict[str, Tensor] = {}
        if config.resetting.importance == "random":
            for number, masks in enumerate(self.masks.values()):
                masks.score = random_scores(len(masks.score), seed + number).to(device)
        # The same search as at the end, with equal scores, so that an unreachable budget fails before any training.
        _, self.cost = self._final_widths({site: np.ones(spec.widths[site]) for site in sites})

    @property
    def widths(self) -> dict[str, int]:
        """Widths of the whole network without the masked channels."""
        return {**self.full.widths, **{site: int((~masks.masked).sum()) for site, masks in self.masks.items()}}

    @property
    def kept(self) -> dict[str, Tensor]:
        """Channels of the uncompressed network that are not cut, by site."""
        return {site: masks.kept for site, masks in self.masks.items()}

    @property
    def compared_channels(self) -> dict[str, Tensor]:
        """The channels that are not masked, (C,) bool by site; on the CPU."""
        return {site: ~masks.masked for site, masks in self.masks.items()}

    def remaining_widths(self, net: RetrievalNet) -> dict[str, int]:
        return self.widths

    def target_reduction(self, progress: float) -> float:
        return self.schedule.reduction(progress)

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Score the channels, revise the masks if scheduled, step, and shrink the masked channels."""
        step = round(progress * self.schedule.steps)
        if not self.finalized:
            self.score(net)
            if self.schedule.revises(step):
                self.revise(net, step)
        self.shrink(net, optimizer)

    @property
    def scores_embeddings(self) -> bool:
        return self.config.resetting.importance == "embedding" and not self.finalized

    def observe_scores(self, scores: Mapping[str, Tensor]) -> None:
        self._batch_scores = dict(scores)

    def score(self, net: RetrievalNet) -> None:
        """Update the moving average of the importance of all channels from this step."""
        resetting = self.config.resetting
        if resetting.importance not in ("embedding", "taylor"):
            return
        block_levels = self.blocks.levels(self.masks, self.schedule.fade_steps)
        for site, indicator, masks in self._present(net):
            level = masks.level(indicator.matrix) * block_levels.get(site, 1.0)
            if resetting.importance == "taylor":
                scores = taylor_scores(indicator, level)
            else:
                scores = self._batch_scores[site] / level.square()
            masks.score = torch.lerp(scores, masks.score, resetting.momentum)

    @torch.no_grad()
    def revise(self, net: RetrievalNet, step: int) -> None:
        """Select the masked channels again; the selection at the end of the schedule is final."""
        if self.config.resetting.importance == "magnitude":
            for site, values in magnitude_scores(net, net.indicators()).items():
                self.masks[site].score = values.detach().clone()
        free = {site: masks.score.cpu()[~masks.committed].numpy() for site, masks in self.masks.items()}
        if step >= self.schedule.final_step:
            widths, self.cost = self._final_widths(free)
            self.finalized = True
        else:
            allocation = WidthAllocation.of(self.full, self.config, self.cost, free)
            target = self.schedule.reduction(step / self.schedule.steps)
            allocation.allocate(target, limit=self.config.budget.reduction)
            widths = allocation.widths
        fading = self.blocks.steps_left(self.masks)
        for site, indicator, masks in self._present(net):
            masks.revise(widths[site], self.schedule.fade_steps, indicator)
        self.blocks.restore(net, fading, self.masks, self.schedule.fade_steps)

    @torch.no_grad()
    def shrink(self, net: RetrievalNet, optimizer: Callable[[], object]) -> None:
        """Take an optimiser step; masked channels and fading blocks move by the proximal step alone."""
        present = [(indicator.weight, masks) for _, indicator, masks in self._present(net) if masks.masked.any()]
        reset_gradients((weight, masks.masked) for weight, masks in present)
        shrunk_rows = [masks.shrunk_rows(weight) for weight, masks in present]
        norms = list(self.blocks.shrunk_norms(net, self.masks))
        optimizer()  # momentum moves masked channels as well; the next lines undo that
        for (weight, masks), shrunk in zip(present, shrunk_rows, strict=True):
            weight[masks.masked_indices()] = shrunk
            masks.count_step()
        for parameter, faded in norms:
            parameter.copy_(faded)
        self.blocks.commit(self.masks)

    def check(self, widths: Mapping[str, int]) -> None:
        """Check that the nonzero channels of a trained student keep the budget.

        The reduction may exceed the window if the final timing showed that channels which were already removed saved
        more than estimated.

        Raises:
            BudgetMissedError: If they do not, with the reduction that was reached.
        """
        target, reached = self.config.budget.reduction, self.cost.reduction(self.full.widths, widths)
        if reached < target or (reached > target + WINDOW and dict(widths) != self.widths):
            raise BudgetMissedError(
                f"the student ended at a reduction of {reached:.4f}, not in [{target:g}, {target + WINDOW:g}], because "
                "unmasked channels are zero or masked ones are not; lower `student.optimizer.lr`, and report this bug"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return masks, scores and the latency correction, as tensors by name."""
        return {
            "finalized": torch.tensor(self.finalized),
            "latency_correction": torch.tensor(self.cost.correction, dtype=torch.float64),
            **{
                f"{site}/{name}": value for site, masks in self.masks.items() for name, value in masks.tensors().items()
            },
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self.finalized = bool(tensors["finalized"])
        self.cost = self.table.corrected(self.full.widths, float(tensors["latency_correction"]))
        for site, masks in self.masks.items():
            values = {name: tensors[f"{site}/{name}"].to(value.device) for name, value in masks.tensors().items()}
            self.masks[site] = ChannelMasks(**values)

    def _present(self, net: RetrievalNet) -> list[tuple[str, Indicator, ChannelMasks]]:
        """Return the sites that are in the network, each with its indicator and its masks."""
        return [(site, indicator, self.masks[site]) for site, indicator in net.indicators().items()]

    def _final_widths(self, scores: Mapping[str, np.ndarray]) -> tuple[dict[str, int], CostModel]:
        """Return the widths that keep the budget, and the cost model that agrees with their timing."""
        choose = partial(allocate_budget, self.full, self.config, scores)
        return final_widths(choose, self.full, self.config, self.table, self.cost.correction)
