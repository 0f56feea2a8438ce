"""What raw data must survive before anything learns from it: full decoding, leakage, and a validation split."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.data.images import open_rgb
from pipeline.data.manifest import JUNK, TEST, Item
from pipeline.data.parallel import in_threads
from pipeline.progress import track

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inspection:
    """What came of decoding every image.

    Attributes:
        good: Items that decode, in the given order.
        pixels: SHA-256 of the decoded pixels of each good item.
        quarantined: (path, reason) of the others.
    """

    good: list[Item]
    pixels: list[str]
    quarantined: list[tuple[str, str]]


def inspect(items: Sequence[Item], root: Path) -> Inspection:
    """Decode every image to its end; `Image.verify` does not notice a truncated file.

    Args:
        items: What to look at.
        root: Folder that their paths are relative to.
    """

    def look(item: Item) -> tuple[str, str]:
        try:
            image = open_rgb(root / item.path)
        except Exception as error:
            reason = str(error).replace(str(root / item.path), item.path)
            return "", f"{type(error).__name__}: {reason}"
        return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest(), ""

    good, pixels, quarantined = [], [], []
    looks = track(in_threads(look, items), len(items), "inspecting images")
    for item, (digest, reason) in zip(items, looks, strict=True):
        if reason:
            quarantined.append((item.path, reason))
        else:
            good.append(item)
            pixels.append(digest)
    return Inspection(good, pixels, quarantined)


def leaks(inspection: Inspection) -> list[tuple[str, str]]:
    """Pairs of paths (training, test) with the same pixels.

    Duplicates inside of the test set are left alone: VeRi-776's own queries are in its gallery too.
    """
    trained = {
        digest: item.path
        for item, digest in zip(inspection.good, inspection.pixels, strict=True)
        if item.split not in TEST
    }
    return [
        (trained[digest], item.path)
        for item, digest in zip(inspection.good, inspection.pixels, strict=True)
        if item.split in TEST and digest in trained
    ]


def split_validation(items: Sequence[Item], share: float, seed: int) -> list[Item]:
    """Hold whole training identities out, to validate on.

    Of a held-out identity, the first image of every camera becomes a query and the rest the gallery. Where that would
    leave queries with nothing to find, as only one camera has a second image, every other camera asks. An identity
    that only one camera saw stays in training.

    Args:
        items: With splits `train`, `query` and `gallery`.
        share: Of the training identities, rounded down.
        seed: Same seed, same identities.

    Returns:
        The items in the given order.
    """
    seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # identity -> camera -> paths
    for item in items:
        if item.split == "train":
            seen[item.identity][item.camera].append(item.path)
    fit = [identity for identity in sorted(seen) if len(seen[identity]) > 1 and identity != JUNK]
    wanted = int(share * len(seen))
    if len(fit) < wanted:
        log.warning("only %d of %d identities were seen by two cameras and can be held out", len(fit), wanted)
    held_out = set(np.random.default_rng(seed).permutation(fit)[:wanted].tolist())
    queries = {path for identity in held_out for path in _queries(seen[identity])}

    def place(item: Item) -> Item:
        if item.split != "train" or item.identity not in held_out:
            return item
        return replace(item, split="validation-query" if item.path in queries else "validation-gallery")

    return [place(item) for item in items]


def _queries(seen: Mapping[str, Sequence[str]]) -> list[str]:
    """Of one identity's paths by camera, those that ask."""
    asking = sorted(seen)
    if sum(len(paths) > 1 for paths in seen.values()) < 2:
        asking = asking[::2]
    return [seen[camera][0] for camera in asking]
