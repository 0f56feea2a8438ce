"""Residual networks with torchvision's names, any widths, and a slot for a compactor behind each inner convolution.

One block has three lives: plain (the slot is an identity), with compactors (a 1x1 convolution sits in the slot), and
folded (the slot is an identity again, the block is narrower). torchvision's state dicts load without renaming.

Source: He et al., CVPR 2016; slots for compactors: Ding et al., ICCV 2021.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from pipeline.models.head import Classifier, EmbeddingHead
from pipeline.models.spec import BLOCKS, ArchSpec, Block, indicator_of


class Output(NamedTuple):
    """What a network says about a batch.

    Attributes:
        embedding: (B, D), not normalised.
        logits: (B, identities), or None where the network has no classifier.
    """

    embedding: Tensor
    logits: Tensor | None


class Compactor(nn.Conv2d):
    """A 1x1 convolution that starts as the identity; a row that becomes zero marks a channel that can go.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=1, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.eye(channels)[:, :, None, None])

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix (C, C), row = output channel; a view."""
        return self.weight[:, :, 0, 0]


class ChannelGate(nn.Module):
    """A factor on each channel of a stage's stream, shared by all that write to it; it starts at 1.

    Where it is zero, the channel is zero throughout the stage, since the block's input is non-negative.

    Args:
        channels: Channels of the stream.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    @property
    def matrix(self) -> Tensor:
        """The factors as rows (C, 1); a view."""
        return self.weight[:, None]

    def forward(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        """Normalise and scale, (B, C, H, W) -> same; the norm's scale and shift take the factors, not the map."""
        scaled = {name: norm.get_parameter(name) * self.weight for name in ("weight", "bias")}
        return cast(Tensor, functional_call(norm, scaled, (x,)))


class Ungated(nn.Module):
    """In the place of a gate: every channel as the norm leaves it."""

    def forward(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        """Normalise, (B, C, H, W) -> same."""
        return cast(Tensor, norm(x))


Indicator = Compactor | ChannelGate
"""What tells by its rows which channels are needed: ``weight`` (C, ...) and ``matrix`` (C, n)."""


class ResidualBlock(nn.Module):
    """A basic block (3x3, 3x3) or a bottleneck (1x1, 3x3, 1x1).

    Args:
        block: Its place in the spec.
        spec: Whose widths it takes.
    """

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
            self.add_module(f"bn{index + 1}", nn.BatchNorm2d(widths[index + 1]))
        for index, site in enumerate(block.sites):
            present = site in spec.indicators
            self.add_module(f"compactor{index + 1}", Compactor(widths[index + 1]) if present else nn.Identity())
        self.downsample: nn.Sequential | None = None
        if block.shortcut:
            self.downsample = nn.Sequential(
                nn.Conv2d(widths[0], widths[-1], kernel_size=1, stride=block.stride, bias=False),
                nn.BatchNorm2d(widths[-1]),
            )

    def forward(self, x: Tensor, gate: nn.Module) -> Tensor:
        """Transform a feature map, (B, C, H, W) -> (B, C', H', W'); `gate` is the stage's."""
        y = x
        for index in range(1, self.depth):
            y = self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(y))
            y = functional.relu(self.get_submodule(f"compactor{index}")(y), inplace=True)
        y = gate(self.get_submodule(f"bn{self.depth}"), self.get_submodule(f"conv{self.depth}")(y))
        if self.downsample is not None:
            x = gate(self.downsample[1], self.downsample[0](x))
        return functional.relu(y + x, inplace=True)


class Gone(nn.Module):
    """What is left of a block that was removed: its shortcut, the identity."""

    def forward(self, x: Tensor, gate: nn.Module) -> Tensor:
        """Return the feature map, which is non-negative already."""
        return x


class Stage(nn.ModuleList):
    """Residual blocks that share a stream."""

    def forward(self, x: Tensor, gate: nn.Module) -> Tensor:
        """Transform a feature map, (B, C, H, W) -> (B, C', H', W')."""
        for block in self:
            x = block(x, gate)
        return x


class RetrievalNet(nn.Module):
    """Backbone, embedding head and, where the spec asks for it, an identity classifier.

    Args:
        spec: What to build.
    """

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        self.spec = spec
        stem = spec.widths[spec.stem]
        self.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        blocks = (ResidualBlock(block, spec) if spec.has(block) else Gone() for block in spec.blocks())
        for index, count in enumerate(BLOCKS[spec.depth]):
            stage = Stage(itertools.islice(blocks, count))
            self.add_module(f"layer{index + 1}", stage)
        present = set(spec.indicators)
        self.gates = nn.ModuleDict(
            {name: ChannelGate(spec.widths[name]) if name in present else Ungated() for name in spec.stream}
        )
        self.head = EmbeddingHead(spec.widths["layer4"], spec.embedding_dim)
        self.classifier = Classifier(spec.embedding_dim, spec.identities, spec.cosine) if spec.identities else None

    def forward(self, x: Tensor) -> Output:
        """Embed normalised images, (B, 3, H, W)."""
        x = self.maxpool(functional.relu(self.gates[self.spec.stem](self.bn1, self.conv1(x)), inplace=True))
        for index in range(len(BLOCKS[self.spec.depth])):
            name = f"layer{index + 1}"
            x = self.get_submodule(name)(x, self.gates[name])
        embedding = self.head(x)
        return Output(embedding, None if self.classifier is None else self.classifier(embedding))

    def indicators(self) -> dict[str, Indicator]:
        """Compactors and gates by site."""
        found = {site: self.get_submodule(indicator_of(site)) for site in self.spec.indicators}
        return {site: module for site, module in found.items() if isinstance(module, Compactor | ChannelGate)}

    def load_backbone(self, state: Mapping[str, Tensor], origin: str) -> None:
        """Load a torchvision state dict into everything but head and classifier.

        Args:
            state: Tensors by torchvision name; ``fc.*`` is ignored.
            origin: Where they come from, for the message.

        Raises:
            ValueError: If names or shapes differ from this network's.
        """
        own = self.state_dict()
        # Files of before 2018 do not count batches, and nothing here reads the count.
        counts = "num_batches_tracked"
        wanted = {name for name in own if not name.startswith(("head.", "classifier.")) and not name.endswith(counts)}
        given = {n: tensor for n, tensor in state.items() if not n.startswith("fc.") and not n.endswith(counts)}
        missing, unknown = sorted(wanted - set(given)), sorted(set(given) - wanted)
        shapes = [
            f"{name} {tuple(given[name].shape)}, wanted {tuple(own[name].shape)}"
            for name in sorted(wanted & set(given))
            if given[name].shape != own[name].shape
        ]
        if missing or unknown or shapes:
            faults = [
                f"{len(names)} {what} (first: {names[0]})"
                for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
                if names
            ]
            raise ValueError(
                f"the weights from {origin} are not those of a ResNet-{self.spec.depth} with a stem of "
                f"{self.spec.widths[self.spec.stem]} channels: {', '.join(faults)}; set `depth` and `width` to what "
                "the file holds"
            )
        self.load_state_dict(own | given, strict=True)


def convert(net: RetrievalNet, spec: ArchSpec, state: Mapping[str, Tensor] | None = None) -> RetrievalNet:
    """A network of another spec with the same weights, where they still fit.

    Args:
        net: Network whose weights, dtype, device and mode are taken over.
        spec: What to build; it may have other compactors (new ones start as the identity) or no classifier.
        state: Weights to load instead of the network's own.

    Raises:
        RuntimeError: If a shape does not fit.
        KeyError: If a weight is missing that is no compactor's.
    """
    reference = net.conv1.weight
    converted = RetrievalNet(spec).to(device=reference.device, dtype=reference.dtype)
    given = net.state_dict() if state is None else state
    own = converted.state_dict()
    slots = tuple(f"{indicator_of(site)}." for site in spec.indicators)
    loaded = {name: own[name] if name not in given and name.startswith(slots) else given[name] for name in own}
    converted.load_state_dict(loaded, strict=True)
    return converted.to(memory_format=torch.channels_last).train(net.training)
