"""The budget: what it counts, which sites it may narrow, and whether the architecture can reach it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

from pipeline.config import Student
from pipeline.models.cost import CostModel, macs_model, params_model
from pipeline.models.spec import LAST, ArchSpec, is_inner

WINDOW = 0.01
"""Tolerance of a budget: the final reduction lies in [target, target + WINDOW]."""


class BudgetError(ValueError):
    """No choice of widths reaches the requested reduction."""

    exit_code = 2


class BudgetMissedError(RuntimeError):
    """A trained student does not keep its budget."""

    exit_code = 4


def minimum_widths(spec: ArchSpec, sites: Iterable[str], multiple: int) -> dict[str, int]:
    """Return the smallest width of each site: one multiple, or its present width if that is less.

    The residual stream before the embedding keeps at least as many channels as the embedding has dimensions: with fewer
    the embeddings would span only a subspace, which the importance of single channels does not show.
    """
    spanned = math.ceil(spec.embedding_dim / multiple) * multiple
    return {site: min(spanned if site == LAST else multiple, spec.widths[site]) for site in sites}


def removable_blocks(spec: ArchSpec, config: Student, sites: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return the inner sites of each block that may be removed as a whole."""
    present = set(sites)
    allowed = config.budget.allow_block_removal
    return tuple(block.sites for block in spec.removable if allowed and present.issuperset(block.sites))


def shrinking_sites(spec: ArchSpec, config: Student) -> tuple[str, ...]:
    """Return the sites that get an indicator, from input to output.

    Without a linear map in the head, the last stream is the embedding and keeps its width. Sites of removed blocks have
    no channels.

    Raises:
        BudgetError: If there are none.
    """
    kinds = set(config.sites)
    names = (name for name, width in spec.widths.items() if width and (spec.has_linear or name != LAST))
    sites = tuple(name for name in names if (name.rpartition(".")[2] if is_inner(name) else "stream") in kinds)
    if not sites:
        raise BudgetError(
            f"`student.sites` {config.sites} names no site of a ResNet-{spec.depth}, which has basic blocks; add "
            "conv1 or stream"
        )
    return sites


def narrowest_widths(spec: ArchSpec, config: Student) -> dict[str, int]:
    """Return the widths of the whole network with every site at its minimum and all removable blocks removed.

    Raises:
        BudgetError: If there are no sites.
    """
    sites = shrinking_sites(spec, config)
    removed = {site: 0 for block in removable_blocks(spec, config, sites) for site in block}
    return {**spec.widths, **minimum_widths(spec, sites, config.channel_multiple), **removed}


def cost_model(
    spec: ArchSpec, config: Student, size: tuple[int, int], measure: Callable[[], CostModel] | None = None
) -> CostModel:
    """Return the cost that the budget limits, after checking that the architecture can reach the budget.

    A latency budget is not checked here, since that takes networks to be timed (see `final_widths`).

    Args:
        spec: The uncompressed network.
        config: Section `student` of params.yaml.
        size: Height and width of an image, pixels.
        measure: Returns seconds as a function of widths; called for a latency budget only.

    Raises:
        BudgetError: If the architecture cannot reach the budget, or there are no sites.
        ValueError: If the budget is latency and `measure` is missing.
    """
    if config.method != "none":
        shrinking_sites(spec, config)
    if not config.budgeted:
        return macs_model(spec, size)
    if config.budget.of == "latency":
        if measure is None:
            raise ValueError("a latency budget needs layer times, which are measured in stage student only")
        return measure()
    model = params_model(spec) if config.budget.of == "params" else macs_model(spec, size)
    check_reachable(spec, config, model)
    return model


def check_reachable(spec: ArchSpec, config: Student, cost: CostModel) -> None:
    """Check, before training, that the architecture can reach the budget.

    Raises:
        BudgetError: If it cannot, with the largest possible reduction and the most expensive layers; or if there are no
            sites.
    """
    narrowest = narrowest_widths(spec, config)
    possible = cost.reduction(spec.widths, narrowest)
    if config.budget.reduction <= possible:
        return
    sizes = {**cost.fixed, **narrowest}
    costs: dict[str, float] = defaultdict(float)
    for term in cost.terms:
        costs[term.right] += term(sizes)
    largest = sorted(costs, key=lambda name: -costs[name])[:3]
    shares = ", ".join(f"{name} {costs[name] / cost(narrowest):.0%}" for name in largest)
    raise BudgetError(
        f"`student.budget.reduction` {config.budget.reduction:g} cannot be reached: with every site at its minimum the "
        f"reduction is {possible:.4f}, and the remaining cost is mostly in {shares}; request less, add sites or lower "
        "`student.channel_multiple`"
    )
