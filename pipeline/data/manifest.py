"""The manifest: a table with path, identity, camera and split of every image.

Later stages rely on it without further checks, so it is validated completely, both when it is made and when it is
read. Identities and cameras are text: "007" is not 7.
"""

import csv
import hashlib
import io
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.files import csv_text, write_text
from pipeline.protocols import JUNK

TRAINING = ("train", "validation-query", "validation-gallery")
TEST = ("query", "gallery")
UNLABELLED = "unlabelled"
"""Split of images without labels, which only distillation uses, and their identity, which no other image has."""
SPLITS = (*TRAINING, *TEST, UNLABELLED)
COLUMNS = ("path", "identity", "camera", "split")
BOX = "box"
"""Fifth column, in manifests with parts of images: left, top, right and bottom, separated by spaces."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an upright image, pixels; right and bottom are outside."""


class ImageWarning(NamedTuple):
    """What is unusual about an image.

    Attributes:
        path: Of the image; for a part of it, its name.
        warning: Kind, the same text for all images that share it.
        detail: What differs between images of the same kind, or "".
    """

    path: str
    warning: str
    detail: str = ""


def by_kind(warnings: Iterable[ImageWarning]) -> Iterator[str]:
    """Yield one line for each kind of warning, with its count and an example; the most frequent kind comes first."""
    kinds: dict[str, list[ImageWarning]] = defaultdict(list)
    for warning in warnings:
        kinds[warning.warning].append(warning)
    for kind, same in sorted(kinds.items(), key=lambda pair: -len(pair[1])):
        example = f"{same[0].path} ({same[0].detail})" if same[0].detail else same[0].path
        yield f"{kind} ({len(same)}): {'such as ' if len(same) > 1 else ''}{example}"


Indices = npt.NDArray[np.int64]
Names = npt.NDArray[np.str_]


class DataError(ValueError):
    """The data cannot be used."""

    exit_code = 3


@dataclass(frozen=True)
class Item:
    """One image, or one part of an image.

    Attributes:
        path: Relative to the root of the data, with forward slashes.
        split: One of `SPLITS`.
        box: The part, or None for the whole image.
    """

    path: str
    identity: str
    camera: str
    split: str
    box: Box | None = None

    @property
    def name(self) -> str:
        """The path, followed by the box if there is one; names the image in messages, and is unique in a manifest."""
        return f"{self.path} [{box_text(self.box)}]" if self.box else self.path


class Manifest:
    """A validated table of images, which are addressed by their index in `items`.

    Args:
        closed_set: Whether identities of the test set may be in training too.

    Attributes:
        root: Folder that the paths of the items are relative to.

    Raises:
        DataError: Listing everything that is wrong with the items.
    """

    def __init__(self, items: Iterable[Item], root: Path, closed_set: bool = False) -> None:
        self.items = tuple(items)
        self.root = root
        problems = [*label_problems(self.items, closed_set), *_empty_splits(self.items), *_order_problems(self.items)]
        if problems:
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
        if tuple(header) not in (COLUMNS, (*COLUMNS, BOX)):
            raise DataError(f"{path}: the first line must be {','.join(COLUMNS)}, got {','.join(header)}")
        for number, line in enumerate(lines, start=2):
            if len(line) != len(header):
                raise DataError(f"{path}: row {number} has {len(line)} fields, not {len(header)}; run prepare again")
        try:
            items = [Item(line[0], line[1], line[2], line[3], _parse_box("".join(line[4:]))) for line in lines]
        except ValueError as error:
            raise DataError(f"{path}: a box must be four whole numbers ({error}); run prepare again") from error
        return cls(items, root, closed_set=True)  # `data.closed_set` decided when the manifest was made

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
    def test_identities(self) -> frozenset[str]:
        """Identities of the test set."""
        return frozenset(item.identity for item in self.items if item.split in TEST) - {JUNK}

    @cached_property
    def seen_identities(self) -> int:
        """Number of the test set's identities that are in the training set too; 0 unless `data.closed_set`."""
        return len(self.test_identities.intersection(self.train_identities))

    @cached_property
    def known_identities(self) -> frozenset[str]:
        """Identities of all images that have one."""
        return frozenset(item.identity for item in self.items if item.split != UNLABELLED)

    @cached_property
    def has_boxes(self) -> bool:
        """Whether some items are parts of images."""
        return any(item.box for item in self.items)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the CSV text."""
        return hashlib.sha256(self._csv.encode()).hexdigest()

    @cached_property
    def _csv(self) -> str:
        rows = ((item.path, item.identity, item.camera, item.split) for item in self.items)
        if not self.has_boxes:
            return csv_text(COLUMNS, rows)
        boxes = (box_text(item.box) for item in self.items)
        return csv_text((*COLUMNS, BOX), ((*row, box) for row, box in zip(rows, boxes, strict=True)))


def first_few(names: Iterable[str], limit: int = 3) -> str:
    """Join the first few of many names, and count the others, for a one-line message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def box_text(box: Box | None) -> str:
    """Join the sides of a box by spaces; empty for None."""
    return " ".join(map(str, box)) if box else ""


def _parse_box(text: str) -> Box | None:
    if not text:
        return None
    left, top, right, bottom = map(int, text.split(" "))
    return left, top, right, bottom


def label_problems(items: Sequence[Item], closed_set: bool) -> Iterator[str]:
    """Yield why paths, labels and splits contradict each other.

    Args:
        closed_set: Whether identities of the test set may be in training too.
    """
    unknown = sorted({item.split for item in items} - set(SPLITS))
    if unknown:
        yield f"unknown splits {first_few(unknown)}; a split is one of {', '.join(SPLITS)}"
    incomplete = [item.path for item in items if not (item.path and item.identity and item.camera)]
    if incomplete:
        yield f"path, identity or camera is empty in {first_few(map(repr, incomplete))}"
    confused = [item.path for item in items if (item.split == UNLABELLED) != (item.identity == UNLABELLED)]
    if confused:
        yield (
            f"identity `{UNLABELLED}` stands for images without labels, but not for {first_few(map(repr, confused))}; "
            "list their folder in `data.unlabelled`, or rename their identity"
        )
    returns = [item.path for item in items if "\r" in item.path + item.identity + item.camera]
    if returns:
        yield f"carriage returns, which do not survive a CSV file, in {first_few(map(repr, returns))}"
    outside = [item.path for item in items if item.path and not is_inside(item.path)]
    if outside:
        yield f"paths must be relative, with forward slashes and without `..`: {first_few(outside)}"
    twice = [name for name, count in Counter(item.name for item in items).items() if count > 1]
    if twice:
        yield f"listed more than once: {first_few(twice)}; delete the repeated rows or files"
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
    validation = identities["validation-query"] | identities["validation-gallery"]
    tested = identities["query"] | identities["gallery"]
    for shared, where in (
        (identities["train"] & validation, "in training and in validation"),
        ((identities["train"] | validation) & tested, "in training and in test"),
    ):
        if not closed_set and shared - {JUNK}:
            yield (
                f"identities {where}: {first_few(sorted(shared - {JUNK}))}; each must be in one of the two, unless "
                "`data.closed_set` is true"
            )


def _empty_splits(items: Sequence[Item]) -> Iterator[str]:
    splits = {item.split for item in items}
    empty = [split for split in ("train", "query") if split not in splits]
    if empty:
        yield f"there are no images in {', '.join(empty)}; check the lists of the data set and quarantine.csv"
    if "validation-query" in splits and ("validation-gallery" in splits) != ("gallery" in splits):
        yield "validation must have a gallery if the test set has one, and none otherwise"


def _order_problems(items: Sequence[Item]) -> Iterator[str]:
    """Yield a problem if an unlabelled image precedes others: their indices and augmentation would depend on it."""
    if any(before.split == UNLABELLED != after.split for before, after in pairwise(items)):
        yield f"images of split {UNLABELLED} must come last; run prepare again"


def is_inside(path: str) -> bool:
    """Return whether a path is relative, with forward slashes and without `..`."""
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and "\\" not in path
