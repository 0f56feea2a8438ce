"""Parameters and multiply-accumulates of a network, computed from its spec without building it.

The cost is a sum over layers, each a function of its input and output width, so the budget can compare widths quickly.
Backbone and embedding head count; the classifier and indicators do not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from pipeline.models.spec import EMBEDDING, INPUT, LAST, ArchSpec, Layer

ONE = "one"
"""A dimension of size 1, for costs that depend on one width or on none."""


@dataclass(frozen=True)
class Term:
    """The cost of a layer: `product * in * out + per_left * in + per_right * out + constant`.

    The cost is 0 if the layer has no input or no output channels, because its block is removed then.

    Attributes:
        left: Name of the input dimension.
        right: Name of the output dimension.
        product: Cost per pair of an input and an output channel.
        per_left: Cost per input channel.
        per_right: Cost per output channel.
        constant: Cost at any widths.
    """

    left: str
    right: str
    product: float
    per_left: float = 0
    per_right: float = 0
    constant: float = 0

    def __call__(self, sizes: Mapping[str, int]) -> float:
        """Return the cost at the given sizes of all dimensions."""
        left, right = sizes[self.left], sizes[self.right]
        if not left or not right:
            return 0
        return self.product * left * right + self.per_left * left + self.per_right * right + self.constant

    def scaled(self, factor: float) -> "Term":
        """Return the term with every coefficient multiplied by a factor."""
        parts = ("product", "per_left", "per_right", "constant")
        return replace(self, **{part: factor * getattr(self, part) for part in parts})


@dataclass(frozen=True)
class CostModel:
    """A cost as a function of widths.

    Attributes:
        fixed: Sizes of the dimensions that never change.
        measured: Measures the latency of a network with the given widths, as a fraction of the uncompressed network's
            latency; None if the terms are exact.
        correction: Factor that the savings of the terms were multiplied by.
    """

    terms: tuple[Term, ...]
    fixed: Mapping[str, int]
    measured: Callable[[Mapping[str, int]], float] | None = None
    correction: float = 1.0

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Return the cost of a network with these widths; an int if all coefficients are."""
        sizes = {**self.fixed, **widths}
        return sum(term(sizes) for term in self.terms)

    def reduction(self, full: Mapping[str, int], widths: Mapping[str, int]) -> float:
        """Return the fraction of the full network's cost that a network with other widths saves."""
        return 1 - self(widths) / self(full)

    def corrected(self, full: Mapping[str, int], correction: float) -> "CostModel":
        """Return an uncorrected model with every saving multiplied, so that it agrees with a timed network.

        Args:
            full: Widths of the uncompressed network; its cost does not change.
            correction: Measured saving divided by predicted saving.
        """
        if correction == 1:
            return self
        terms = (
            *(term.scaled(correction) for term in self.terms),
            Term(ONE, ONE, 0, constant=(1 - correction) * self(full)),
        )
        return replace(self, terms=terms, correction=correction)


def fixed_sizes(spec: ArchSpec) -> dict[str, int]:
    """Return the sizes of the dimensions that never change."""
    return {INPUT: 3, EMBEDDING: spec.embedding_dim, ONE: 1}


def output_sizes(spec: ArchSpec, size: tuple[int, int]) -> Iterator[tuple[Layer, tuple[int, int]]]:
    """Yield each layer with the height and width of its output, for images of `size` (height, width)."""
    sizes = {INPUT: size, EMBEDDING: (1, 1)}
    for layer in spec.layers():
        height, width = sizes[layer.source] if layer.target != EMBEDDING else sizes[EMBEDDING]
        if layer.stride == 2:
            height, width = (height + 1) // 2, (width + 1) // 2
        yield layer, (height, width)
        if layer.source == INPUT:  # max pooling follows the stem
            odd = 1 if spec.max_pool == "padded" else 0
            height, width = (height + odd) // 2, (width + odd) // 2
        sizes[layer.target] = (height, width)


def macs_model(spec: ArchSpec, size: tuple[int, int]) -> CostModel:
    """Return multiply-accumulates for one image of `size` (height, width) as a function of widths."""
    terms = tuple(
        Term(layer.source, layer.target, layer.kernel**2 * height * width)
        for layer, (height, width) in output_sizes(spec, size)
    )
    return CostModel(terms, fixed_sizes(spec))


def params_model(spec: ArchSpec) -> CostModel:
    """Return learnable parameters (weights, and scale and shift of batch norms) as a function of widths."""
    terms = [Term(layer.source, layer.target, layer.kernel**2, per_right=2) for layer in spec.layers()]
    if spec.head in ("bn-relu-fc-bn", "bn"):  # a norm of the stream, without a layer in front of it
        terms.append(Term(ONE, LAST, 2))
    shifts = spec.embedding_dim if spec.head != "none" and not spec.neck_bias else 0
    exponents = 1 if spec.pool == "gem" else 0
    if exponents - shifts:
        terms.append(Term(ONE, ONE, 0, constant=exponents - shifts))
    return CostModel(tuple(terms), fixed_sizes(spec))


def macs(spec: ArchSpec, size: tuple[int, int]) -> int:
    """Return multiply-accumulates for one image of `size` (height, width), after folding of the compactors."""
    return int(macs_model(spec, size)(spec.widths))


def params(spec: ArchSpec) -> int:
    """Return the learnable parameters of backbone and embedding head, after folding of the compactors."""
    return int(params_model(spec)(spec.widths))
