"""Cutting channels out of a network.

A plan names the channels that stay at each site. From it follow the new spec and, for every tensor by name, what is
taken along which dimension; the same slices serve weights and the optimiser's state.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.compress.compactor import living_channels, removed_sites
from pipeline.compress.fold import EPS, fold
from pipeline.config import Surgery
from pipeline.files import read_json, write_text
from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.spec import HEAD_NORM, ArchSpec, indicator_of, is_inner

PLAN = "plan.json"

EXACT = 1e-10
"""Largest difference that float64 arithmetic may leave between the function before and after."""


class SurgeryError(RuntimeError):
    """A cut that would change what the network computes, or leave widths that were not asked for."""

    exit_code = 4


@dataclass(frozen=True)
class SurgeryPlan:
    """Which channels stay.

    Attributes:
        kept: By site, indices of the channels that stay, ascending.
    """

    kept: Mapping[str, tuple[int, ...]]

    def write(self, folder: Path) -> None:
        """Write plan.json."""
        write_text(folder / PLAN, json.dumps({"kept": self.kept}) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "SurgeryPlan":
        """Read plan.json."""
        return cls({site: tuple(rows) for site, rows in read_json(folder / PLAN)["kept"].items()})

    def after(self, earlier: "SurgeryPlan") -> "SurgeryPlan":
        """This plan in terms of the channels that `earlier` started from."""
        kept = dict(earlier.kept)
        for site, rows in self.kept.items():
            kept[site] = tuple(earlier.kept[site][row] for row in rows) if site in earlier.kept else rows
        return SurgeryPlan(kept)


@dataclass(frozen=True)
class SurgeryResult:
    """What surgery leaves.

    Attributes:
        net: The narrow network, without indicators and classifier, float32, in evaluation mode.
        plan: What it kept of the network it was given.
        max_abs_diff: Largest absolute difference of the embeddings before and after, in float64.
    """

    net: RetrievalNet
    plan: SurgeryPlan
    max_abs_diff: float


def run_surgery(net: RetrievalNet, full: ArchSpec, config: Surgery, probe: Tensor) -> SurgeryResult:
    """Plan, fold, cut, and verify that the function is the same.

    Args:
        net: Trained student in evaluation mode, on the CPU; not changed.
        full: The uncompressed network, the teacher's.
        config: Section of params.yaml.
        probe: Normalised images (B, 3, H, W) to compare embeddings on.

    Raises:
        SurgeryError: If widths come out wrong or the function changes.
    """
    plan = plan_cut(net, config.tolerance, config.channel_multiple, full)
    exact = convert(net, net.spec).double()
    narrow = fold_and_cut(exact, plan)
    difference = largest_difference(exact, narrow, probe.double())
    if not difference <= EXACT:
        raise SurgeryError(
            f"surgery changes embeddings by {difference:.3g}, more than {EXACT:g}, in float64; channels that are not "
            f"zero were cut: lower `surgery.tolerance` ({config.tolerance:g})"
        )
    bare = convert(narrow, narrow.spec.model_copy(update={"identities": 0})).float()
    return SurgeryResult(bare, plan, difference)


def plan_cut(net: RetrievalNet, tolerance: float, multiple: int, full: ArchSpec) -> SurgeryPlan:
    """Keep the channels whose compactor rows are not zero.

    Args:
        net: Network with indicators.
        tolerance: Largest row norm that counts as zero.
        multiple: What every width that shrinks must be a multiple of.
        full: The uncompressed network: a student may have been cut while it learned.

    Raises:
        SurgeryError: If a width would be none in a block that is needed, or no whole multiple.
    """
    removed = removed_sites(net, tolerance)
    kept = {site: tuple(rows.tolist()) for site, rows in living_channels(net, tolerance).items()}
    for site, rows in kept.items():
        if not rows and site not in removed:
            raise SurgeryError(
                f"every channel of {site} is zero, but its block cannot be dropped; lower `surgery.tolerance` or the "
                "budget"
            )
        if len(rows) % multiple and len(rows) != full.widths[site]:
            raise SurgeryError(
                f"{site} would keep {len(rows)} channels, no multiple of `surgery.channel_multiple` {multiple}; train "
                "the student with that multiple"
            )
    return SurgeryPlan(kept)


def cut_spec(spec: ArchSpec, plan: SurgeryPlan) -> ArchSpec:
    """The spec after a cut."""
    widths = {**spec.widths, **{site: len(rows) for site, rows in plan.kept.items()}}
    indicators = tuple(site for site in spec.indicators if widths[site])
    return ArchSpec.model_validate({**spec.model_dump(), "widths": widths, "indicators": indicators})


def slices(spec: ArchSpec, plan: SurgeryPlan) -> dict[str, list[tuple[int, Tensor]]]:
    """What is taken from each tensor: pairs of a dimension and the indices that stay, by tensor name.

    Tensors that are not named keep their shape. A compactor loses rows and columns alike.
    """
    kept = {site: torch.tensor(rows, dtype=torch.int64) for site, rows in plan.kept.items()}
    taken: dict[str, list[tuple[int, Tensor]]] = {}
    norms = [(HEAD_NORM, "layer4")]
    for layer in spec.layers():
        pieces = [(0, kept[layer.target])] if layer.target in kept else []
        pieces += [(1, kept[layer.source])] if layer.source in kept else []
        taken[f"{layer.name}.weight"] = pieces
        norms.append((layer.norm, layer.target))
    for norm, dimension in norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            taken[f"{norm}.{name}"] = [(0, kept[dimension])] if dimension in kept else []
    for site in set(spec.indicators) & set(kept):
        taken[f"{indicator_of(site)}.weight"] = [(0, kept[site])] + ([(1, kept[site])] if is_inner(site) else [])
    return taken


def take(tensor: Tensor, pieces: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Select indices along dimensions, one after the other."""
    for dimension, index in pieces:
        tensor = tensor.index_select(dimension, index.to(tensor.device))
    return tensor


def cut(net: RetrievalNet, plan: SurgeryPlan) -> RetrievalNet:
    """A narrower network; the function is the same if what is cut was zero.

    Args:
        net: Network whose inner sites in `plan` have no compactor any more.
        plan: Channels that stay.
    """
    taken, whole = slices(net.spec, plan), net.state_dict()
    state = {name: take(tensor, taken.get(name, ())) for name, tensor in whole.items()}
    if "layer4" in plan.kept:
        dead = torch.ones(net.spec.widths["layer4"], dtype=torch.bool)
        dead[list(plan.kept["layer4"])] = False
        state["head.bn2.running_mean"] = whole["head.bn2.running_mean"] - _constant(whole, dead)
    return convert(net, cut_spec(net.spec, plan), state)


def _constant(state: Mapping[str, Tensor], dead: Tensor) -> Tensor:
    """What channels that are always zero add to the embedding, (D,): the head's first norm shifts them."""
    norm = {name: state[f"{HEAD_NORM}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    shifted = norm["bias"] - norm["weight"] * norm["running_mean"] / torch.sqrt(norm["running_var"] + EPS)
    return state["head.fc.weight"] @ (torch.relu(shifted) * dead.to(shifted))


def fold_and_cut(net: RetrievalNet, plan: SurgeryPlan) -> RetrievalNet:
    """Fold compactors and gates of the plan's sites, then cut."""
    return cut(fold(net, [site for site in net.spec.indicators if site in plan.kept]), plan)


@torch.no_grad()
def largest_difference(before: RetrievalNet, after: RetrievalNet, images: Tensor) -> float:
    """Largest absolute difference between the embeddings of two networks, in their own precision.

    Args:
        before: Network in evaluation mode.
        after: Another with the same dtype.
        images: Normalised images (B, 3, H, W) of that dtype.
    """
    return float((before(images).embedding - after(images).embedding).abs().max())
