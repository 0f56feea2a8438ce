"""What the user asks for, and whether the structure can give it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

from pipeline.config import Student
from pipeline.models.cost import CostModel, macs_model, params_model
from pipeline.models.spec import EMBEDDING, ArchSpec, is_inner

WINDOW = 0.01
"""The final reduction lies in [asked, asked + WINDOW]."""


class BudgetError(ValueError):
    """A reduction that no choice of widths reaches."""

    exit_code = 2


class BudgetMissedError(RuntimeError):
    """A trained student that does not keep to its budget."""

    exit_code = 4


def least_widths(spec: ArchSpec, sites: Iterable[str], multiple: int) -> dict[str, int]:
    """Smallest width of each site: one multiple, or what it has where that is less.

    The stream that the embedding is read from keeps as many channels as the embedding has dimensions: from fewer it
    would span a subspace only, which the importance of single rows does not show.
    """
    last = next(layer.source for layer in spec.layers() if layer.target == EMBEDDING)
    spanned = math.ceil(spec.embedding_dim / multiple) * multiple
    return {site: min(spanned if site == last else multiple, spec.widths[site]) for site in sites}


def droppable(spec: ArchSpec, config: Student, sites: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Inner sites, by block, of the blocks that may go altogether."""
    present = set(sites)
    allowed = config.budget.allow_block_removal
    return tuple(block.sites for block in spec.removable if allowed and present.issuperset(block.sites))


def shrinking_sites(spec: ArchSpec, config: Student) -> tuple[str, ...]:
    """Dimensions that get a compactor or gate, from input to output.

    Raises:
        BudgetError: If there are none.
    """
    kinds = set(config.sites)
    found = tuple(name for name in spec.widths if (name.rpartition(".")[2] if is_inner(name) else "stream") in kinds)
    if not found:
        raise BudgetError(
            f"`student.sites` {config.sites} names no site of a ResNet-{spec.depth}, whose blocks are basic: add "
            "conv1 or stream"
        )
    return found


def narrowest_widths(spec: ArchSpec, config: Student) -> dict[str, int]:
    """Return the widths of the whole network with every site at its least and every block gone that may go.

    Raises:
        BudgetError: If there are no sites.
    """
    sites = shrinking_sites(spec, config)
    blocks = droppable(spec, config, sites)
    gone = {site: 0 for block in blocks for site in block}
    return {**spec.widths, **least_widths(spec, sites, config.channel_multiple), **gone}


def cost_model(
    spec: ArchSpec, config: Student, size: tuple[int, int], measure: Callable[[], CostModel] | None = None
) -> CostModel:
    """Return what the budget counts, once the structure is known to allow the budget.

    Whether a latency budget can be kept is known only where networks are timed (see `final_widths`).

    Args:
        spec: The uncompressed network.
        config: Section of params.yaml.
        size: Height and width of an image, pixels.
        measure: Seconds as a function of widths, called for a latency budget only.

    Raises:
        BudgetError: If the structure cannot keep the budget, or there are no sites.
        ValueError: If latency cannot be measured here.
    """
    if config.method != "none":
        shrinking_sites(spec, config)
    if not config.budgeted:
        return macs_model(spec, size)
    if config.budget.of == "latency":
        if measure is None:
            raise ValueError("a latency budget needs layer times, which only stage student measures")
        return measure()
    model = params_model(spec) if config.budget.of == "params" else macs_model(spec, size)
    refuse_unreachable(spec, config, model)
    return model


def refuse_unreachable(spec: ArchSpec, config: Student, cost: CostModel) -> None:
    """Refuse, before training, a budget that the structure cannot keep.

    Raises:
        BudgetError: With the largest possible reduction and the layers that bind; or if there are no sites.
    """
    floor = narrowest_widths(spec, config)
    possible = cost.reduction(spec.widths, floor)
    if config.budget.reduction <= possible:
        return
    sizes = {**cost.fixed, **floor}
    weights: dict[str, float] = defaultdict(float)
    for term in cost.terms:
        weights[term.right] += term(sizes)
    binding = sorted(weights, key=lambda name: -weights[name])[:3]
    shares = ", ".join(f"{name} {weights[name] / cost(floor):.0%}" for name in binding)
    raise BudgetError(
        f"`student.budget.reduction` {config.budget.reduction:g} cannot be reached: with every site at its least width "
        f"the reduction is {possible:.4f}, and what remains lies in {shares}; ask for less, add sites or lower "
        "`student.channel_multiple`"
    )
