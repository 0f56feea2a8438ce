"""Read the images of `data.source`, whatever its layout."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.config import Data
from pipeline.data import custom, published  # noqa: F401 - importing them registers their layouts
from pipeline.data.folders import LEFT_BEHIND, files_left_behind
from pipeline.data.layout import LAYOUTS, UNKNOWN, Listing
from pipeline.data.manifest import UNLABELLED, ImageWarning, Item, first_few
from pipeline.data.unlabelled import is_in, list_unlabelled, unlabelled_folders
from pipeline.labels import LOOK_ALIKE, clean_label, is_fraction, is_missing_value, look_alikes

__all__ = ["LAYOUTS", "read_source"]

log = logging.getLogger(__name__)


def read_source(data: Data, root: Path) -> Listing:
    """List the images of a data set with cleaned labels, and warn if their counts differ from the published ones.

    Unlabelled images come last, so that they change the index of no other image. An image that the data set lists
    itself, and that is in a folder of `data.unlabelled` too, is listed once, with its labels.

    Raises:
        FileNotFoundError: If a list or a folder is missing.
        DataError: If a list or a file name does not have the layout's form, or a folder of `data.unlabelled` cannot be
            used.
    """
    layout = LAYOUTS[data.source]
    images = layout.read(root, data)
    listing = images if isinstance(images, Listing) else Listing(list(images), [])
    counts = Counter(item.split for item in listing.items)
    for split, published_count in layout.published(data).items():
        if counts[split] != published_count:
            form = "%s: split %s has %d images, the published data set has %d"
            log.warning(form, data.source, split, counts[split], published_count)
    unlabelled = list_unlabelled(root, data, {item.path for item in listing.items})
    labelled = [item for item in listing.items if item.split != UNLABELLED]
    without_labels = [item for item in listing.items if item.split == UNLABELLED] + unlabelled.items
    warnings = [*listing.warnings, *unlabelled.warnings]
    if data.source != "folder":  # which has listed them
        walked = unlabelled_folders(root, data)
        warnings += [ImageWarning(path, LEFT_BEHIND) for path in files_left_behind(root) if not is_in(path, walked)]
    warnings += _label_warnings("identity", [(item.identity, item.name) for item in labelled])
    warnings += _label_warnings("camera", [(item.camera, item.name) for item in labelled])
    return Listing([*map(_with_clean_labels, labelled), *without_labels], warnings)


def _with_clean_labels(item: Item) -> Item:
    camera = clean_label(item.camera)
    unknown = is_missing_value(camera) or camera.casefold() == UNKNOWN
    return replace(item, identity=clean_label(item.identity), camera=UNKNOWN if unknown else camera)


def _label_warnings(kind: str, labels: list[tuple[str, str]]) -> Iterator[ImageWarning]:
    """Yield one warning for each label, or group of labels, that is changed or suspicious.

    Args:
        kind: `identity` or `camera`.
        labels: Label and name of each image; a warning names the first image.
    """
    first: dict[str, str] = {}
    cleaned: dict[str, str] = {}
    for label, name in labels:
        if label not in first:
            first[label] = name
            cleaned.setdefault(clean_label(label), name)
    for label, name in first.items():
        if label != (new := clean_label(label)):
            text = f"{kind} labels are trimmed or Unicode-normalised"
            yield ImageWarning(name, text, f"{label!a} is read as {new!r}")
    for group in look_alikes(cleaned):
        yield ImageWarning(cleaned[group[0]], f"{kind} labels {LOOK_ALIKE}", first_few(map(repr, group)))
    for label, name in cleaned.items():
        if is_fraction(label):
            text = f"{kind} labels end in .0, as pandas writes numbers; write whole numbers if that is not meant"
            yield ImageWarning(name, text, repr(label))
    unknown = " (the cameras are unknown then)" if kind == "camera" else ""
    for label, name in labels:
        if is_missing_value(clean_label(label)):
            yield ImageWarning(name, f"{kind} labels look like a missing value{unknown}", repr(label))
