"""Split identities into training, validation and test, and test images into query and gallery."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipeline.data.layout import UNASSIGNED, UNASSIGNED_TEST, UNASSIGNED_VALIDATION, UNKNOWN
from pipeline.data.manifest import TEST, DataError, Item
from pipeline.protocols import JUNK, PROTOCOLS

log = logging.getLogger(__name__)

MAX_DEVIATION = 0.1
"""Difference between the drawn and the requested share of test identities above which there is a warning."""

NamesByCamera = Mapping[str, Sequence[str]]
"""Names of one identity's images, by camera."""


def split_test(items: Sequence[Item], share: float, seed: int, protocol: str) -> list[Item]:
    """Assign unsplit images to train, query or gallery; all images of an identity are in train or in the test set.

    Whether an identity is in the test set depends on its name and the seed alone, so no identity moves when images are
    added or removed. An identity without a possible match (it has one image or, under protocol market, one camera) has
    no query. Junk (identity -1) goes to the gallery. Images that have a split keep it.

    Args:
        items: Images of all splits; the order is kept.
        share: Share of the unsplit identities that become the test set, in (0, 1).
        protocol: Protocol that the test set is scored by.
    """
    paths = _group_names(item for item in items if item.split in (UNASSIGNED, UNASSIGNED_TEST))
    tested = {item.identity for item in items if item.split == UNASSIGNED_TEST}
    unassigned = {item.identity for item in items if item.split == UNASSIGNED} - {JUNK}
    drawn = draw_test(unassigned, share, seed)
    if abs(len(drawn) - share * len(unassigned)) > MAX_DEVIATION * len(unassigned):
        log.warning(
            "%d of %d identities are drawn for the test set, although `data.custom.test` is %g, because few identities "
            "scatter; another `seed`, or splits of your own, change that", len(drawn), len(unassigned), share,
        )  # fmt: skip
    tested |= drawn
    queries = {path for name in paths if name in tested for path in _query_names(paths[name], protocol)}

    def assign(item: Item) -> Item:
        if item.split not in (UNASSIGNED, UNASSIGNED_TEST):
            return item
        if item.identity not in tested | {JUNK}:
            return replace(item, split="train")
        return replace(item, split="query" if item.name in queries or PROTOCOLS[protocol].all_query else "gallery")

    return [assign(item) for item in items]


def split_validation(items: Sequence[Item], share: float, seed: int, protocol: str) -> list[Item]:
    """Divide given validation images into queries and gallery; without any, hold out whole training identities.

    Under protocol market, the first image of every camera is a query and the other images are the gallery. If fewer
    than two cameras have a second image, some queries would have no match: then the first image of every other camera
    is a query. Under `query-gallery` the first image of an identity is a query, under other protocols all are. An
    identity without a possible match stays in training, and one that is in the test set too (closed set).

    Args:
        items: Images with splits `train`, `query`, `gallery` and perhaps `validation`; the order is kept.
        share: Share of the training identities to hold out, rounded down; ignored if validation images are given.
        protocol: Protocol that the validation set is scored by.

    Raises:
        DataError: If validation images are given, and none of them has a match.
    """
    if any(item.split == UNASSIGNED_VALIDATION for item in items):
        return _divide_validation(items, protocol)
    if any(item.split.startswith("validation-") for item in items):
        return list(items)
    paths = _group_names(item for item in items if item.split == "train")
    tested = {item.identity for item in items if item.split in TEST}  # in training too if `data.closed_set`
    free = sorted(paths.keys() - tested)
    candidates = [name for name in free if _has_match(paths[name], protocol) and name != JUNK]
    wanted = int(share * len(free))
    if len(candidates) < wanted:
        requirement = "were seen by two cameras" if PROTOCOLS[protocol].cameras else "have two images"
        log.warning("only %d of %d identities %s and can be held out", len(candidates), wanted, requirement)
    held_out = set(np.random.default_rng(seed).permutation(candidates)[:wanted].tolist())
    queries = {path for name in held_out for path in _query_names(paths[name], protocol)}

    def assign(item: Item) -> Item:
        if item.split != "train" or item.identity not in held_out:
            return item
        return replace(item, split="validation-query" if item.name in queries else "validation-gallery")

    return [assign(item) for item in items]


def _divide_validation(items: Sequence[Item], protocol: str) -> list[Item]:
    names = _group_names(item for item in items if item.split == UNASSIGNED_VALIDATION)
    queries = {name for views in names.values() for name in _query_names(views, protocol)}
    if not queries:
        cameras = " in two cameras" if PROTOCOLS[protocol].cameras else ""
        raise DataError(
            f"no identity of the validation split has two images{cameras}, as protocol {protocol} needs; add images, "
            "or remove the split"
        )

    def assign(item: Item) -> Item:
        if item.split != UNASSIGNED_VALIDATION:
            return item
        is_query = item.name in queries or PROTOCOLS[protocol].all_query
        return replace(item, split="validation-query" if is_query else "validation-gallery")

    return [assign(item) for item in items]


def draw_test(identities: Iterable[str], share: float, seed: int) -> set[str]:
    """Draw the identities of the test set, each by a hash of its name, so that new identities move no other."""

    def uniform(name: str) -> float:
        return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()) / 2**64

    return {name for name in identities if uniform(name) < share}


def _group_names(items: Iterable[Item]) -> dict[str, dict[str, list[str]]]:
    """Group names of images by identity and camera."""
    names: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        names[item.identity][item.camera].append(item.name)
    return names


def _has_match(names: NamesByCamera, protocol: str) -> bool:
    """Return whether an image of the identity can be a query with another one as its match."""
    return len(names.keys() - {UNKNOWN}) > 1 if PROTOCOLS[protocol].cameras else sum(map(len, names.values())) > 1


def _query_names(names: NamesByCamera, protocol: str) -> Sequence[str]:
    """Choose which images of one identity are queries."""
    if not _has_match(names, protocol):
        return []
    if PROTOCOLS[protocol].cameras:
        cameras = sorted(names.keys() - {UNKNOWN})
        if sum(len(names[camera]) > 1 for camera in cameras) < 2:
            cameras = cameras[::2]
        return [names[camera][0] for camera in cameras]
    everything = [path for camera in sorted(names) for path in names[camera]]
    return everything[:1] if protocol == "query-gallery" else everything
