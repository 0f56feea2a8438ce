"""Residual networks with torchvision's names, any widths, and a slot for a compactor behind each inner convolution.

The slot holds an `nn.Identity` in a plain network and a `Compactor` (a 1x1 convolution) while the network is
compressed; after folding it is an identity again and the block is narrower. torchvision's state dicts load without
renaming.

Source: He et al., CVPR 2016; slots for compactors: Ding et al., ICCV 2021.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from pipeline.models import cost
from pipeline.models.head import Classifier, EmbeddingHead
from pipeline.models.input import InputAdapter
from pipeline.models.spec import BATCH, BLOCKS, INSTANCE, ArchSpec, Block, indicator_name


class Output(NamedTuple):
    """The outputs of a network for a batch.

    Attributes:
        embedding: (B, D), not normalised.
        logits: (B, identities), or None if the network has no classifier.
    """

    embedding: Tensor
    logits: Tensor | None

    def first(self, count: int) -> "Output":
        """Return the outputs of the first images."""
        return Output(self.embedding[:count], None if self.logits is None else self.logits[:count])


class TeacherNet(nn.Module, ABC):
    """A network that a student can learn from."""

    def __call__(self, images: Tensor) -> Output:
        """Compute embeddings and logits of normalised images (B, 3, H, W)."""
        return cast(Output, super().__call__(images))

    @property
    @abstractmethod
    def embedding_dim(self) -> int:
        """Length of the embedding."""

    @abstractmethod
    def count_params(self) -> int:
        """Return the number of parameters, without the classifier."""

    @abstractmethod
    def count_macs(self, image_size: tuple[int, int]) -> int | None:
        """Return the multiply-accumulates for one image of this height and width; None if they cannot be counted."""


class Compactor(nn.Conv2d):
    """A 1x1 convolution initialised to the identity; a zero row marks an output channel that can be removed.

    Source: Ding et al., "ResRep", ICCV 2021.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=1, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.eye(channels)[:, :, None, None])

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix (C, C), row = output channel; a view."""
        return self.weight[:, :, 0, 0]


class _Scales(nn.Module):
    """A learnable scale of each channel, initially 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    @property
    def matrix(self) -> Tensor:
        """The scales as rows (C, 1); a view."""
        return self.weight[:, None]


class ChannelGate(_Scales):
    """A learnable scale of each channel of a residual stream, shared by all layers that write to it; initially 1.

    A scale of 0 makes the channel zero throughout the stage, because every layer that writes to the stream is scaled by
    it.
    """

    def forward(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        """Normalise and scale, (B, C, H, W) -> same; the gate multiplies the norm's scale and shift, not the map."""
        scaled = {name: norm.get_parameter(name) * self.weight for name in ("weight", "bias")}
        return cast(Tensor, functional_call(norm, scaled, (x,)))


class ChannelScale(_Scales):
    """A learnable scale of each channel, initially 1: takes the place of a compactor behind an instance norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale, (B, C, H, W) -> same."""
        return x * self.weight[:, None, None]


class IdentityGate(nn.Module):
    """Takes the place of a `ChannelGate` in a stream that has none: it only applies the norm."""

    def forward(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        """Normalise, (B, C, H, W) -> same."""
        return cast(Tensor, norm(x))


Indicator = Compactor | ChannelGate | ChannelScale
"""A "channel importance indicator" in the words of Xie et al. (CVPR 2023): a compactor, a channel gate or scale.

All have a ``weight`` (C, ...) and a ``matrix`` (C, n), a view; the norm of row c shows whether channel c is needed.
"""


class SplitNorm(nn.Module):
    """An instance norm of the first channels and a batch norm of the others ("IBN-a").

    Source: Pan et al., "Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net", ECCV 2018.
    """

    def __init__(self, channels: int, instance: int) -> None:
        super().__init__()
        self.sizes = [instance, channels - instance]
        norms = [nn.InstanceNorm2d(instance, affine=True), nn.BatchNorm2d(channels - instance)]
        for name, norm, size in zip((INSTANCE, BATCH), norms, self.sizes, strict=True):
            if size:  # pruning may have removed all channels of one of them
                self.add_module(name, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, (B, C, H, W) -> same."""
        parts = torch.split(x, [size for size in self.sizes if size], dim=1)
        return torch.cat([norm(part) for norm, part in zip(self.children(), parts, strict=True)], dim=1)


class ResidualBlock(nn.Module):
    """A basic block (3x3, 3x3) or a bottleneck (1x1, 3x3, 1x1)."""

    def __init__(self, block: Block, spec: ArchSpec) -> None:
        super().__init__()
        widths = (spec.widths[block.source], *(spec.widths[site] for site in block.sites), spec.widths[block.stage])
        kernels = (3, 3) if spec.basic else (1, 3, 1)
        strided = kernels.index(3)
        self.depth = len(kernels)
        for index, kernel in enumerate(kernels):
            stride = block.stride if index == strided else 1
            convolution = nn.Conv2d(
                widths[index], widths[index + 1], kernel, stride=stride, padding=kernel // 2, bias=False
            )
            self.add_module(f"conv{index + 1}", convolution)
            site = block.sites[index] if index < len(block.sites) else block.stage
            split = site in spec.instance_norms
            norm = (
                SplitNorm(widths[index + 1], spec.instance_norms[site]) if split else nn.BatchNorm2d(widths[index + 1])
            )
            self.add_module(f"bn{index + 1}", norm)
        for index, site in enumerate(block.sites):
            slot: nn.Module = nn.Identity()
            if site in spec.indicators:
                slot = Compactor(widths[index + 1]) if spec.mixes(site) else ChannelScale(widths[index + 1])
            self.add_module(f"compactor{index + 1}", slot)
        self.downsample: nn.Sequential | None = None
        if block.shortcut:
            self.downsample = nn.Sequential(
                nn.Conv2d(widths[0], widths[-1], kernel_size=1, stride=block.stride, bias=False),
                nn.BatchNorm2d(widths[-1]),
            )

    def forward(self, x: Tensor, gate: nn.Module) -> Tensor:
        """Transform a feature map, (B, C, H, W) -> (B, C', H', W'); `gate` belongs to the stage."""
        y = x
        for index in range(1, self.depth):
            y = self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(y))
            y = functional.relu(self.get_submodule(f"compactor{index}")(y), inplace=True)
        y = gate(self.get_submodule(f"bn{self.depth}"), self.get_submodule(f"conv{self.depth}")(y))
        if self.downsample is not None:
            x = gate(self.downsample[1], self.downsample[0](x))
        return functional.relu(y + x, inplace=True)


class RemovedBlock(nn.Module):
    """Takes the place of a removed block: only the identity shortcut is left."""

    def forward(self, x: Tensor, gate: nn.Module) -> Tensor:
        """Return the feature map; the ReLU would not change it, since it is non-negative already."""
        return x


class Stage(nn.ModuleList):
    """The residual blocks of a stage, which share a residual stream."""

    def forward(self, x: Tensor, gate: nn.Module) -> Tensor:
        """Transform a feature map, (B, C, H, W) -> (B, C', H', W')."""
        for block in self:
            x = block(x, gate)
        return x


class RetrievalNet(TeacherNet):
    """Backbone, embedding head and, if the spec has identities, an identity classifier."""

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        self.spec = spec
        self.adapter = None if spec.input is None else InputAdapter(spec.input)
        stem = spec.widths[spec.stem]
        self.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        padded = spec.max_pool == "padded"
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1 if padded else 0, ceil_mode=not padded)
        blocks = (ResidualBlock(block, spec) if spec.has(block) else RemovedBlock() for block in spec.blocks())
        for index, count in enumerate(BLOCKS[spec.depth]):
            stage = Stage(itertools.islice(blocks, count))
            self.add_module(f"layer{index + 1}", stage)
        present = set(spec.indicators)
        self.gates = nn.ModuleDict(
            {name: ChannelGate(spec.widths[name]) if name in present else IdentityGate() for name in spec.stream}
        )
        self.head = EmbeddingHead(spec)
        self.projections = nn.ModuleDict(
            {stage: nn.Linear(spec.widths[stage], channels, bias=False) for stage, channels in spec.projections.items()}
        )
        self.classifier = Classifier(spec.embedding_dim, spec.identities, spec.cosine) if spec.identities else None

    def forward(self, x: Tensor) -> Output:
        """Compute embeddings and logits of normalised images (B, 3, H, W)."""
        if self.adapter is not None:
            x = self.adapter(x)
        x = self.maxpool(functional.relu(self.gates[self.spec.stem](self.bn1, self.conv1(x)), inplace=True))
        for index in range(len(BLOCKS[self.spec.depth])):
            name = f"layer{index + 1}"
            x = self.get_submodule(name)(x, self.gates[name])
        embedding = self.head(x)
        return Output(embedding, None if self.classifier is None else self.classifier(embedding))

    @property
    def embedding_dim(self) -> int:
        return self.spec.embedding_dim

    def count_params(self) -> int:
        return cost.params(self.spec)

    def count_macs(self, image_size: tuple[int, int]) -> int:
        return cost.macs(self.spec, image_size)

    def indicators(self) -> dict[str, Indicator]:
        """Return the indicators by site."""
        modules = {site: self.get_submodule(indicator_name(site)) for site in self.spec.indicators}
        return {site: module for site, module in modules.items() if isinstance(module, Indicator)}

    def load_backbone(self, state: Mapping[str, Tensor], origin: str) -> None:
        """Load a torchvision state dict into the backbone; all other parts keep their weights.

        Args:
            state: Tensors by torchvision name; ``fc.*`` is ignored.
            origin: The key of params.yaml that names the weights, for the error message.

        Raises:
            ValueError: If names or shapes differ from those of this network.
        """
        current = self.state_dict()
        # State dicts from before 2018 lack `num_batches_tracked`, and nothing here reads it.
        counts = "num_batches_tracked"
        expected = {
            name
            for name in current
            if not name.startswith(("head.", "classifier.", "projections.")) and not name.endswith(counts)
        }
        loaded = {n: tensor for n, tensor in state.items() if not n.startswith("fc.") and not n.endswith(counts)}
        missing, unknown = sorted(expected - set(loaded)), sorted(set(loaded) - expected)
        shapes = [
            f"{name} {tuple(loaded[name].shape)}, expected {tuple(current[name].shape)}"
            for name in sorted(expected & set(loaded))
            if loaded[name].shape != current[name].shape
        ]
        if missing or unknown or shapes:
            mismatches = [
                f"{len(names)} {kind} (first: {names[0]})"
                for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
                if names
            ]
            raise ValueError(
                f"the weights of {origin} do not fit a ResNet-{self.spec.depth} with a stem of "
                f"{self.spec.widths[self.spec.stem]} channels: {', '.join(mismatches)}; use weights of that "
                "network, or set its depth, width and stem to theirs"
            )
        self.load_state_dict(current | loaded, strict=True)


def convert(net: RetrievalNet, spec: ArchSpec, state: Mapping[str, Tensor] | None = None) -> RetrievalNet:
    """Return a network of another spec with the weights, dtype, device and mode of `net`.

    Args:
        net: Network to copy; not changed.
        spec: Spec to build; it may add or lack indicators (new ones are the identity) and the
            classifier.
        state: Weights to load instead of those of `net`.

    Raises:
        RuntimeError: If a shape does not fit.
        KeyError: If the weights lack a tensor that does not belong to an indicator.
    """
    reference = net.conv1.weight
    converted = RetrievalNet(spec).to(device=reference.device, dtype=reference.dtype)
    weights = net.state_dict() if state is None else state
    initial = converted.state_dict()
    indicators = tuple(f"{indicator_name(site)}." for site in spec.indicators)
    loaded = {
        name: initial[name] if name not in weights and name.startswith(indicators) else weights[name]
        for name in initial
    }
    converted.load_state_dict(loaded, strict=True)
    return converted.to(memory_format=torch.channels_last).train(net.training)
