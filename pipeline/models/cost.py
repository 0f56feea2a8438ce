"""What a network costs: parameters and multiply-accumulates, told from its spec alone.

A cost is a sum over layers, each a function of its two widths, so that the budget can ask what a narrower net would
cost without building it. Backbone and embedding head count, the classifier, compactors and gates do not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from pipeline.models.spec import EMBEDDING, INPUT, ArchSpec, Layer

ONE = "one"
"""A dimension of size 1, for costs that a single width decides."""


@dataclass(frozen=True)
class Term:
    """What a layer costs: `product * width[left] * width[right] + per_left * width[left] + ...`, if there is one.

    A layer without input or output channels is none, and costs nothing.

    Attributes:
        left: Dimension of its input.
        right: Dimension of its output.
        product: Per pair of channels.
        per_left: Per input channel.
        per_right: Per output channel.
        constant: Whatever its widths.
    """

    left: str
    right: str
    product: float
    per_left: float = 0
    per_right: float = 0
    constant: float = 0

    def __call__(self, sizes: Mapping[str, int]) -> float:
        """Cost at these sizes of all dimensions."""
        left, right = sizes[self.left], sizes[self.right]
        if not left or not right:
            return 0
        return self.product * left * right + self.per_left * left + self.per_right * right + self.constant

    def scaled(self, factor: float) -> "Term":
        """Return the term with every coefficient multiplied."""
        parts = ("product", "per_left", "per_right", "constant")
        return replace(self, **{part: factor * getattr(self, part) for part in parts})


@dataclass(frozen=True)
class CostModel:
    """A cost as a function of widths.

    Attributes:
        terms: What is summed.
        fixed: Sizes of the dimensions that never change.
        measured: Times a network with these widths, as a share of the uncompressed network's time; None where the
            terms are exact.
        correction: What the terms' savings were multiplied by.
    """

    terms: tuple[Term, ...]
    fixed: Mapping[str, int]
    measured: Callable[[Mapping[str, int]], float] | None = None
    correction: float = 1.0

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Cost of a network with these widths; a whole number where all terms' are."""
        sizes = {**self.fixed, **widths}
        return sum(term(sizes) for term in self.terms)

    def reduction(self, full: Mapping[str, int], widths: Mapping[str, int]) -> float:
        """Return the share of the full network's cost that a network with other widths saves."""
        return 1 - self(widths) / self(full)

    def corrected(self, full: Mapping[str, int], correction: float) -> "CostModel":
        """Return an uncorrected model with every saving multiplied, so that it agrees with a timed network.

        Args:
            full: Widths of the uncompressed network, whose cost stays.
            correction: Timed saving over predicted saving.
        """
        if correction == 1:
            return self
        terms = (
            *(term.scaled(correction) for term in self.terms),
            Term(ONE, ONE, 0, constant=(1 - correction) * self(full)),
        )
        return replace(self, terms=terms, correction=correction)


def fixed_sizes(spec: ArchSpec) -> dict[str, int]:
    """Sizes of the dimensions that never change."""
    return {INPUT: 3, EMBEDDING: spec.embedding_dim, ONE: 1}


def areas(spec: ArchSpec, size: tuple[int, int]) -> Iterator[tuple[Layer, tuple[int, int]]]:
    """Each layer and the height and width of its output, for images of `size` (height, width)."""
    found = {INPUT: size, EMBEDDING: (1, 1)}
    for layer in spec.layers():
        height, width = found[layer.source] if layer.target != EMBEDDING else found[EMBEDDING]
        if layer.stride == 2:
            height, width = (height + 1) // 2, (width + 1) // 2
        yield layer, (height, width)
        if layer.source == INPUT:  # maximum pooling follows the stem
            height, width = (height + 1) // 2, (width + 1) // 2
        found[layer.target] = (height, width)


def macs_model(spec: ArchSpec, size: tuple[int, int]) -> CostModel:
    """Multiply-accumulates for one image of `size` (height, width), as a function of widths."""
    terms = tuple(
        Term(layer.source, layer.target, layer.kernel**2 * height * width)
        for layer, (height, width) in areas(spec, size)
    )
    return CostModel(terms, fixed_sizes(spec))


def params_model(spec: ArchSpec) -> CostModel:
    """Learnable parameters as a function of widths: weights, and scale and shift of the batch norms."""
    terms = [Term(layer.source, layer.target, layer.kernel**2, per_right=2) for layer in spec.layers()]
    return CostModel((*terms, Term(ONE, "layer4", 2)), fixed_sizes(spec))  # last: the head's first norm


def macs(spec: ArchSpec, size: tuple[int, int]) -> int:
    """Multiply-accumulates for one image of `size` (height, width), compactors counted as folded."""
    return int(macs_model(spec, size)(spec.widths))


def params(spec: ArchSpec) -> int:
    """Learnable parameters of backbone and embedding head, compactors counted as folded."""
    return int(params_model(spec)(spec.widths))
