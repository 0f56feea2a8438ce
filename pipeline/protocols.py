"""Evaluation protocols by name; figures such as mAP are comparable only under the same protocol.

`pipeline.retrieval` scores by a protocol, `pipeline.data` splits by it, and `data.protocol` selects it.
"""

from dataclasses import dataclass
from typing import Literal

JUNK = "-1"
"""Identity of images that are ignored for every query (Market-1501); "0" is a distractor, which counts as negative."""


@dataclass(frozen=True)
class Protocol:
    """The gallery of each query, the images that are ignored, and the figures that are reported.

    Attributes:
        name: Value of `data.protocol`.
        summary: One line for tables and reports.
        cameras: Whether junk (identity -1) and images with the query's identity and camera are ignored.
        gallery: `given`: the test set has a gallery; `itself`: the gallery of a query is all other queries; `drawn`:
            one random image of each identity, ten times.
        trapezoid: Whether AP is the trapezoidal area under the precision-recall curve.
        ranks: The k of the reported rank-k or recall@k.
        recall: Whether the figures are reported as recall@k, not rank-k.
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
        """Whether every test image is a query, so that the test set has no gallery split."""
        return self.gallery != "given"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("market", "ignores junk (-1) and images with the query's identity and camera", cameras=True),
        Protocol(
            "market-trapezoid", "as market, AP by trapezoids (Market-1501's script)", cameras=True, trapezoid=True
        ),
        Protocol("query-gallery", "all gallery images count", ranks=(1, 10, 20, 30), recall=True),
        Protocol(
            "loo", "every image against all others", gallery="itself", ranks=(1, 2, 4, 8, 10, 100, 1000), recall=True
        ),
        Protocol("vehicleid", "ten random galleries with one image per identity", gallery="drawn"),
    )
}
"""Protocols by name.

Sources: market, Zheng et al., ICCV 2015; query-gallery, Liu et al., CVPR 2016 (In-Shop); loo, Oh Song et al., CVPR
2016; vehicleid, Liu et al., CVPR 2016 (Deep Relative Distance Learning).
"""

SEEN = "identities seen in training"


def conditions(protocol: str, seen: int, tested: int) -> str:
    """Return the protocol of a figure as it is shown, with a note if identities of the test set were trained on.

    Args:
        seen: Identities of the test set that are in the training set too.
        tested: Identities of the test set.
    """
    note = seen_note(seen, tested)
    return f"{protocol}, {note}" if note else protocol


def seen_note(seen: int, tested: int) -> str:
    """Return how many identities of the test set were trained on; empty if none was."""
    return "" if not seen else SEEN if seen == tested else f"{seen} of {tested} {SEEN}"
