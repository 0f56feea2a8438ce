"""The manifest: a table with path, identity, camera and split of every image.

Later stages rely on it without further checks, so it is validated completely, both when it is made and when it is
read. Identities and cameras are text: "007" is not 7.
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
"""Path of an image, and a warning about it."""

Indices = npt.NDArray[np.int64]
Names = npt.NDArray[np.str_]


class DataError(ValueError):
    """The data cannot be used."""

    exit_code = 3


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        path: Relative to the root of the data, with forward slashes.
        split: One of `SPLITS`.
    """

    path: str
    identity: str
    camera: str
    split: str


class Manifest:
    """A validated table of images, which are addressed by their index in `items`.

    Attributes:
        root: Folder that the paths of the items are relative to.

    Raises:
        DataError: Listing everything that is wrong with the items.
    """

    def __init__(self, items: Iterable[Item], root: Path) -> None:
        self.items = tuple(items)
        self.root = root
        if problems := list(_problems(self.items)):
            raise DataError("the manifest cannot be used: " + "; ".join(problems))
        self._identities = np.array([item.identity for item in self.items])
        self._cameras = np.array([item.camera for item in self.items])
        self._splits = np.array([item.split for item in self.items])

    @classmethod
    def read(cls, path: Path, root: Path) -> "Manifest":
        """Read a manifest that `write` wrote.

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
        """Return the indices (n,) int64 of all images in these splits, ascending.

        Raises:
            KeyError: If there is no such split.
        """
        for split in splits:
            if split not in SPLITS:
                raise KeyError(f"there is no split {split!r}; it must be one of {', '.join(SPLITS)}")
        return np.flatnonzero(np.isin(self._splits, splits))

    def identities(self, indices: Indices) -> Names:
        """Return the identities (n,) of images."""
        return self._identities[indices]

    def cameras(self, indices: Indices) -> Names:
        """Return the cameras (n,) of images."""
        return self._cameras[indices]

    @cached_property
    def train_identities(self) -> tuple[str, ...]:
        """Identities of split `train`, sorted; their positions are the class numbers of the classifier."""
        return tuple(sorted({item.identity for item in self.items if item.split == "train"}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the CSV text."""
        return hashlib.sha256(self._csv.encode()).hexdigest()

    @cached_property
    def _csv(self) -> str:
        return csv_text(COLUMNS, map(astuple, self.items))


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """Join the first few of many names, and count the others, for a one-line message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _problems(items: tuple[Item, ...]) -> Iterator[str]:
    unknown = sorted({item.split for item in items} - set(SPLITS))
    if unknown:
        yield f"unknown splits {first_few(unknown)}; a split is one of {', '.join(SPLITS)}"
    incomplete = [item.path for item in items if not (item.path and item.identity and item.camera)]
    if incomplete:
        yield f"path, identity or camera is empty in {first_few(map(repr, incomplete))}"
    returns = [item.path for item in items if "\r" in item.path + item.identity + item.camera]
    if returns:
        yield f"carriage returns, which do not survive a CSV file, in {first_few(map(repr, returns))}"
    outside = [item.path for item in items if item.path and not is_inside(item.path)]
    if outside:
        yield f"paths must be relative, with forward slashes and without `..`: {first_few(outside)}"
    twice = [path for path, count in Counter(item.path for item in items).items() if count > 1]
    if twice:
        yield f"listed more than once: {first_few(twice)}"
    spellings: dict[str, set[str]] = defaultdict(set)  # by Unicode normal form: macOS does not distinguish them
    for path in {item.path for item in items}:
        spellings[unicodedata.normalize("NFC", path)].add(path)
    for name in {name for item in items for name in (item.identity, item.camera)}:
        spellings[unicodedata.normalize("NFC", f"name {name}")].add(name)
    ambiguous = sorted(name for names in spellings.values() if len(names) > 1 for name in names)
    if ambiguous:
        yield (
            "names that differ only in their Unicode normal form, and are the same file on some systems: "
            f"{first_few(map(ascii, ambiguous))}; rename one"
        )

    identities: dict[str, set[str]] = {split: set() for split in SPLITS}
    for item in items:
        identities.get(item.split, set()).add(item.identity)
    empty = [split for split in ("train", "query") if not identities[split]]
    if empty:
        yield f"there are no images in {', '.join(empty)}; check the lists of the data set and quarantine.csv"
    if identities["validation-query"] and bool(identities["validation-gallery"]) != bool(identities["gallery"]):
        yield "validation must have a gallery if the test set has one, and none otherwise"
    validation = identities["validation-query"] | identities["validation-gallery"]
    tested = identities["query"] | identities["gallery"]
    for shared, where in (
        (identities["train"] & validation, "in training and in validation"),
        ((identities["train"] | validation) & tested, "in training and in test"),
    ):
        if shared - {JUNK}:
            yield f"identities {where}: {first_few(sorted(shared - {JUNK}))}; each must be in one of the two"


def is_inside(path: str) -> bool:
    """Return whether a path is relative, with forward slashes and without `..`."""
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and "\\" not in path
