"""Read a data set as stage `prepare` does, but decode a sample of the images only."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from pipeline.config import Params
from pipeline.data import requirements
from pipeline.data.images import data_root
from pipeline.data.inspection import inspect
from pipeline.data.layout import UNKNOWN
from pipeline.data.manifest import SPLITS, UNLABELLED, ImageWarning, Item
from pipeline.data.sources import read_source
from pipeline.data.splits import split_test, split_validation
from pipeline.files import Files

SAMPLE, UNLABELLED_SAMPLE = 400, 100
"""Images to decode, with and without labels."""
CHUNK = 50
"""Images that are decoded before the next look at the clock."""
SECONDS = 15.0
"""Time after which no further images are decoded, so that large photographs do not take minutes."""

T = TypeVar("T")


@dataclass(frozen=True)
class Survey:
    """What a data set holds.

    Attributes:
        items: All listed images, with the splits that they get if all of them can be decoded.
        missing: Paths of listed files that do not exist.
        decoded: Images of the sample that can be decoded.
        unreadable: (path, reason) of the other ones.
        seconds: Time that stage `prepare` takes to inspect one image.
        warnings: Warnings of the listing, which is complete, and of the sample.
        problems: What keeps a stage from running.
        notes: What works and is probably not intended.
    """

    items: list[Item]
    missing: list[str]
    decoded: list[Item]
    unreadable: list[tuple[str, str]]
    seconds: float
    warnings: list[ImageWarning]
    problems: list[str]
    notes: list[str]

    @property
    def counts(self) -> list[dict[str, str]]:
        """Number of images, identities and cameras by split, as rows of a table."""
        rows = []
        for name in (*SPLITS, "all"):
            items = [item for item in self.items if name in ("all", item.split)]
            if items:
                cameras = len({item.camera for item in items} - {UNKNOWN})
                identities = len({item.identity for item in items if item.split != UNLABELLED})
                figures = {"images": len(items), "identities": identities, "cameras": cameras}
                rows.append({"split": name, **{key: f"{value:,}" for key, value in figures.items()}})
        return rows


@contextmanager
def raw_images(files: Files, params: Params) -> Iterator[Path]:
    """Yield the folder of the raw images; the default set is rendered into a temporary one."""
    if params.data.source != "vehicles":
        yield data_root(files, params)
        return
    from pipeline.data.toy_vehicles import render  # needs two libraries that nothing else needs

    with TemporaryDirectory() as folder:
        render.render(Path(folder), params.seed, params.data.vehicles)
        yield Path(folder)


def survey(params: Params, root: Path) -> Survey:
    """Read the data set below `root`; nothing is written.

    Raises:
        FileNotFoundError: If a list or a folder of the data set is missing.
        DataError: If it does not have the form of `data.source`.
    """
    data, seed = params.data, params.seed
    listing = read_source(data, root)
    missing = [item.path for item in listing.items if not (root / item.path).is_file()]
    lost = set(missing)
    items = [item for item in listing.items if item.path not in lost]
    items = split_validation(
        split_test(items, data.custom.test, seed, data.protocol), data.validation, seed, data.protocol
    )
    labelled = [item for item in items if item.split != UNLABELLED]
    without_labels = evenly(items[len(labelled) :], UNLABELLED_SAMPLE)  # they come last
    decoded, unreadable, warnings, seconds = _decode([*sample(labelled, SAMPLE), *without_labels], root)
    return Survey(
        items=items,
        missing=missing,
        decoded=decoded,
        unreadable=unreadable,
        seconds=seconds,
        warnings=[*listing.warnings, *warnings],
        problems=list(requirements.problems(items, params)),
        notes=list(requirements.warnings(items, params)),
    )


def sample(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` images, as many as possible of different identities and spread over their images."""
    images: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        images[item.identity].append(item)
    each = -(-count // max(len(images), 1))
    return evenly([item for one in images.values() for item in evenly(one, each)], count)


def evenly(sequence: Sequence[T], count: int) -> list[T]:
    """Return at most `count` evenly spaced elements."""
    count = min(count, len(sequence))
    return [sequence[number * len(sequence) // count] for number in range(count)]


def _decode(items: Sequence[Item], root: Path) -> tuple[list[Item], list[tuple[str, str]], list[ImageWarning], float]:
    """Inspect images until the time is over; returns those that can be decoded, the others, warnings, seconds each."""
    decoded, unreadable, warnings = list[Item](), list[tuple[str, str]](), list[ImageWarning]()
    started, done, chunks = time.monotonic(), 0, -(-len(items) // CHUNK)
    for number in range(chunks):
        chunk = items[number::chunks]  # spread over all identities, in case that the time does not suffice
        inspection = inspect(chunk, root)
        decoded += inspection.good
        unreadable += inspection.quarantined
        warnings += inspection.warnings
        done += len(chunk)
        if time.monotonic() - started > SECONDS:
            break
    return decoded, unreadable, warnings, (time.monotonic() - started) / max(done, 1)
