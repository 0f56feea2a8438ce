"""Decide whether a gallery embedded by an old network can be kept for queries of a new network."""

from dataclasses import dataclass

from pipeline.retrieval import scoring
from pipeline.retrieval.scoring import Side


@dataclass(frozen=True)
class Compatibility:
    """mAP of an old and a new network, and of new queries in the old gallery, under one protocol.

    Source: Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020.

    Attributes:
        old: Queries and gallery by the old network.
        new: Queries and gallery by the new network.
        mixed: Queries by the new network, gallery by the old; None if their embedding dimensions differ.
    """

    old: float
    new: float
    mixed: float | None

    @property
    def compatible(self) -> bool:
        """Whether new queries reach at least the mAP of old queries in the old gallery."""
        return self.mixed is not None and self.mixed >= self.old

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if self.mixed is None:
            return "embeddings have different dimensions: embed the gallery again"
        advice = "the gallery can be kept" if self.compatible else "embed the gallery again"
        return f"{advice}: in the old gallery, new queries reach mAP {self.mixed:.4f}, old queries {self.old:.4f}"


def compare(protocol: str, old: tuple[Side, Side | None], new: tuple[Side, Side | None]) -> Compatibility:
    """Score two networks, and the new network's queries in the old network's gallery.

    Args:
        protocol: Name in `PROTOCOLS`.
        old: Queries and gallery by the old network; gallery None if the protocol takes none.
        new: The same images by the new network.
    """

    def score(query: Side, gallery: Side | None) -> float:
        return scoring.evaluate(protocol, query, gallery).map

    same_dimension = old[0].vectors.shape[1] == new[0].vectors.shape[1]
    mixed = score(new[0], old[1] if old[1] is not None else old[0]) if same_dimension else None
    return Compatibility(score(*old), score(*new), mixed)
