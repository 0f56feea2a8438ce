"""Where images come from: published layouts and data of one's own, by name."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.config import Data
from pipeline.data import layouts, own
from pipeline.data.manifest import Item
from pipeline.data.own import Remark

log = logging.getLogger(__name__)

PUBLISHED: Mapping[str, Mapping[str, int]] = {
    "veri776": {"train": 37_778, "query": 1_678, "gallery": 11_579},
    "market1501": {"train": 12_936, "query": 3_368, "gallery": 19_732},
    "msmt17": {"train": 32_621, "query": 11_659, "gallery": 82_161},
    "vehicleid-800": {"train": 113_346, "query": 6_493},
    "vehicleid-1600": {"train": 113_346, "query": 13_377},
    "vehicleid-2400": {"train": 113_346, "query": 19_777},
    "cub200": {"train": 5_864, "query": 5_924},
    "inshop": {"train": 25_882, "query": 14_218, "gallery": 12_612},
    "sop": {"train": 59_551, "query": 60_502},
}
"""Images in each split, as the data sets' authors tell them."""


@dataclass(frozen=True)
class Source:
    """What a source holds.

    Attributes:
        items: Its images; those of one's own may have no split yet.
        remarks: Files that were left out, and why.
    """

    items: list[Item]
    remarks: list[Remark]


def read_source(data: Data, root: Path) -> Source:
    """List the images of a data set.

    Raises:
        FileNotFoundError: If a list or a folder is missing.
        DataError: If a list or a name is not in the layout's form.
    """
    if data.source == "folder":
        return Source(*own.folder(root, data.own.pattern))
    if data.source == "csv":
        return Source(own.table(root, data.own.table), [])
    readers: dict[str, Callable[[Path], Iterator[Item]]] = {
        "vehicles": layouts.veri776,  # it is rendered in that layout
        "veri776": layouts.veri776,
        "market1501": layouts.market1501,
        "msmt17": layouts.msmt17,
        "vehicleid": partial(layouts.vehicleid, identities=data.vehicleid.test_identities),
        "cub200": layouts.cub200,
        "inshop": layouts.inshop,
        "sop": layouts.sop,
    }
    items = list(readers[data.source](root))
    name = f"vehicleid-{data.vehicleid.test_identities}" if data.source == "vehicleid" else data.source
    found = Counter(item.split for item in items)
    for split, count in PUBLISHED.get(name, {}).items():
        if found[split] != count:
            log.warning("%s: %d images in %s, published are %d", name, found[split], split, count)
    return Source(items, [])
