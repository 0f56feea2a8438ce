"""Read the images of `data.source`, whatever its layout."""

import logging
from collections import Counter
from pathlib import Path

from pipeline.config import Data
from pipeline.data import custom, published  # noqa: F401 - importing them registers their layouts
from pipeline.data.layout import LAYOUTS, Listing

__all__ = ["LAYOUTS", "read_source"]

log = logging.getLogger(__name__)


def read_source(data: Data, root: Path) -> Listing:
    """List the images of a data set, and warn if their counts differ from the published ones.

    Raises:
        FileNotFoundError: If a list or a folder is missing.
        DataError: If a list or a file name does not have the layout's form.
    """
    layout = LAYOUTS[data.source]
    images = layout.read(root, data)
    listing = images if isinstance(images, Listing) else Listing(list(images), [])
    counts = Counter(item.split for item in listing.items)
    for split, published_count in layout.published(data).items():
        if counts[split] != published_count:
            form = "%s: split %s has %d images, the published data set has %d"
            log.warning(form, data.source, split, counts[split], published_count)
    return listing
