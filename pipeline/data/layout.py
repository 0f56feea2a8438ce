"""The registry of data set layouts: one reader for each value of `data.source`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Data
from pipeline.data.manifest import UNLABELLED, ImageWarning, Item

UNKNOWN = "unknown"
"""Camera of images whose camera is unknown."""
UNASSIGNED = "unsplit"
"""Split of images that are not in a split yet."""
UNASSIGNED_TEST = "test"
"""Split of test images that are not divided into query and gallery yet."""
UNASSIGNED_VALIDATION = "validation"
"""Split of validation images that are not divided into query and gallery yet."""

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), UNASSIGNED_VALIDATION),
    **dict.fromkeys(("test", "testing"), UNASSIGNED_TEST),
    **dict.fromkeys((UNLABELLED, "unlabeled"), UNLABELLED),
    **{split: split for split in ("query", "gallery", "validation-query", "validation-gallery")},
}
"""Splits of custom data, by the words for them in lower case."""


@dataclass(frozen=True)
class Listing:
    """The images of a data set.

    Attributes:
        items: In the order in which they are listed; custom data may not be split yet.
        warnings: Skipped files and the reasons.
    """

    items: list[Item]
    warnings: list[ImageWarning]


Counts = Mapping[str, int]
"""Number of images by split."""
Reader = Callable[[Path, Data], Iterable[Item] | Listing]
"""Lists the images below the root folder of the raw data."""


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk.

    Attributes:
        protocols: Evaluation protocols that can score the data set; empty: all of them.
        published: Image counts stated by the authors of the data set.
    """

    read: Reader
    protocols: tuple[str, ...]
    published: Callable[[Data], Counts]


LAYOUTS: dict[str, Layout] = {}
"""Layouts by value of `data.source`; importing `pipeline.data.sources` fills it."""


def layout(
    name: str,
    protocols: tuple[str, ...] = (),
    published: Callable[[Data], Counts] = lambda data: {},
) -> Callable[[Reader], Reader]:
    """Register a function as the reader of `data.source: name`; the other arguments are those of `Layout`."""

    def register(read: Reader) -> Reader:
        if name in LAYOUTS:
            raise TypeError(f"the layout `{name}` of {read.__module__} has the name of another one; rename it")
        LAYOUTS[name] = Layout(read, protocols, published)
        return read

    return register
