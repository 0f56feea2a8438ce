"""Who is trained on, who is validated on, and who asks whom, where the data set does not say."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipeline.data.custom import UNDEALT, UNSPLIT
from pipeline.data.layout import UNKNOWN
from pipeline.data.manifest import DataError, Item, some
from pipeline.protocols import JUNK, PROTOCOLS

log = logging.getLogger(__name__)

Seen = Mapping[str, Sequence[str]]
"""Paths of one identity's images, by camera."""


def split_test(items: Sequence[Item], share: float, seed: int, protocol: str) -> list[Item]:
    """Put images that have no split into one, identity by identity.

    Whether an identity is tested depends on its name and the seed alone, so that none changes sides when images come or
    go. One that could not be found (it has one image; under protocol market, one camera) asks nothing. Junk (identity
    -1) is asked of. Images that have a split keep it, and all keep their order.

    Args:
        items: Of all splits.
        share: Of the identities that become the test set, in (0, 1).
        seed: Same seed, same identities.
        protocol: That the test set is asked under.
    """
    seen = _seen(item for item in items if item.split in (UNSPLIT, UNDEALT))
    tested = {item.identity for item in items if item.split == UNDEALT}
    tested |= _drawn({item.identity for item in items if item.split == UNSPLIT} - {JUNK}, share, seed)
    asking = {path for name in seen if name in tested for path in _asking(seen[name], protocol)}

    def place(item: Item) -> Item:
        if item.split not in (UNSPLIT, UNDEALT):
            return item
        if item.identity not in tested | {JUNK}:
            return replace(item, split="train")
        return replace(item, split="query" if item.path in asking or PROTOCOLS[protocol].all_query else "gallery")

    return [place(item) for item in items]


def split_validation(items: Sequence[Item], share: float, seed: int, protocol: str) -> list[Item]:
    """Hold whole training identities out, to validate on.

    Of a held-out identity, under protocol market, the first image of every camera becomes a query and the rest the
    gallery. Where that would leave queries with nothing to find, as only one camera has a second image, every other
    camera asks. Under `query-gallery` the first image asks, else all do. An identity that could not be found again
    stays in training.

    Args:
        items: With splits `train`, `query` and `gallery`; they keep their order.
        share: Of the training identities, rounded down.
        seed: Same seed, same identities.
        protocol: That is validated under.
    """
    seen = _seen(item for item in items if item.split == "train")
    fit = [name for name in sorted(seen) if _can_be_found(seen[name], protocol) and name != JUNK]
    wanted = int(share * len(seen))
    if len(fit) < wanted:
        why = "were seen by two cameras" if PROTOCOLS[protocol].cameras else "have two images"
        log.warning("only %d of %d identities %s and can be held out", len(fit), wanted, why)
    held_out = set(np.random.default_rng(seed).permutation(fit)[:wanted].tolist())
    asking = {path for name in held_out for path in _asking(seen[name], protocol)}

    def place(item: Item) -> Item:
        if item.split != "train" or item.identity not in held_out:
            return item
        return replace(item, split="validation-query" if item.path in asking else "validation-gallery")

    return [place(item) for item in items]


def _drawn(names: Iterable[str], share: float, seed: int) -> set[str]:
    """Identities that fall to the test set: each by itself, so that none moves when others come."""

    def place(name: str) -> float:
        return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()) / 2**64

    return {name for name in names if place(name) < share}


def check_test_set(items: Sequence[Item], protocol: str) -> None:
    """Refuse a test set that cannot be asked under a protocol.

    Raises:
        DataError: Saying what is missing.
    """
    tested = [item for item in items if item.split in ("query", "gallery")]
    asking = {item.identity for item in tested if item.split == "query"}
    gallery = [item.path for item in tested if item.split == "gallery"]
    identities = {item.identity for item in tested}
    if len(identities) < 2 or not asking:
        raise DataError(
            f"the test set has {len(tested)} images of {len(identities)} identities, and {len(asking)} of them ask; "
            "two identities are needed, one of them with two images"
            f"{' from two cameras' if protocol.startswith('market') else ''}: raise `data.custom.test`, or add images"
        )
    if JUNK in asking:
        raise DataError(f"identity {JUNK} is junk, which asks nothing; under protocol {protocol} give it no place")
    if PROTOCOLS[protocol].all_query and gallery:
        raise DataError(
            f"under protocol {protocol} all test images ask, but {len(gallery)} are in a gallery, such as "
            f"{gallery[0]}; set `data.protocol` to query-gallery, or to market if cameras are known"
        )
    if not PROTOCOLS[protocol].all_query and not gallery:
        raise DataError(f"protocol {protocol} needs a gallery, and there is none; set `data.protocol` to loo")
    unseen = [item.path for item in tested if item.camera == UNKNOWN]
    if PROTOCOLS[protocol].cameras and unseen:
        raise DataError(
            f"protocol {protocol} needs the camera of every test image, and {len(unseen)} have none, such as "
            f"{some(unseen, 1)}; set `data.protocol` to query-gallery"
        )


def _seen(items: Iterable[Item]) -> dict[str, dict[str, list[str]]]:
    """Paths by identity and camera."""
    seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        seen[item.identity][item.camera].append(item.path)
    return seen


def _can_be_found(seen: Seen, protocol: str) -> bool:
    return len(seen.keys() - {UNKNOWN}) > 1 if PROTOCOLS[protocol].cameras else sum(map(len, seen.values())) > 1


def _asking(seen: Seen, protocol: str) -> Sequence[str]:
    """Of one identity's paths by camera, those that ask."""
    if not _can_be_found(seen, protocol):
        return []
    if PROTOCOLS[protocol].cameras:
        cameras = sorted(seen.keys() - {UNKNOWN})
        if sum(len(seen[camera]) > 1 for camera in cameras) < 2:
            cameras = cameras[::2]
        return [seen[camera][0] for camera in cameras]
    everything = [path for camera in sorted(seen) for path in seen[camera]]
    return everything[:1] if protocol == "query-gallery" else everything
