"""Removal of whole residual blocks.

A block with all inner channels masked fades as a whole: scale and shift of its last batch norm shrink together with the
last of its channels, so the block adds exactly nothing when they reach zero. This is our addition; Xie et al. (CVPR
2023) remove channels only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.compress.masks import ChannelMasks
from pipeline.models.resnet import RetrievalNet


@dataclass(frozen=True)
class BlockRemoval:
    """The blocks that may be removed.

    Attributes:
        blocks: Inner sites of each block, by module name of its last batch norm.
    """

    blocks: Mapping[str, tuple[str, ...]]

    def steps_left(self, masks: Mapping[str, ChannelMasks]) -> dict[str, int]:
        """Return, by last norm, the steps until each fading block adds nothing; 0 if it already adds nothing."""
        return {
            norm: max(int(masks[site].steps_left.max()) for site in sites)
            for norm, sites in self.blocks.items()
            if all(len(masks[site].masked) and masks[site].masked.all() for site in sites)
        }

    def levels(self, masks: Mapping[str, ChannelMasks], fade_steps: int) -> dict[str, float]:
        """Return, by inner site of each fading block, the fraction in (0, 1] that is left of its last norm."""
        return {
            site: left / fade_steps
            for norm, left in self.steps_left(masks).items()
            if left
            for site in self.blocks[norm]
        }

    def restore(
        self, net: RetrievalNet, before: Mapping[str, int], masks: Mapping[str, ChannelMasks], fade_steps: int
    ) -> None:
        """Scale the last norms of blocks that no longer fade back to full size.

        Args:
            net: The student, changed in place.
            before: `steps_left` before the masks were revised.
            masks: The revised masks, by site.
            fade_steps: Steps of a whole fade.
        """
        for norm in before.keys() - self.steps_left(masks).keys():
            for parameter in net.get_submodule(norm).parameters():
                parameter.div_(before[norm] / fade_steps)

    def shrunk_norms(self, net: RetrievalNet, masks: Mapping[str, ChannelMasks]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scale and shift of the last norm of each fading block, with their values after the next step."""
        for norm, left in self.steps_left(masks).items():
            for parameter in net.get_submodule(norm).parameters():
                yield parameter, parameter * (max(left - 1, 0) / max(left, 1))

    def commit(self, masks: Mapping[str, ChannelMasks]) -> None:
        """Commit every channel of a fading block once all channels of one of its sites are committed."""
        for norm in self.steps_left(masks):
            sites = [masks[site] for site in self.blocks[norm]]
            if any(site.committed.all() for site in sites):
                for site in sites:
                    site.committed = torch.ones_like(site.masked)
