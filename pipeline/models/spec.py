"""An architecture as data: what a network is, from which it can be rebuilt anywhere.

Every channel dimension that can change has a name, and `ArchSpec.widths` holds its size:

- ``conv1``: output of the stem,
- ``layer1`` ... ``layer4``: the residual stream of a stage,
- ``layer3.5.conv1``, ``layer3.5.conv2``: the inner widths of a block, named after the convolution whose output they
  are (a basic block has only ``conv1``).
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
        identities: Rows of the classifier, 0 for none.
        cosine: Whether the classifier compares directions (cosines) or takes inner products.
        compactors: Sites with a compactor.
        widths: Channels by dimension name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int
    last_stride: Literal[1, 2]
    embedding_dim: int
    identities: int
    cosine: bool
    compactors: tuple[str, ...]
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
            identities: Rows of the classifier, 0 for none.
            cosine: Kind of classifier.
        """
        widths = {"conv1": width}
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
            compactors=(),
            widths=widths,
        )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.depth not in BLOCKS:
            raise ValueError(f"depth {self.depth} is none of {sorted(BLOCKS)}")
        if bad := {name: width for name, width in self.widths.items() if width < 1}:
            raise ValueError(f"widths must be at least 1, got {bad}")
        wanted = {"conv1", *(block.stage for block in self.blocks()), *self.sites}
        if wrong := wanted ^ set(self.widths):
            raise ValueError(f"widths of depth {self.depth} are missing or unknown: {sorted(wrong)}")
        if unknown := set(self.compactors) - set(self.sites):
            raise ValueError(f"compactors at unknown sites: {sorted(unknown)}")
        return self

    @property
    def basic(self) -> bool:
        """Whether blocks are basic ones."""
        return self.depth in BASIC

    @property
    def sites(self) -> tuple[str, ...]:
        """Inner dimensions of all blocks."""
        return tuple(site for block in self.blocks() for site in block.sites)

    def blocks(self) -> Iterator[Block]:
        """The residual blocks, from input to output."""
        source = "conv1"
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


def compactor_of(site: str) -> str:
    """Module name of the compactor slot behind a site: ``layer1.0.conv2`` -> ``layer1.0.compactor2``."""
    return site.replace(".conv", ".compactor")


def norm_of(site: str) -> str:
    """Module name of the batch norm behind a site: ``layer1.0.conv2`` -> ``layer1.0.bn2``."""
    return site.replace(".conv", ".bn")


def consumer_of(site: str) -> str:
    """Module name of the convolution that reads a site: ``layer1.0.conv2`` -> ``layer1.0.conv3``."""
    block, _, convolution = site.rpartition(".conv")
    return f"{block}.conv{int(convolution) + 1}"
