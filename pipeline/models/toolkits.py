"""State dicts of other toolkits: their names translated into those of `RetrievalNet`, and the spec that fits them.

Known are the backbones of torchvision, torchreid, fast-reid and reid-strong-baseline, and their heads. Their names are
facts of the public code of KaiyangZhou/deep-person-reid, JDAI-CV/fast-reid and michuanhaohao/reid-strong-baseline.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import BASIC, BLOCKS, EXPONENT, INSTANCE, LAST, ArchSpec, Head, Input, MaxPool, Pool, is_inner

Triple = tuple[float, float, float]

FIRST_BLOCK = "layer1.0.conv1.weight"
"""A tensor of every ResNet; what stands in front of its name is the prefix of the backbone."""

COUNTS = ("num_batches_tracked", "n_averaged")
"""Steps of a batch norm, and models in an average: nothing here reads them, and files from before 2018 lack them."""

WRAPPERS = {"module", "_orig_mod"}
"""Parts of names that `DataParallel`, `AveragedModel` and `torch.compile` add."""

BACKBONE = re.compile(r"(conv1|bn1|layer[1-4]\.\d+)\.")

HEADS = (
    (r"heads\.pool_layer\.p", EXPONENT),  # fast-reid
    (r"heads\.(?:bottleneck\.\d|bnneck)\.(\w+)", r"head.bn2.\1"),
    (r"bottleneck\.(\w+)", r"head.bn2.\1"),  # reid-strong-baseline
    (r"fc\.0\.(\w+)", r"head.fc.\1"),  # torchreid
    (r"fc\.1\.(\w+)", r"head.bn2.\1"),
)
"""Names of a head's tensors there and here; a matrix is the linear map, whatever its name."""

CLASSIFIER = re.compile(r"((heads\.)?classifier|fc|heads)\.(weight|bias)")
"""Classifiers of the identities that a network was trained with."""

GEM = 3.0
"""Exponent of a generalised mean that is not trained, in fast-reid."""

PIXELS = ("pixel_mean", "pixel_std")
"""Normalisation of RGB pixels in [0, 255], in files of fast-reid."""


@dataclass(frozen=True)
class Translation:
    """A network from elsewhere.

    Attributes:
        spec: Its architecture, without a classifier.
        state: Tensors by the names of `RetrievalNet`.
        left_out: Names of tensors that are not used, such as those of the classifier.
    """

    spec: ArchSpec
    state: dict[str, Tensor]
    left_out: tuple[str, ...]


def translate(
    state: Mapping[str, Tensor],
    last_stride: Literal[1, 2],
    normalisation: tuple[Triple, Triple],
    max_pool: MaxPool | None = None,
    pool: Pool | None = None,
) -> Translation:
    """Translate a state dict.

    Args:
        state: Tensors by name.
        last_stride: Stride of the last stage, which no tensor shows.
        normalisation: This project's mean and standard deviation of RGB pixels in [0, 1].
        max_pool: How the max pooling treats the border; None for what the toolkit does.
        pool: How the features are pooled; None for a generalised mean if its exponent is a tensor, else the average. If
            it is not, the exponent of a generalised mean is 3.

    Raises:
        ValueError: If it is not the state dict of a ResNet, lacks tensors, or has layers that are not supported.
    """
    plain = {name: _without_wrappers(name) for name in state}
    if twice := [name for name, count in Counter(plain.values()).items() if count > 1]:
        raise ValueError(f"it has more than one tensor {twice[0]}, with and without the prefixes of wrappers")
    state = {plain[name]: tensor for name, tensor in state.items()}
    prefixes = [name.removesuffix(FIRST_BLOCK) for name in state if name.endswith(FIRST_BLOCK)]
    if not prefixes:
        raise ValueError(f"it is not a ResNet, because no tensor is named {FIRST_BLOCK}")
    prefix = min(prefixes, key=len)
    outer = prefix.removesuffix("backbone.").removesuffix("base.")
    inner = {name.removeprefix(outer): tensor for name, tensor in state.items() if name.startswith(outer)}
    unused = [name for name in state if not name.startswith(outer) and not name.endswith(COUNTS)]
    if others := [name for name in unused if not CLASSIFIER.fullmatch(name)]:
        raise ValueError(f"the names of the network begin with {outer}, but not {others[0]}")
    translated: dict[str, Tensor] = {}
    for name, tensor in inner.items():
        if ours := _our_name(name, prefix.removeprefix(outer), tensor):
            if ours in translated:
                raise ValueError(f"{name} is a second tensor of {ours}, so its head is not supported")
            translated[ours] = _plain(name, tensor)
        elif not name.endswith(COUNTS) and name not in PIXELS:
            unused.append(name)
    relu = "fc.1.weight" in inner
    if "head.fc.weight" in translated:
        translated["head.fc.weight"] = translated["head.fc.weight"].flatten(1)  # fast-reid's is a 1x1 convolution
    if "head.fc.bias" in translated and "head.bn2.running_mean" in translated:  # the norm subtracts it with its mean
        translated["head.bn2.running_mean"] = translated["head.bn2.running_mean"] - translated.pop("head.fc.bias")
    if "head.bn2.bias" in translated and not translated["head.bn2.bias"].any():  # was not trained
        del translated["head.bn2.bias"]
    if pool == "gem":
        translated.setdefault(EXPONENT, torch.tensor([GEM]))
    elif pool == "average" and EXPONENT in translated:
        raise ValueError("its pooling is a generalised mean, whose exponent is a tensor")
    pixels = [(_plain(name, inner[name]).flatten() / 255).tolist() for name in PIXELS if name in inner]
    fast_reid = any(name.startswith("heads.") for name in inner)
    spec = _spec(translated, last_stride).model_copy(
        update={
            "head": _head(translated, relu),
            "max_pool": max_pool or ("unpadded" if fast_reid else "padded"),
            "input": relative_input(normalisation, *pixels) if len(pixels) == len(PIXELS) else None,
        }
    )
    spec = ArchSpec.model_validate(spec.model_dump())
    unknown = [name for name in unused if not CLASSIFIER.fullmatch(name)]
    _check(translated, spec, unknown)
    return Translation(spec, translated, tuple(unused))


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _plain(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of float32, unless it is one of integers.

    Raises:
        ValueError: If it is sparse or quantised, or has values that are not finite.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{name} is a sparse or quantised tensor, or has no values")
    if not tensor.is_floating_point():
        return tensor
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has values that are not finite")
    if name.endswith("running_var") and (tensor < 0).any():
        raise ValueError(f"{name} has negative values")
    if name == PIXELS[1] and (tensor <= 0).any():
        raise ValueError(f"{name} has values that are not positive")
    return tensor.float()


def _our_name(name: str, backbone: str, tensor: Tensor) -> str | None:
    """Return the name that a tensor has here; None if it belongs neither to the backbone nor to a known head.

    Args:
        name: Its name in the network.
        backbone: Prefix of the backbone's names.
    """
    if name.endswith(COUNTS):
        return None
    if name.startswith(backbone) and BACKBONE.match(name.removeprefix(backbone)):
        return name.removeprefix(backbone)
    for pattern, replacement in HEADS:
        if match := re.fullmatch(pattern, name):
            return "head.fc.weight" if tensor.dim() > 1 else match.expand(replacement)
    return None


def _spec(state: Mapping[str, Tensor], last_stride: Literal[1, 2]) -> ArchSpec:
    """Return the spec of a translated backbone; its head is not that of the state dict yet."""
    bottlenecks = "layer1.0.conv3.weight" in state
    numbers = [
        [int(name.split(".")[1]) for name in state if name.startswith(f"layer{stage}.")] for stage in (1, 2, 3, 4)
    ]
    counts = tuple(1 + max(stage, default=-1) for stage in numbers)
    depths = [depth for depth, stages in BLOCKS.items() if stages == counts and (depth in BASIC) != bottlenecks]
    if not depths:
        kind = "bottlenecks" if bottlenecks else "basic blocks"
        raise ValueError(f"a ResNet with {', '.join(map(str, counts))} {kind} in its stages is not supported")
    sites = ArchSpec.full(depths[0], 8, 8).widths
    last = "conv3" if bottlenecks else "conv2"
    names = {site: site if is_inner(site) or site == "conv1" else f"{site}.0.{last}" for site in sites}
    if missing := [f"{name}.weight" for name in names.values() if f"{name}.weight" not in state]:
        raise ValueError(f"{missing[0]} is missing")
    widths = {site: len(state[f"{name}.weight"]) for site, name in names.items()}
    norms = {site: f"{site.replace('.conv', '.bn')}.{INSTANCE}.weight" for site in sites if is_inner(site)}
    linear = state.get("head.fc.weight")
    return ArchSpec(
        depth=depths[0],
        last_stride=last_stride,
        embedding_dim=widths[LAST] if linear is None else len(linear),
        identities=0,
        cosine=False,
        indicators=(),
        widths=widths,
        instance_norms={site: len(state[name]) for site, name in norms.items() if name in state},
        pool="gem" if EXPONENT in state else "average",
        neck_bias="head.bn2.bias" in state,
    )


def _head(state: Mapping[str, Tensor], relu: bool) -> Head:
    """Return what follows the pooling of a translated state dict."""
    linear, norm = "head.fc.weight" in state, "head.bn2.weight" in state
    if linear and not norm:
        raise ValueError("a linear map without a batch norm behind it is not supported")
    if linear:
        return "fc-bn-relu" if relu else "fc-bn"
    return "bn" if norm else "none"


def _check(state: Mapping[str, Tensor], spec: ArchSpec, unknown: Sequence[str]) -> None:
    """Check that names and shapes of a translated state dict are those of its spec.

    Raises:
        ValueError: If they are not.
    """
    with torch.device("meta"):
        expected = {name: t.shape for name, t in RetrievalNet(spec).state_dict().items() if not name.endswith(COUNTS)}
    if unknown := [*unknown, *sorted(set(state) - set(expected))]:
        raise ValueError(f"it has {len(unknown)} tensors of layers that are not supported, such as {unknown[0]}")
    if missing := sorted(set(expected) - set(state)):
        raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    for name, shape in expected.items():
        if len(shape) == 4 and state[name].shape[0] == shape[0] and state[name].shape[1] < shape[1]:
            raise ValueError(f"{name} is a grouped convolution, which is not supported")
        if state[name].shape != shape:
            raise ValueError(f"{name} has the shape {tuple(state[name].shape)}, not {tuple(shape)}")


def normalisation_of(ours: tuple[Triple, Triple], given: Input | None) -> tuple[Triple, Triple]:
    """Return mean and standard deviation, red first, that a network expects; the inverse of `relative_input`."""
    if given is None:
        return ours
    (mean, std), scale, shift = ours, given.scale, given.shift
    theirs = tuple(s / factor for s, factor in zip(std, scale, strict=True))
    means = tuple(m - offset * t for m, offset, t in zip(mean, shift, theirs, strict=True))
    return cast(tuple[Triple, Triple], (means, theirs))


def relative_input(
    normalisation: tuple[Triple, Triple], mean: Sequence[float], std: Sequence[float], *, bgr: bool = False
) -> Input | None:
    """Return how a network's images follow from this project's; None if they are the same.

    Args:
        normalisation: This project's mean and standard deviation of RGB pixels in [0, 1].
        mean: Those that the network expects to be subtracted, in the order red, green, blue.
        std: Those that it expects the difference to be divided by.
        bgr: Whether the network expects the order blue, green, red.
    """
    ours, theirs = (torch.tensor(pair, dtype=torch.float64) for pair in (normalisation, (mean, std)))
    scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
    if not bgr and torch.allclose(scale, torch.ones(3).double(), atol=1e-3) and shift.abs().max() < 1e-3:
        return None
    first, second = ((float(v[0]), float(v[1]), float(v[2])) for v in (scale, shift))
    return Input(scale=first, shift=second, bgr=bgr)
