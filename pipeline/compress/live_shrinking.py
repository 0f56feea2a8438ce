"""Live shrinking: at the end of an epoch the zero channels are cut out, and training continues with a smaller network.

The function in evaluation mode stays the same, and the optimiser's state is carried over.
"""

import logging

import torch
from torch import Tensor

from pipeline.compress.compactor import attach, nonzero_channels, removed_sites, scale_rows
from pipeline.compress.fold import fold, recalibrate_norms
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.surgery import SurgeryPlan, cut, slices, take
from pipeline.models.resnet import RetrievalNet
from pipeline.training.loop import Reshaped

log = logging.getLogger(__name__)


def cut_zero_channels(net: RetrievalNet, shrinker: Shrinker, images: Tensor) -> Reshaped | None:
    """Cut out the channels with zero rows: compactors there are folded and replaced by new ones, others shortened.

    Rows that are still fading are folded at full length and continue to fade in the new compactor.

    Args:
        net: The student, in evaluation mode; not changed.
        shrinker: Its masks are cut in the same way, in place.
        images: Normalised training images (B, 3, H, W) to measure the statistics of folded batch norms on.

    Returns:
        The narrower network, or None if no row is zero.
    """
    removed = removed_sites(net)
    shortened = {
        site: tuple(channels.tolist())
        for site, channels in nonzero_channels(net).items()
        if len(channels) < net.spec.widths[site]
    }
    plan = SurgeryPlan({site: channels for site, channels in shortened.items() if channels or site in removed})
    if not plan.kept:
        return None
    folding = [site for site in plan.kept if net.spec.mixes(site)]
    indicators = net.indicators()
    levels = {site: shrinker.masks[site].level(indicators[site].matrix) for site in folding}
    unfaded = scale_rows(net, {site: 1 / level for site, level in levels.items()})
    narrow = cut(fold(unfaded, folding), plan)
    present = [site for site in folding if narrow.spec.widths[site]]
    for site, channels in plan.kept.items():
        index = torch.tensor(channels, dtype=torch.int64, device=images.device)
        masks = shrinker.masks[site] = shrinker.masks[site].select(index)
        if site in levels:  # rows of a new compactor have norm 1
            levels[site] = levels[site][index]
            masks.full_norm = (masks.full_norm > 0).to(masks.full_norm)
    shrunk = scale_rows(attach(narrow, present), {site: levels[site] for site in present})
    recalibrate_norms(shrunk, present, images)
    indices = slices(net.spec, plan)

    def carry(name: str, state: Tensor) -> Tensor:
        return take(state, indices.get(name, ()))

    before, after = (sum(spec.widths.values()) for spec in (net.spec, shrunk.spec))
    log.info("cut %d channels out of %d sites", before - after, len(plan.kept))
    return Reshaped(shrunk, carry)
