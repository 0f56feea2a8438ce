"""The manifest: which image shows which identity, from which camera, in which split.

A CSV file (path, identity, camera, split) that later stages trust, so everything about it is checked here, both when
it is made and when it is read. Identities and cameras are text: "007" is not 7.
"""

import csv
import hashlib
import io
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from pipeline.files import csv_text, write_text
from pipeline.protocols import JUNK

TRAINING = ("train", "validation-query", "validation-gallery")
TEST = ("query", "gallery")
SPLITS = TRAINING + TEST
COLUMNS = ("path", "identity", "camera", "split")

ImageWarning = tuple[str, str]
"""Path and what is to be said about it."""

Indices = npt.NDArray[np.int64]
Names = npt.NDArray[np.str_]


class DataError(ValueError):
    """The data cannot be used as they are."""

    exit_code = 3


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        path: Relative to the root of the data, with forward slashes.
        identity: Who or what is seen.
        camera: What it is seen by.
        split: One of `SPLITS`.
    """

    path: str
    identity: str
    camera: str
    split: str


class Manifest:
    """A checked table of images; a row is an index into `items`.

    Attributes:
        items: The images.
        root: Folder that their paths are relative to.

    Raises:
        DataError: Naming everything that is wrong with the items.
    """

    def __init__(self, items: Iterable[Item], root: Path) -> None:
        self.items = tuple(items)
        self.root = root
        complaints = list(_complaints(self.items))
        if complaints:
            raise DataError("the manifest is not usable: " + "; ".join(complaints))
        self._identities = np.array([item.identity for item in self.items])
        self._cameras = np.array([item.camera for item in self.items])
        self._splits = np.array([item.split for item in self.items])

    @classmethod
    def read(cls, path: Path, root: Path) -> "Manifest":
        """Read what `write` wrote.

        Raises:
            FileNotFoundError: If stage `prepare` has not run.
            DataError: If the file is not a manifest.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is missing; run `dvc repro prepare` or `dvc pull` first") from error
        header, *lines = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
        if tuple(header) != COLUMNS:
            raise DataError(f"{path}: the first line must be {','.join(COLUMNS)}, got {','.join(header)}")
        for number, line in enumerate(lines, start=2):
            if len(line) != len(COLUMNS):
                raise DataError(f"{path}: row {number} has {len(line)} fields, not {len(COLUMNS)}; run prepare again")
        return cls((Item(*line) for line in lines), root)

    def write(self, path: Path) -> None:
        """Write the table, atomically."""
        write_text(path, self._csv)

    def __len__(self) -> int:
        return len(self.items)

    def indices(self, *splits: str) -> Indices:
        """Indices (n,) int64 of the splits, ascending.

        Raises:
            KeyError: If there is no such split.
        """
        for split in splits:
            if split not in SPLITS:
                raise KeyError(f"there is no split {split!r}; it is one of {', '.join(SPLITS)}")
        return np.flatnonzero(np.isin(self._splits, splits))

    def identities(self, rows: Indices) -> Names:
        """Identities (n,) str of the rows."""
        return self._identities[rows]

    def cameras(self, rows: Indices) -> Names:
        """Cameras (n,) str of the rows."""
        return self._cameras[rows]

    @cached_property
    def train_identities(self) -> tuple[str, ...]:
        """Sorted identities of split `train`; the place of one is its class number."""
        return tuple(sorted({item.identity for item in self.items if item.split == "train"}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the table."""
        return hashlib.sha256(self._csv.encode()).hexdigest()

    @cached_property
    def _csv(self) -> str:
        return csv_text(COLUMNS, map(astuple, self.items))


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few of many names, for a one-line message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _complaints(items: tuple[Item, ...]) -> Iterator[str]:
    unknown = sorted({item.split for item in items} - set(SPLITS))
    if unknown:
        yield f"unknown splits {some(unknown)}; they are {', '.join(SPLITS)}"
    nameless = [item.path for item in items if not (item.path and item.identity and item.camera)]
    if nameless:
        yield f"path, identity or camera is empty in {some(map(repr, nameless))}"
    returns = [item.path for item in items if "\r" in item.path + item.identity + item.camera]
    if returns:
        yield f"carriage returns, which do not survive a CSV file, in {some(map(repr, returns))}"
    outside = [item.path for item in items if item.path and not is_inside(item.path)]
    if outside:
        yield f"paths must be relative, with forward slashes and without `..`: {some(outside)}"
    twice = [path for path, count in Counter(item.path for item in items).items() if count > 1]
    if twice:
        yield f"listed more than once: {some(twice)}"
    written: dict[str, set[str]] = defaultdict(set)
    for path in {item.path for item in items}:
        written[unicodedata.normalize("NFC", path)].add(path)
    for name in {name for item in items for name in (item.identity, item.camera)}:
        written[unicodedata.normalize("NFC", f"name {name}")].add(name)
    twins = sorted(path for paths in written.values() if len(paths) > 1 for path in paths)
    if twins:
        yield f"names that differ in bytes only and are one file elsewhere: {some(map(ascii, twins))}; rename one"

    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for item in items:
        found.get(item.split, set()).add(item.identity)
    empty = [split for split in ("train", "query") if not found[split]]
    if empty:
        yield f"there are no images in {', '.join(empty)}; look at the source's lists and at quarantine.csv"
    if found["validation-query"] and bool(found["validation-gallery"]) != bool(found["gallery"]):
        yield "validation needs a query and a gallery where the test has both"
    validation = found["validation-query"] | found["validation-gallery"]
    tested = found["query"] | found["gallery"]
    for shared, where in (
        (found["train"] & validation, "in training and in validation"),
        ((found["train"] | validation) & tested, "in training and in test"),
    ):
        if shared - {JUNK}:
            yield f"identities {where}: {some(sorted(shared - {JUNK}))}; each must be in one of the two"


def is_inside(path: str) -> bool:
    """Check that a path is relative, with forward slashes and without `..`."""
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and "\\" not in path
