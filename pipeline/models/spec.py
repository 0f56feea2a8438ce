"""An architecture as data: what a network is, from which it can be rebuilt anywhere.

Every channel dimension that can change has a name, and `ArchSpec.widths` holds its size:

- ``conv1``: output of the stem (of a bottleneck net; a basic net's stem feeds the stream of ``layer1`` itself, since
  its first shortcut is the identity),
- ``layer1`` ... ``layer4``: the residual stream of a stage,
- ``layer3.5.conv1``, ``layer3.5.conv2``: the inner widths of a block, named after the convolution whose output they
  are (a basic block has only ``conv1``). They are 0 where the block is gone, which its shortcut must allow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    14: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks in each stage by depth (He et al., CVPR 2016, table 1; 14 and 26 are bottleneck nets of 4 and 8 blocks)."""

BASIC = frozenset({18, 34})
"""Depths with basic blocks (two 3x3 convolutions); the others have bottlenecks (1x1, 3x3, 1x1)."""

EXPANSION = 4
"""Output channels of a bottleneck, as a multiple of its planes."""


INPUT, EMBEDDING = "input", "embedding"
"""Dimensions that never change: the image's three channels and the embedding."""

HEAD_NORM = "head.bn1"
"""Batch norm on the last stage's stream, with no convolution of its own."""


@dataclass(frozen=True)
class Layer:
    """A convolution, or the embedding's linear map, and the batch norm behind it.

    Attributes:
        name: Module name, such as ``layer3.5.conv2``.
        norm: Module name of the batch norm.
        source: Dimension of its input.
        target: Dimension of its output.
        kernel: Height and width of its kernel.
        stride: Its stride.
    """

    name: str
    norm: str
    source: str
    target: str
    kernel: int
    stride: int


@dataclass(frozen=True)
class Block:
    """One residual block of a spec.

    Attributes:
        name: Module name, such as ``layer3.5``.
        stage: Name of its stage, such as ``layer3``.
        source: Dimension of its input: the stage's, or the one before.
        sites: Dimensions of its inner widths, in the order of the convolutions.
        stride: Stride of the first 3x3 convolution and of the shortcut.
        shortcut: Whether the shortcut is a convolution (else the identity).
    """

    name: str
    stage: str
    source: str
    sites: tuple[str, ...]
    stride: int
    shortcut: bool


class ArchSpec(BaseModel):
    """A residual retrieval network.

    Attributes:
        depth: Key of `BLOCKS`.
        last_stride: Stride of the last stage.
        embedding_dim: Length of the embedding.
        identities: Indices of the classifier, 0 for none.
        cosine: Whether the classifier compares directions (cosines) or takes inner products.
        indicators: Sites with a compactor or gate.
        widths: Channels by dimension name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int
    last_stride: Literal[1, 2]
    embedding_dim: int
    identities: int
    cosine: bool
    indicators: tuple[str, ...]
    widths: dict[str, int]

    @classmethod
    def full(
        cls,
        depth: int,
        width: int,
        embedding_dim: int,
        last_stride: Literal[1, 2] = 1,
        identities: int = 0,
        cosine: bool = False,
    ) -> Self:
        """The uncompressed network.

        Args:
            depth: Key of `BLOCKS`.
            width: Channels of the stem and planes of the first stage (64 gives torchvision's network).
            embedding_dim: Length of the embedding.
            last_stride: Stride of the last stage.
            identities: Indices of the classifier, 0 for none.
            cosine: Kind of classifier.
        """
        widths = {} if depth in BASIC else {"conv1": width}
        for index, count in enumerate(BLOCKS[depth]):
            planes = width * 2**index
            widths[f"layer{index + 1}"] = planes * (1 if depth in BASIC else EXPANSION)
            for block in range(count):
                for site in ("conv1",) if depth in BASIC else ("conv1", "conv2"):
                    widths[f"layer{index + 1}.{block}.{site}"] = planes
        return cls(
            depth=depth,
            last_stride=last_stride,
            embedding_dim=embedding_dim,
            identities=identities,
            cosine=cosine,
            indicators=(),
            widths=widths,
        )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.depth not in BLOCKS:
            raise ValueError(f"depth {self.depth} is none of {sorted(BLOCKS)}")
        wanted = {*self.stream, *self.sites}
        if wrong := wanted ^ set(self.widths):
            raise ValueError(f"widths of depth {self.depth} are missing or unknown: {sorted(wrong)}")
        gone = {site for block in self.removable if not any(self._inner(block)) for site in block.sites}
        if bad := {name: width for name, width in self.widths.items() if width < 1 and name not in gone}:
            raise ValueError(
                f"widths must be at least 1, or 0 throughout a block whose shortcut is the identity, got {bad}"
            )
        if unknown := set(self.indicators) - (wanted - gone):
            raise ValueError(f"indicators at unknown sites: {sorted(unknown)}")
        return self

    @property
    def basic(self) -> bool:
        """Whether blocks are basic ones."""
        return self.depth in BASIC

    @property
    def sites(self) -> tuple[str, ...]:
        """Inner dimensions of all blocks."""
        return tuple(site for block in self.blocks() for site in block.sites)

    @property
    def stem(self) -> str:
        """Dimension of the stem's output."""
        return "layer1" if self.basic else "conv1"

    @property
    def stream(self) -> tuple[str, ...]:
        """Dimensions that shortcuts carry from block to block, from input to output."""
        return tuple(dict.fromkeys([self.stem, *(block.stage for block in self.blocks())]))

    @property
    def removable(self) -> tuple[Block, ...]:
        """Blocks that a network can do without: their shortcut is the identity."""
        return tuple(block for block in self.blocks() if not block.shortcut)

    def _inner(self, block: Block) -> list[int]:
        return [self.widths[site] for site in block.sites]

    def has(self, block: Block) -> bool:
        """Whether a block is still there."""
        return all(self._inner(block))

    def layers(self) -> Iterator[Layer]:
        """Everything that multiplies, from input to output; nothing of blocks that are gone."""
        yield Layer("conv1", "bn1", INPUT, self.stem, 7, 2)
        for block in filter(self.has, self.blocks()):
            chain, kernels = (block.source, *block.sites, block.stage), (3, 3) if self.basic else (1, 3, 1)
            for index, kernel in enumerate(kernels):
                stride = block.stride if index == kernels.index(3) else 1
                name, norm = f"{block.name}.conv{index + 1}", f"{block.name}.bn{index + 1}"
                yield Layer(name, norm, chain[index], chain[index + 1], kernel, stride)
            if block.shortcut:
                name, norm = f"{block.name}.downsample.0", f"{block.name}.downsample.1"
                yield Layer(name, norm, block.source, block.stage, 1, block.stride)
        yield Layer("head.fc", "head.bn2", "layer4", EMBEDDING, 1, 1)

    def blocks(self) -> Iterator[Block]:
        """The residual blocks, gone ones included, from input to output."""
        source = self.stem
        for index, count in enumerate(BLOCKS[self.depth]):
            stage = f"layer{index + 1}"
            stage_stride = (1, 2, 2, self.last_stride)[index]
            for number in range(count):
                name = f"{stage}.{number}"
                first = number == 0
                yield Block(
                    name=name,
                    stage=stage,
                    source=source,
                    sites=(f"{name}.conv1",) if self.basic else (f"{name}.conv1", f"{name}.conv2"),
                    stride=stage_stride if first else 1,
                    # torchvision gives the first block of a basic net's first stage no shortcut convolution
                    shortcut=first and not (self.basic and index == 0),
                )
                source = stage


def is_inner(site: str) -> bool:
    """Whether a dimension is an inner width of a block, not of the stream."""
    return "." in site


def indicator_of(site: str) -> str:
    """Module name of what marks a dimension's channels as dispensable.

    ``layer1.0.conv2`` -> ``layer1.0.compactor2`` (a 1x1 convolution), ``layer1`` -> ``gates.layer1`` (a vector).
    """
    return site.replace(".conv", ".compactor") if is_inner(site) else f"gates.{site}"
