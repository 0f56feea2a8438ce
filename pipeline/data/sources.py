"""Read the images of `data.source`, whatever its layout."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.config import Data
from pipeline.data import custom, published  # noqa: F401 - importing them registers their layouts
from pipeline.data.folders import LEFT_BEHIND, files_left_behind
from pipeline.data.layout import LAYOUTS, Listing
from pipeline.data.manifest import ImageWarning, Item, first_few
from pipeline.labels import clean_label, is_fraction, is_missing_value, look_alikes

__all__ = ["LAYOUTS", "read_source"]

log = logging.getLogger(__name__)


def read_source(data: Data, root: Path) -> Listing:
    """List the images of a data set with cleaned labels, and warn if their counts differ from the published ones.

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
    warnings = list(listing.warnings)
    if data.source != "folder":  # which has listed them
        warnings += [ImageWarning(path, LEFT_BEHIND) for path in files_left_behind(root)]
    for kind, label in _LABELS.items():
        warnings += _label_warnings(kind, listing.items, label)
    items = [
        replace(item, identity=clean_label(item.identity), camera=clean_label(item.camera)) for item in listing.items
    ]
    return Listing(items, warnings)


_LABELS: dict[str, Callable[[Item], str]] = {"identity": lambda item: item.identity, "camera": lambda item: item.camera}


def _label_warnings(kind: str, items: list[Item], label: Callable[[Item], str]) -> Iterator[ImageWarning]:
    """Yield one warning for each label, or group of labels, that is changed or suspicious; it names the first image."""
    first: dict[str, str] = {}
    for item in items:
        first.setdefault(label(item), item.name)
    for written, name in first.items():
        if written != (cleaned := clean_label(written)):
            detail = f"{written!a} is read as {cleaned!r}"
            yield ImageWarning(name, f"{kind} labels are trimmed or Unicode-normalised", detail)
    cleaned_first = {clean_label(written): name for written, name in reversed(first.items())}
    for group in look_alikes(cleaned_first):
        detail = first_few(map(repr, group))
        yield ImageWarning(
            cleaned_first[group[0]], f"{kind} labels differ only by case, leading zeros or a trailing .0", detail
        )
    for cleaned, name in cleaned_first.items():
        if is_missing_value(cleaned):
            yield ImageWarning(name, f"{kind} labels look like a missing value", repr(cleaned))
        if is_fraction(cleaned):
            kind_of = f"{kind} labels end in .0, as pandas writes numbers; write whole numbers if that is not meant"
            yield ImageWarning(name, kind_of, repr(cleaned))
