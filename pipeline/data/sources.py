"""Read the images of `data.source`, whatever its layout."""

import logging
from collections import Counter
from pathlib import Path

from pipeline.config import Data
from pipeline.data import custom, published  # noqa: F401 - they register their layouts
from pipeline.data.layout import LAYOUTS, Listing

__all__ = ["LAYOUTS", "read_source"]

log = logging.getLogger(__name__)


def read_source(data: Data, root: Path) -> Listing:
    """List the images of a data set.

    Raises:
        FileNotFoundError: If a list or a folder is missing.
        DataError: If a list or a file name does not have the layout's form.
    """
    layout = LAYOUTS[data.source]
    read = layout.read(root, data)
    found = read if isinstance(read, Listing) else Listing(list(read), [])
    counts = Counter(item.split for item in found.items)
    for split, count in layout.published(data).items():
        if counts[split] != count:
            log.warning("%s: %d images in %s, published are %d", data.source, counts[split], split, count)
    return found
