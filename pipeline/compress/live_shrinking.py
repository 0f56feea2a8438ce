"""Fold and continue: at an epoch's end the student becomes physically smaller, and training goes on.

The function in evaluation mode stays the same, and the optimiser's state is carried over.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.compress.compactor import attach, living_channels, removed_sites, scale_rows
from pipeline.compress.fold import fold, recentre
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.surgery import SurgeryPlan, cut, slices, take
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import is_inner

log = logging.getLogger(__name__)

Carry = Callable[[str, Tensor], Tensor]
"""From a parameter's name and a tensor of its old shape to the new shape."""


def cut_dead(net: RetrievalNet, capacity: Shrinker, images: Tensor) -> tuple[RetrievalNet, Carry] | None:
    """Cut out the rows that are zero, with fresh compactors there; gates are only shortened.

    Indices on their way out are folded at full length and go on fading in the fresh compactor.

    Args:
        net: The student, in evaluation mode; not changed.
        capacity: Its state is cut alike.
        images: Normalised training images (B, 3, H, W) that folded batch norms are measured on.

    Returns:
        The narrower network and what happens to tensors of the old shapes, or None where no row has died.
    """
    removed = removed_sites(net)
    dying = {
        site: tuple(rows.tolist()) for site, rows in living_channels(net).items() if len(rows) < net.spec.widths[site]
    }
    plan = SurgeryPlan({site: rows for site, rows in dying.items() if rows or site in removed})
    if not plan.kept:
        return None
    folding = [site for site in plan.kept if is_inner(site)]
    indicators = net.indicators()
    levels = {site: capacity.masks[site].level(indicators[site].matrix) for site in folding}
    unfaded = scale_rows(net, {site: 1 / level for site, level in levels.items()})
    narrow = cut(fold(unfaded, folding), plan)
    staying = [site for site in folding if narrow.spec.widths[site]]
    for site, rows in plan.kept.items():
        index = torch.tensor(rows, dtype=torch.int64, device=images.device)
        masks = capacity.masks[site] = capacity.masks[site].select(index)
        if site in levels:  # a fresh compactor's rows have length 1
            levels[site] = levels[site][index]
            masks.full_norm = (masks.full_norm > 0).to(masks.full_norm)
    shrunk = scale_rows(attach(narrow, staying), {site: levels[site] for site in staying})
    recentre(shrunk, staying, images)
    taken = slices(net.spec, plan)

    def carry(name: str, state: Tensor) -> Tensor:
        return take(state, taken.get(name, ()))

    before, after = (sum(spec.widths.values()) for spec in (net.spec, shrunk.spec))
    log.info("cut %d channels out of %d sites", before - after, len(plan.kept))
    return shrunk, carry
