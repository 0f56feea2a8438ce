"""What the user asks for, when it is due, and whether it can be had."""

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


def scheduled(progress: float, start: float, end: float) -> float:
    """Share of the reduction that is due.

    Cubic: fast at first, while the network is wide, and slow at last (Zhu and Gupta, 2017, equation 1).

    Args:
        progress: Share of the training done, in [0, 1].
        start: Progress at which masking starts.
        end: Progress from which all of it is due.
    """
    passed = min(1.0, max(0.0, (progress - start) / (end - start)))
    return 1.0 - (1.0 - passed) ** 3


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


def cost_model(
    spec: ArchSpec, config: Student, size: tuple[int, int], measure: Callable[[], CostModel] | None = None
) -> CostModel:
    """What the budget counts, once it is sure that it can be kept.

    Args:
        spec: The uncompressed network.
        config: Section of params.yaml.
        size: Height and width of an image, pixels.
        measure: Seconds as a function of widths, called for a budget of latency only.

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
            raise ValueError("latency is measured, not told from a spec")
        model = measure()
    else:
        model = params_model(spec) if config.budget.of == "params" else macs_model(spec, size)
    refuse_unreachable(spec, config, model)
    return model


def refuse_unreachable(spec: ArchSpec, config: Student, cost: CostModel) -> None:
    """Complain before training about a budget that the structure cannot keep.

    Args:
        spec: The uncompressed network.
        config: Section of params.yaml.
        cost: What the budget counts.

    Raises:
        BudgetError: With the largest possible reduction and the layers that bind; or if there are no sites.
    """
    multiple, reduction = config.channel_multiple, config.budget.reduction
    sites = shrinking_sites(spec, config)
    floor = {**spec.widths, **least_widths(spec, sites, multiple)}
    floor |= {site: 0 for block in droppable(spec, config, sites) for site in block}
    possible = 1 - cost(floor) / cost(spec.widths)
    if reduction <= possible:
        return
    sizes = {**cost.fixed, **floor}
    weights: dict[str, float] = defaultdict(float)
    for term in cost.terms:
        weights[term.right] += term(sizes)
    binding = sorted(weights, key=lambda name: -weights[name])[:3]
    shares = ", ".join(f"{name} {weights[name] / cost(floor):.0%}" for name in binding)
    raise BudgetError(
        f"`student.budget.reduction` {reduction:g} cannot be reached: with every site at its least width the reduction "
        f"is {possible:.4f}, and what remains lies in {shares}; ask for less, add sites or lower "
        "`student.channel_multiple`"
    )
