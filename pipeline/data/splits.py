"""Split identities into training, validation and test, and test images into query and gallery."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipeline.data.custom import UNASSIGNED, UNASSIGNED_TEST
from pipeline.data.layout import UNKNOWN
from pipeline.data.manifest import Item
from pipeline.protocols import JUNK, PROTOCOLS

log = logging.getLogger(__name__)

PathsByCamera = Mapping[str, Sequence[str]]
"""Paths of one identity's images, by camera."""


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
    paths = _group_paths(item for item in items if item.split in (UNASSIGNED, UNASSIGNED_TEST))
    tested = {item.identity for item in items if item.split == UNASSIGNED_TEST}
    tested |= _draw_test({item.identity for item in items if item.split == UNASSIGNED} - {JUNK}, share, seed)
    queries = {path for name in paths if name in tested for path in _query_paths(paths[name], protocol)}

    def assign(item: Item) -> Item:
        if item.split not in (UNASSIGNED, UNASSIGNED_TEST):
            return item
        if item.identity not in tested | {JUNK}:
            return replace(item, split="train")
        return replace(item, split="query" if item.path in queries or PROTOCOLS[protocol].all_query else "gallery")

    return [assign(item) for item in items]


def split_validation(items: Sequence[Item], share: float, seed: int, protocol: str) -> list[Item]:
    """Hold out whole training identities for validation.

    Under protocol market, the first image of every camera is a query and the other images are the gallery. If fewer
    than two cameras have a second image, some queries would have no match: then the first image of every other camera
    is a query. Under `query-gallery` the first image of an identity is a query, under other protocols all are. An
    identity without a possible match stays in training.

    Args:
        items: Images with splits `train`, `query` and `gallery`; the order is kept.
        share: Share of the training identities to hold out, rounded down.
        protocol: Protocol that the validation set is scored by.
    """
    paths = _group_paths(item for item in items if item.split == "train")
    candidates = [name for name in sorted(paths) if _has_match(paths[name], protocol) and name != JUNK]
    wanted = int(share * len(paths))
    if len(candidates) < wanted:
        requirement = "were seen by two cameras" if PROTOCOLS[protocol].cameras else "have two images"
        log.warning("only %d of %d identities %s and can be held out", len(candidates), wanted, requirement)
    held_out = set(np.random.default_rng(seed).permutation(candidates)[:wanted].tolist())
    queries = {path for name in held_out for path in _query_paths(paths[name], protocol)}

    def assign(item: Item) -> Item:
        if item.split != "train" or item.identity not in held_out:
            return item
        return replace(item, split="validation-query" if item.path in queries else "validation-gallery")

    return [assign(item) for item in items]


def _draw_test(names: Iterable[str], share: float, seed: int) -> set[str]:
    """Draw the identities of the test set, each by a hash of its name, so that new identities move no other."""

    def uniform(name: str) -> float:
        return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()) / 2**64

    return {name for name in names if uniform(name) < share}


def _group_paths(items: Iterable[Item]) -> dict[str, dict[str, list[str]]]:
    """Group paths by identity and camera."""
    paths: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        paths[item.identity][item.camera].append(item.path)
    return paths


def _has_match(paths: PathsByCamera, protocol: str) -> bool:
    """Return whether an image of the identity can be a query with another one as its match."""
    return len(paths.keys() - {UNKNOWN}) > 1 if PROTOCOLS[protocol].cameras else sum(map(len, paths.values())) > 1


def _query_paths(paths: PathsByCamera, protocol: str) -> Sequence[str]:
    """Choose which images of one identity are queries."""
    if not _has_match(paths, protocol):
        return []
    if PROTOCOLS[protocol].cameras:
        cameras = sorted(paths.keys() - {UNKNOWN})
        if sum(len(paths[camera]) > 1 for camera in cameras) < 2:
            cameras = cameras[::2]
        return [paths[camera][0] for camera in cameras]
    all_paths = [path for camera in sorted(paths) for path in paths[camera]]
    return all_paths[:1] if protocol == "query-gallery" else all_paths
