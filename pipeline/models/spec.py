"""Architectures as data: a spec is stored as JSON, and the network is rebuilt from it.

A channel dimension of variable width is called a *site*. It has a name, and `ArchSpec.widths` holds its width:

- ``conv1``: the output of the stem in a network with bottlenecks; with basic blocks the stem writes to the residual
  stream ``layer1`` itself, because the first shortcut is the identity;
- ``layer1`` ... ``layer4``: the residual stream of a stage;
- ``layer3.5.conv1``, ``layer3.5.conv2``: the inner widths of a block, named after the convolution that has this output
  (a basic block has only ``conv1``). Both are 0 if the block is removed, which requires an identity shortcut.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config import Architecture, Teacher

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    14: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Blocks per stage by depth (He et al., CVPR 2016, table 1); 14 and 26 have 4 and 8 bottleneck blocks."""

BASIC = frozenset({18, 34})
"""Depths with basic blocks (two 3x3 convolutions); the others have bottlenecks (1x1, 3x3, 1x1)."""

EXPANSION = 4
"""Output channels of a bottleneck, as a multiple of its planes."""


INPUT, EMBEDDING = "input", "embedding"
"""Dimensions of fixed size: the three channels of an image, and the embedding."""

LAST = "layer4"
"""The residual stream that the head reads."""

HEAD_NORM = "head.bn1"
"""Batch norm in the head, on the residual stream of the last stage; no convolution precedes it."""

EXPONENT = "head.pool.p"
"""Exponent of a generalised mean."""

Head = Literal["bn-relu-fc-bn", "fc-bn", "fc-bn-relu", "bn", "none"]
"""What follows global pooling (fc: a linear map without bias): that of Xie et al. (CVPR 2023); fast-reid's with
`EMBEDDING_DIM`; torchreid's `resnet50_fc512`; the BNNeck of Luo et al. (CVPRW 2019); nothing, as in torchreid's
`resnet50`."""

INSTANCE, BATCH = "IN", "BN"
"""Names of the two norms of IBN-a, as in the authors' code."""

MaxPool = Literal["padded", "unpadded"]
"""Max pooling behind the stem, 3x3 with stride 2: padded by 1 as in torchvision; or without padding, with windows that
reach over the lower and right border, as in fast-reid."""

Pool = Literal["average", "gem"]
"""Global pooling: the mean, or the generalised mean with a learnable exponent (Radenovic et al., TPAMI 2019)."""


@dataclass(frozen=True)
class Layer:
    """A convolution, or the linear map to the embedding, and the batch norm that follows it.

    Attributes:
        name: Module name, such as ``layer3.5.conv2``.
        norm: Module name of the batch norm.
        source: Name of the input dimension.
        target: Name of the output dimension.
        kernel: Height and width of the square kernel.
    """

    name: str
    norm: str
    source: str
    target: str
    kernel: int
    stride: int


@dataclass(frozen=True)
class Block:
    """A residual block of a spec.

    Attributes:
        name: Module name, such as ``layer3.5``.
        stage: Name of the stage, such as ``layer3``; also the dimension that the block writes to.
        source: Dimension that the block reads: the stream of its stage, or of the stage before.
        sites: Inner sites, in the order of the convolutions.
        stride: Stride of the first 3x3 convolution and of the shortcut.
        shortcut: True if the shortcut is a convolution, False if it is the identity.
    """

    name: str
    stage: str
    source: str
    sites: tuple[str, ...]
    stride: int
    shortcut: bool


class Input(BaseModel):
    """The images that a network expects, relative to those that this project normalises with ImageNet's statistics.

    Attributes:
        scale: Factor on each channel, in the order red, green, blue.
        shift: Added to the product.
        bgr: Whether the channels then stand in the order blue, green, red.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]
    bgr: bool = False


class ArchSpec(BaseModel):
    """The architecture of a residual retrieval network.

    Attributes:
        depth: Key of `BLOCKS`.
        last_stride: Stride of the last stage.
        embedding_dim: Length of the embedding.
        identities: Classes of the identity classifier; 0 if there is no classifier.
        cosine: True if the classifier returns cosines, False if it returns inner products.
        indicators: Sites with a compactor or a channel gate.
        widths: Channels by site.
        instance_norms: How many of a site's channels, the first ones, have an instance norm instead of a batch norm, by
            inner site ("IBN-a", Pan et al., ECCV 2018).
        max_pool: Max pooling behind the stem.
        pool: Global pooling.
        head: What follows it.
        neck_bias: Whether the last batch norm of the head shifts.
        projections: Channels of the teacher's stages that features are projected to while the student is trained, by
            stage; for teachers of another architecture.
        input: Images that it expects; None for those of this project.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int
    last_stride: Literal[1, 2]
    embedding_dim: int
    identities: int
    cosine: bool
    indicators: tuple[str, ...]
    widths: dict[str, int]
    # Attributes with a default are left out of spec.json where they have it.
    instance_norms: dict[str, int] = Field(default_factory=dict)
    max_pool: MaxPool = "padded"
    pool: Pool = "average"
    head: Head = "bn-relu-fc-bn"
    neck_bias: bool = True
    projections: dict[str, int] = Field(default_factory=dict)
    input: Input | None = None

    @classmethod
    def full(
        cls,
        depth: int,
        width: int,
        embedding_dim: int,
        last_stride: Literal[1, 2] = 1,
        identities: int = 0,
        cosine: bool = False,
        stem: int = 0,
        ibn: bool = False,
        pool: Pool = "average",
        head: Head = "bn-relu-fc-bn",
        neck_bias: bool = True,
    ) -> Self:
        """Return the spec of an uncompressed network.

        Args:
            width: Planes of the first stage; 64 gives torchvision's networks.
            stem: Channels of the stem; 0 for as many as `width`. Basic blocks allow no other number.
            ibn: Whether half of the channels behind a block's first convolution have an instance norm, in all stages
                but the last.

        Raises:
            ValueError: If a network of basic blocks has another stem.
        """
        if depth in BASIC and stem not in (0, width):
            raise ValueError(
                f"the stem of a ResNet-{depth} has as many channels as its first stage, {width}, because the first "
                f"shortcut is the identity; got {stem}"
            )
        widths = {} if depth in BASIC else {"conv1": stem or width}
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
            instance_norms={site: widths[site] // 2 for site in widths if ibn and _has_instance_norm(site)},
            pool=pool,
            head=head,
            neck_bias=neck_bias,
        )

    @classmethod
    def of(cls, config: Teacher, identities: int = 0) -> Self:
        """Return the spec of the teacher that params.yaml describes."""
        return cls.full(
            config.depth,
            config.width,
            config.embedding_dim,
            config.last_stride,
            identities,
            cosine=config.recipe == "scratch",
            stem=config.stem,
        )

    @classmethod
    def of_student(cls, config: Architecture, embedding_dim: int, identities: int = 0, cosine: bool = False) -> Self:
        """Return the spec of an uncompressed student with an architecture of its own."""
        return cls.full(
            config.depth, config.width, embedding_dim, config.last_stride, identities, cosine, stem=config.stem
        )

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {self.depth}")
        expected = {*self.stream, *self.sites}
        if mismatched := expected ^ set(self.widths):
            raise ValueError(f"widths of depth {self.depth} are missing or unknown: {sorted(mismatched)}")
        removed = {site for block in self.removable if not any(self._inner_widths(block)) for site in block.sites}
        if invalid := {site: width for site, width in self.widths.items() if width < 1 and site not in removed}:
            raise ValueError(
                f"widths must be at least 1, or 0 throughout a block with an identity shortcut, got {invalid}"
            )
        if unknown := set(self.indicators) - (expected - removed):
            raise ValueError(f"indicators at unknown sites: {sorted(unknown)}")
        if invalid := {
            site: count
            for site, count in self.instance_norms.items()
            if site not in self.sites or not 0 <= count <= self.widths[site]
        }:
            raise ValueError(f"instance norms must be at inner sites, on some of their channels, got {invalid}")
        if not self.has_linear and self.embedding_dim != self.widths[LAST]:
            raise ValueError(
                f"without a linear map in the head, an embedding is as long as {LAST} is wide, {self.widths[LAST]}; "
                f"got {self.embedding_dim}"
            )
        return self

    @property
    def basic(self) -> bool:
        """Whether the network has basic blocks, not bottlenecks."""
        return self.depth in BASIC

    @property
    def has_linear(self) -> bool:
        """Whether the head has a linear map, so that the length of an embedding is not the width of the stream."""
        return "fc" in self.head

    @property
    def sites(self) -> tuple[str, ...]:
        """Inner sites of all blocks, from input to output."""
        return tuple(site for block in self.blocks() for site in block.sites)

    @property
    def stem(self) -> str:
        """Site of the stem's output."""
        return "layer1" if self.basic else "conv1"

    @property
    def stream(self) -> tuple[str, ...]:
        """Sites of the stem and of the residual streams, from input to output."""
        return tuple(dict.fromkeys([self.stem, *(block.stage for block in self.blocks())]))

    @property
    def removable(self) -> tuple[Block, ...]:
        """Blocks that may be removed because their shortcut is the identity."""
        return tuple(block for block in self.blocks() if not block.shortcut)

    def _inner_widths(self, block: Block) -> list[int]:
        return [self.widths[site] for site in block.sites]

    def has(self, block: Block) -> bool:
        """Return whether a block is present, not removed."""
        return all(self._inner_widths(block))

    def mixes(self, site: str) -> bool:
        """Return whether the indicator of a site is a compactor, which mixes channels; else it scales each channel.

        A residual stream has several inputs, and an instance norm has other statistics for each image, so a matrix
        behind either cannot be folded.
        """
        return is_inner(site) and site not in self.instance_norms

    def bare(self) -> Self:
        """Return the spec without what only training needs: indicators, projections and the classifier."""
        return self.model_copy(update={"indicators": (), "projections": {}, "identities": 0})

    def norm_parts(self, layer: Layer) -> dict[str, slice]:
        """Return the channels of each norm behind a layer, by module name: one norm, or instance and batch norm."""
        if layer.target not in self.instance_norms:
            return {layer.norm: slice(None)}
        count, width = self.instance_norms[layer.target], self.widths[layer.target]
        parts = {f"{layer.norm}.{INSTANCE}": slice(0, count), f"{layer.norm}.{BATCH}": slice(count, width)}
        return {name: part for name, part in parts.items() if part.start < part.stop}

    def narrowed(self, widths: Mapping[str, int]) -> Self:
        """Return the spec with other widths, of which instance norms have the same shares."""
        all_widths = {**self.widths, **widths}
        counts = {
            site: count * all_widths[site] // max(1, self.widths[site]) for site, count in self.instance_norms.items()
        }
        return self.model_copy(update={"widths": all_widths, "instance_norms": counts})

    def layers(self) -> Iterator[Layer]:
        """Yield convolutions and the head's linear map, from input to output, without those of removed blocks."""
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
        if self.has_linear:
            yield Layer("head.fc", "head.bn2", LAST, EMBEDDING, 1, 1)

    def blocks(self) -> Iterator[Block]:
        """Yield the residual blocks, including removed ones, from input to output."""
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
                    # as in torchvision: with basic blocks, the very first block has the right width and stride already
                    shortcut=first and not (self.basic and index == 0),
                )
                source = stage


def _has_instance_norm(site: str) -> bool:
    return site.endswith(".conv1") and not site.startswith(LAST)


def is_inner(site: str) -> bool:
    """Return whether a site is an inner width of a block, not the stem or a residual stream."""
    return "." in site


def indicator_name(site: str) -> str:
    """Return the module name of the indicator of a site.

    ``layer1.0.conv2`` -> ``layer1.0.compactor2`` (a 1x1 convolution), ``layer1`` -> ``gates.layer1`` (a vector).
    """
    return site.replace(".conv", ".compactor") if is_inner(site) else f"gates.{site}"
