"""What a network costs: parameters and multiply-accumulates, told from its spec alone.

Both are sums of products of widths, `coefficient * width[a] * width[b]`, so that the budget can ask what a narrower
net would cost without building it. Backbone and embedding head count, the classifier, compactors and gates do not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.models.spec import EMBEDDING, INPUT, ArchSpec, Layer

ONE = "one"
"""A dimension of size 1, for costs that a single width decides."""


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


def _positions(spec: ArchSpec, size: tuple[int, int]) -> Iterator[tuple[Layer, int]]:
    """Each layer and the number of positions it computes, for one image of `size` (height, width)."""
    areas = {INPUT: size, EMBEDDING: (1, 1)}
    for layer in spec.layers():
        height, width = areas[layer.source] if layer.target != EMBEDDING else areas[EMBEDDING]
        if layer.stride == 2:
            height, width = (height + 1) // 2, (width + 1) // 2
        yield layer, height * width
        if layer.source == INPUT:  # maximum pooling follows the stem
            height, width = (height + 1) // 2, (width + 1) // 2
        areas[layer.target] = (height, width)


def macs_model(spec: ArchSpec, size: tuple[int, int]) -> CostModel:
    """Multiply-accumulates for one image of `size` (height, width), as a function of widths."""
    terms = tuple(Term(layer.kernel**2 * count, layer.source, layer.target) for layer, count in _positions(spec, size))
    return CostModel(terms, {INPUT: 3, EMBEDDING: spec.embedding_dim})


def params_model(spec: ArchSpec) -> CostModel:
    """Learnable parameters as a function of widths: weights, and scale and shift of the batch norms."""
    weights = [Term(layer.kernel**2, layer.source, layer.target) for layer in spec.layers()]
    norms = [Term(2, ONE, layer.target) for layer in spec.layers()] + [Term(2, ONE, "layer4")]  # the head's first norm
    return CostModel(tuple(weights + norms), {INPUT: 3, EMBEDDING: spec.embedding_dim, ONE: 1})


def macs(spec: ArchSpec, size: tuple[int, int]) -> int:
    """Multiply-accumulates for one image of `size` (height, width), compactors counted as folded."""
    return macs_model(spec, size)(spec.widths)


def params(spec: ArchSpec) -> int:
    """Learnable parameters of backbone and embedding head, compactors counted as folded."""
    return params_model(spec)(spec.widths)
