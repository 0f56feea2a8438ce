"""Whether queries of one network may be asked of a gallery that another has embedded."""

from dataclasses import dataclass

from pipeline.retrieval import scoring
from pipeline.retrieval.scoring import Side


@dataclass(frozen=True)
class Compatibility:
    """mAP of queries and gallery by an old network and a new one, under one protocol.

    Source: Shen et al., Towards Backward-Compatible Representation Learning, CVPR 2020.

    Attributes:
        old: Both by the old network: what there is.
        new: Both by the new one: what embedding the gallery anew would give.
        mixed: Queries by the new network, gallery by the old; None where their embeddings differ in length.
    """

    old: float
    new: float
    mixed: float | None

    @property
    def compatible(self) -> bool:
        """Whether the old gallery serves new queries at least as well as it served old ones."""
        return self.mixed is not None and self.mixed >= self.old

    @property
    def verdict(self) -> str:
        """In words."""
        if self.mixed is None:
            return "embeddings of different lengths: embed the gallery anew"
        if self.compatible:
            return f"the gallery may stay: new queries find {self.mixed:.4f} in it, old ones {self.old:.4f}"
        return f"embed the gallery anew: new queries find {self.mixed:.4f} in the old one, old queries {self.old:.4f}"


def compare(protocol: str, old: tuple[Side, Side | None], new: tuple[Side, Side | None]) -> Compatibility:
    """Score two networks, and one's queries in the other's gallery.

    Args:
        protocol: Name in `PROTOCOLS`.
        old: Queries and gallery by the old network; no gallery where the protocol has none of its own.
        new: The same images by the new one.
    """

    def score(query: Side, gallery: Side | None) -> float:
        return scoring.evaluate(protocol, query, gallery).map

    alike = old[0].vectors.shape[1] == new[0].vectors.shape[1]
    mixed = score(new[0], old[1] if old[1] is not None else old[0]) if alike else None
    return Compatibility(score(*old), score(*new), mixed)
