"""Evaluation protocols by name: an mAP means nothing without the protocol that it was computed by.

`retrieval` computes them, `data` splits by them, and params.yaml chooses one.
"""

from dataclasses import dataclass
from typing import Literal

JUNK = "-1"
"""Identity of images that are neither right nor wrong for any query (Market-1501; "0" is a distractor)."""


@dataclass(frozen=True)
class Protocol:
    """What each query is compared with, and which images are left out.

    Attributes:
        name: Name in params.yaml and beside every figure.
        summary: One line for people.
        cameras: Whether images of the query's identity from its own camera are left out, and junk (identity -1).
        gallery: `given`: the test set has one; `itself`: the other queries; `drawn`: one image of each identity, at
            random, ten times.
        trapezoid: Whether AP is the area under the precision-recall curve by trapezoids.
        ranks: The k of rank-k or recall@k to report.
        recall: Whether the figure is called recall@k.
    """

    name: str
    summary: str
    cameras: bool = False
    gallery: Literal["given", "itself", "drawn"] = "given"
    trapezoid: bool = False
    ranks: tuple[int, ...] = (1, 5, 10)
    recall: bool = False

    @property
    def all_query(self) -> bool:
        """Whether every test image is a query, so that the test set has no gallery of its own."""
        return self.gallery != "given"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("market", "mean of precisions; same identity and camera left out, junk -1 too", cameras=True),
        Protocol(
            "market-trapezoid", "the same, area by trapezoids (Market-1501's script)", cameras=True, trapezoid=True
        ),
        Protocol("query-gallery", "everything counts", ranks=(1, 10, 20, 30), recall=True),
        Protocol(
            "loo", "every image against all others", gallery="itself", ranks=(1, 2, 4, 8, 10, 100, 1000), recall=True
        ),
        Protocol("vehicleid", "ten random galleries of one image an identity", gallery="drawn"),
    )
}
"""By name. Sources: market, Zheng et al., ICCV 2015; query-gallery, Liu et al., CVPR 2016 (In-Shop); loo, Oh Song et
al., CVPR 2016; vehicleid, Liu et al., CVPR 2016 (Deep Relative Distance Learning)."""
