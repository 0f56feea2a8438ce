"""What a network costs: parameters and multiply-accumulates, told from its spec alone.

Both are sums of products of widths, `coefficient * width[a] * width[b]`, so that the budget can ask what a narrower
net would cost without building it. Backbone and embedding head count, the classifier and compactors do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.models.spec import ArchSpec

INPUT, EMBEDDING, ONE = "input", "embedding", "one"
"""Dimensions that never change: the image's three channels, the embedding, and 1."""


@dataclass(frozen=True)
class Term:
    """`coefficient * width[left] * width[right]`."""

    coefficient: int
    left: str
    right: str


@dataclass(frozen=True)
class CostModel:
    """A cost as a function of widths.

    Attributes:
        terms: What is summed.
        fixed: Sizes of the dimensions that never change.
    """

    terms: tuple[Term, ...]
    fixed: Mapping[str, int]

    def __call__(self, widths: Mapping[str, int]) -> int:
        """Cost of a network with these widths."""
        sizes = {**self.fixed, **widths}
        return sum(term.coefficient * sizes[term.left] * sizes[term.right] for term in self.terms)


def _convolutions(spec: ArchSpec, size: tuple[int, int]) -> list[tuple[str, str, int, int]]:
    """Input dimension, output dimension, kernel area and output positions of every convolution and linear map."""

    def halved(area: tuple[int, int]) -> tuple[int, int]:
        return ((area[0] + 1) // 2, (area[1] + 1) // 2)

    area = halved(size)
    layers = [(INPUT, "conv1", 49, area[0] * area[1])]
    area = halved(area)
    for block in spec.blocks():
        chain = (block.source, *block.sites, block.stage)
        kernels = (9, 9) if spec.basic else (1, 9, 1)
        after = halved(area) if block.stride == 2 else area
        positions = [after[0] * after[1]] * len(kernels)
        if not spec.basic:
            positions[0] = area[0] * area[1]  # the 1x1 before the strided 3x3
        layers += [
            (chain[i], chain[i + 1], kernel, count)
            for i, (kernel, count) in enumerate(zip(kernels, positions, strict=True))
        ]
        if block.shortcut:
            layers.append((block.source, block.stage, 1, after[0] * after[1]))
        area = after
    layers.append(("layer4", EMBEDDING, 1, 1))
    return layers


def macs_model(spec: ArchSpec, size: tuple[int, int]) -> CostModel:
    """Multiply-accumulates for one image of `size` (height, width), as a function of widths."""
    terms = tuple(Term(kernel * count, left, right) for left, right, kernel, count in _convolutions(spec, size))
    return CostModel(terms, {INPUT: 3, EMBEDDING: spec.embedding_dim})


def params_model(spec: ArchSpec) -> CostModel:
    """Learnable parameters as a function of widths: weights, and scale and shift of the batch norms."""
    layers = _convolutions(spec, (1, 1))
    weights = [Term(kernel, left, right) for left, right, kernel, _ in layers]
    norms = [Term(2, ONE, right) for _, right, _, _ in layers] + [Term(2, ONE, "layer4")]  # the head's first norm
    return CostModel(tuple(weights + norms), {INPUT: 3, EMBEDDING: spec.embedding_dim, ONE: 1})


def macs(spec: ArchSpec, size: tuple[int, int]) -> int:
    """Multiply-accumulates for one image of `size` (height, width), compactors counted as folded."""
    return macs_model(spec, size)(spec.widths)


def params(spec: ArchSpec) -> int:
    """Learnable parameters of backbone and embedding head, compactors counted as folded."""
    return params_model(spec)(spec.widths)
