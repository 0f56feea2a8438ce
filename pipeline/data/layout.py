"""The registry of layouts: how raw data lie on disk, by the name that `data.source` has for it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Data
from pipeline.data.manifest import ImageWarning, Item

UNKNOWN = "unknown"
"""Camera of images whose camera is unknown."""


@dataclass(frozen=True)
class Listing:
    """The images of a data set.

    Attributes:
        items: In the order in which they are listed; custom data may have no split yet.
        warnings: Files that are left out, and why.
    """

    items: list[Item]
    warnings: list[ImageWarning]


Counts = Mapping[str, int]
"""Images by split."""
Reader = Callable[[Path, Data], Iterable[Item] | Listing]
"""From the root of the raw data and section `data` to its images."""


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        read: Lists the images.
        protocols: Protocols that can score the set; any where empty.
        published: The numbers of images that the set's authors state.
    """

    read: Reader
    protocols: tuple[str, ...]
    published: Callable[[Data], Counts]


LAYOUTS: dict[str, Layout] = {}
"""By value of `data.source`; `sources` fills it."""


def layout(
    name: str,
    protocols: tuple[str, ...] = (),
    published: Callable[[Data], Counts] = lambda data: {},
) -> Callable[[Reader], Reader]:
    """Register a function as the layout `name` of `data.source`.

    Args:
        name: Value of `data.source`.
        protocols: Protocols that can score the set; any where empty.
        published: The numbers of images that the set's authors state; other numbers are a warning.
    """

    def register(read: Reader) -> Reader:
        LAYOUTS[name] = Layout(read, protocols, published)
        return read

    return register
