"""Surgery: folds indicators, and cuts channels out of a network.

A plan lists the channels to keep at each site. It determines the new spec and, for every tensor by name, the indices to
select along each dimension; weights and optimiser state are sliced in the same way.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.compress.compactor import nonzero_channels, removed_sites
from pipeline.compress.fold import EPS, fold
from pipeline.config import Surgery
from pipeline.files import read_json, write_text
from pipeline.models.head import EmbeddingHead
from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.spec import HEAD_NORM, LAST, ArchSpec, indicator_name

PLAN = "plan.json"

EXACT = 1e-10
"""Largest absolute difference of an embedding component in float64 that counts as rounding."""


class SurgeryError(RuntimeError):
    """Surgery would change the function of the network, or leave widths that are not allowed."""

    exit_code = 4


@dataclass(frozen=True)
class SurgeryPlan:
    """The channels to keep.

    Attributes:
        kept: Ascending channel indices by site; all channels of sites that are missing.
    """

    kept: Mapping[str, tuple[int, ...]]

    def write(self, folder: Path) -> None:
        """Write plan.json."""
        write_text(folder / PLAN, json.dumps({"kept": self.kept}) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "SurgeryPlan":
        """Read plan.json."""
        return cls({site: tuple(channels) for site, channels in read_json(folder / PLAN)["kept"].items()})

    def after(self, earlier: "SurgeryPlan") -> "SurgeryPlan":
        """Return the plan that does the same as `earlier` followed by this plan."""
        kept = dict(earlier.kept)
        for site, channels in self.kept.items():
            kept[site] = tuple(earlier.kept[site][index] for index in channels) if site in earlier.kept else channels
        return SurgeryPlan(kept)


@dataclass(frozen=True)
class SurgeryResult:
    """The result of surgery.

    Attributes:
        net: The narrow network, without indicators and classifier, float32, in evaluation mode.
        plan: The channels kept, as indices into the network before surgery.
        max_abs_diff: Largest absolute difference of an embedding component before and after, in float64.
    """

    net: RetrievalNet
    plan: SurgeryPlan
    max_abs_diff: float


def run_surgery(net: RetrievalNet, full: ArchSpec, config: Surgery, probe: Tensor) -> SurgeryResult:
    """Cut the zero channels out of a student, and verify in float64 that the function stays the same.

    Args:
        net: Trained student in evaluation mode, on the CPU; not changed.
        full: Spec of the uncompressed network, that of the teacher.
        config: Section `surgery` of params.yaml.
        probe: Normalised images (B, 3, H, W) to compare embeddings on.

    Raises:
        SurgeryError: If a width is not allowed or the function changes.
    """
    plan = plan_cut(net, config.tolerance, config.channel_multiple, full)
    exact = convert(net, net.spec).double()
    narrow = fold_and_cut(exact, plan)
    difference = largest_difference(exact, narrow, probe.double())
    if not difference <= EXACT:
        raise SurgeryError(
            f"surgery changes embeddings by {difference:.3g}, more than {EXACT:g} in float64, because channels that "
            f"are not zero were cut; lower `surgery.tolerance` ({config.tolerance:g})"
        )
    bare = convert(narrow, narrow.spec.bare()).float()
    return SurgeryResult(bare, plan, difference)


def plan_cut(net: RetrievalNet, tolerance: float, multiple: int, full: ArchSpec) -> SurgeryPlan:
    """Plan to keep the channels with nonzero rows.

    Args:
        net: Network with indicators.
        tolerance: Largest row norm that counts as zero.
        multiple: Number that every reduced width must be a multiple of.
        full: Spec of the uncompressed network, because the student may have been cut during training.

    Raises:
        SurgeryError: If a width would be 0 in a block that is needed, or not a multiple.
    """
    removed = removed_sites(net, tolerance)
    kept = {site: tuple(channels.tolist()) for site, channels in nonzero_channels(net, tolerance).items()}
    for site, channels in kept.items():
        if not channels and site not in removed:
            raise SurgeryError(
                f"every channel of {site} is zero, but its block cannot be removed; lower `surgery.tolerance` or the "
                "budget"
            )
        if len(channels) % multiple and len(channels) != full.widths[site]:
            raise SurgeryError(
                f"{site} would keep {len(channels)} channels, not a multiple of `surgery.channel_multiple` {multiple}; "
                "train the student with that multiple"
            )
    return SurgeryPlan(kept)


def cut_spec(spec: ArchSpec, plan: SurgeryPlan) -> ArchSpec:
    """Return the spec of the network that `cut` makes."""
    widths = {**spec.widths, **{site: len(channels) for site, channels in plan.kept.items()}}
    indicators = tuple(site for site in spec.indicators if widths[site])
    counts = {
        site: sum(channel < count for channel in plan.kept[site]) if site in plan.kept else count
        for site, count in spec.instance_norms.items()
    }
    changes = {"widths": widths, "indicators": indicators, "instance_norms": counts}
    return ArchSpec.model_validate({**spec.model_dump(), **changes})


def slices(spec: ArchSpec, plan: SurgeryPlan) -> dict[str, list[tuple[int, Tensor]]]:
    """Return the indices to keep of each tensor, as pairs of a dimension and its indices, by tensor name.

    Tensors that are missing keep their shape. Compactors lose rows and columns.
    """
    kept = {site: torch.tensor(channels, dtype=torch.int64) for site, channels in plan.kept.items()}
    indices: dict[str, list[tuple[int, Tensor]]] = {}
    norms = {HEAD_NORM: kept[LAST]} if LAST in kept else {}
    for layer in spec.layers():
        outputs = [(0, kept[layer.target])] if layer.target in kept else []
        inputs = [(1, kept[layer.source])] if layer.source in kept else []
        indices[f"{layer.name}.weight"] = outputs + inputs
        if layer.target in kept:
            for norm, part in spec.norm_parts(layer).items():
                start, stop, _ = part.indices(spec.widths[layer.target])
                channels = kept[layer.target]
                norms[norm] = channels[(channels >= start) & (channels < stop)] - start
    for norm, channels in norms.items():
        for name in ("weight", "bias", "running_mean", "running_var"):
            indices[f"{norm}.{name}"] = [(0, channels)]
    for site in set(spec.projections) & set(kept):
        indices[f"projections.{site}.weight"] = [(1, kept[site])]
    for site in set(spec.indicators) & set(kept):
        rows, columns = (0, kept[site]), (1, kept[site])
        indices[f"{indicator_name(site)}.weight"] = [rows, columns] if spec.mixes(site) else [rows]
    return indices


def take(tensor: Tensor, indices: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Select indices along each of the dimensions."""
    for dimension, index in indices:
        tensor = tensor.index_select(dimension, index.to(tensor.device))
    return tensor


def cut(net: RetrievalNet, plan: SurgeryPlan) -> RetrievalNet:
    """Return a narrower network; it computes the same function if the channels cut away are always zero.

    The compactors at the inner sites of the plan must be folded already.
    """
    indices, before = slices(net.spec, plan), net.state_dict()
    state = {name: take(tensor, indices.get(name, ())) for name, tensor in before.items()}
    if LAST in plan.kept:
        cut_away = torch.ones(net.spec.widths[LAST], dtype=torch.bool)
        cut_away[list(plan.kept[LAST])] = False
        state["head.bn2.running_mean"] = before["head.bn2.running_mean"] - _head_constant(net.head, cut_away)
    narrow = cut_spec(net.spec, plan)
    built = set(RetrievalNet(narrow).state_dict())  # a norm that has lost all channels is gone
    return convert(net, narrow, {name: tensor for name, tensor in state.items() if name in built})


@torch.no_grad()
def _head_constant(head: EmbeddingHead, zero: Tensor) -> Tensor:
    """Return what always-zero channels add to the embedding before its last norm, (D,).

    The first norm of the head shifts them off zero, and their generalised mean is not exactly 0.

    Args:
        head: A head with a linear map.
        zero: (C,) bool, channels of the last stream that are always zero.
    """
    linear, norm = head.get_submodule("fc"), head.bn1
    weight = linear.get_parameter("weight")
    constant = weight.new_zeros(1) if head.pool is None else head.pool(weight.new_zeros(1, 1, 1, 1))[0]
    if norm is not None:
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        constant = torch.relu(norm.bias - norm.weight * (mean - constant) / torch.sqrt(variance + EPS))
    return weight @ (constant * zero.to(weight))


def fold_and_cut(net: RetrievalNet, plan: SurgeryPlan) -> RetrievalNet:
    """Fold the indicators at the sites of the plan, then cut."""
    return cut(fold(net, [site for site in net.spec.indicators if site in plan.kept]), plan)


@torch.no_grad()
def largest_difference(before: RetrievalNet, after: RetrievalNet, images: Tensor) -> float:
    """Return the largest absolute difference between the embeddings of two networks in evaluation mode.

    Both networks and the normalised images (B, 3, H, W) must have the same dtype.
    """
    return float((before(images).embedding - after(images).embedding).abs().max())
