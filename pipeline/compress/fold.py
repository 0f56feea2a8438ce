"""Folding: compactors are multiplied into the convolution and batch norm before them, gates and scales into norms.

In evaluation mode a compactor K computes K (s (W x - mu) + b) with s = gamma / sqrt(var + eps). With A = K diag(s) this
is A W x + c, c = K (b - s mu): a convolution W' = A W and a batch norm that adds c. The new batch norm may subtract any
mean and divide by any deviation as long as its scale and shift undo it, so it gets the statistics of W' x. The rows of
W' may have any length for the same reason, so they get the length of the rows of W. Every parameter stays close to its
old value, so the optimiser's state remains valid and training continues from there.

Source: Ding et al., "ResRep", ICCV 2021, section 3.3; keeping statistics and lengths is our addition.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeline.compress.compactor import expand_rows, row_norms
from pipeline.models.feature_hooks import FeatureHooks
from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.spec import Layer, indicator_name

EPS = 1e-5
"""Epsilon of torch's batch norms."""


def fold(net: RetrievalNet, sites: Iterable[str]) -> RetrievalNet:
    """Return a network without the indicators of some sites, the same function in evaluation mode.

    The mean of each new batch norm is exact; its variance is computed as if channels were uncorrelated, and
    `recalibrate_norms` measures it.

    Raises:
        KeyError: If a site has no indicator.
    """
    folding = tuple(sites)
    state = dict(net.state_dict())
    for site in folding:
        weight = state.pop(f"{indicator_name(site)}.weight")
        for layer in net.spec.layers():
            if layer.target != site:
                continue
            if net.spec.mixes(site):
                state |= _folded(state, layer, weight[:, :, 0, 0])
                continue
            for norm, part in net.spec.norm_parts(layer).items():
                state |= {f"{norm}.{name}": weight[part] * state[f"{norm}.{name}"] for name in ("weight", "bias")}
    left = tuple(site for site in net.spec.indicators if site not in folding)
    return convert(net, net.spec.model_copy(update={"indicators": left}), state)


def _folded(state: Mapping[str, Tensor], layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
    """Return convolution and batch norm of a layer with the matrix (C', C) of its compactor multiplied in."""
    norm = layer.norm
    mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
    scaled = matrix * (state[f"{norm}.weight"] / torch.sqrt(variance + EPS))
    before = state[f"{layer.name}.weight"]
    weight = torch.einsum("oi,ichw->ochw", scaled, before)
    shift = matrix @ state[f"{norm}.bias"] - scaled @ mean
    ratio = row_norms(weight) / row_norms(before)
    usable = torch.isfinite(ratio) & (ratio > 0)  # rows of zeros have no length to keep
    scale = torch.where(usable, torch.copysign(ratio, scaled.diagonal()), torch.ones_like(ratio))
    moved = scaled / scale[:, None]
    statistics = _norm(norm, moved @ mean, moved.square() @ variance, scale, shift)
    return {f"{layer.name}.weight": weight / expand_rows(scale, weight)} | statistics


def _norm(norm: str, mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Return a batch norm with these running statistics that multiplies by `scale` and adds `shift`."""
    return {
        f"{norm}.running_mean": mean,
        f"{norm}.running_var": variance,
        f"{norm}.weight": scale * torch.sqrt(variance + EPS),
        f"{norm}.bias": scale * mean + shift,
    }


@torch.no_grad()
def recalibrate_norms(net: RetrievalNet, sites: Iterable[str], images: Tensor) -> None:
    """Replace running statistics of batch norms by those of some images; scale and shift keep the function the same.

    Args:
        net: Network in evaluation mode, changed in place.
        sites: Inner sites without compactors and instance norms.
        images: Normalised images (B, 3, H, W).
    """
    norms = {layer.name: layer.norm for layer in net.spec.layers() if layer.target in set(sites)}
    with FeatureHooks(net, norms, lambda output: torch.stack(torch.var_mean(output, dim=(0, 2, 3)))) as hooks:
        net(images)
        statistics = hooks.read()
    state = net.state_dict()
    for name, norm in norms.items():
        scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + EPS)
        shift = state[f"{norm}.bias"] - scale * state[f"{norm}.running_mean"]
        variance, mean = statistics[name]
        for key, value in _norm(norm, mean, variance, scale, shift).items():
            state[key].copy_(value)
