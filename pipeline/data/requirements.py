"""What later stages require of the data, checked before anything trains.

Stage `prepare` checks it at its end. Params of the other stages do not make `prepare` run again, so each later stage
checks it once more before it begins.
"""

import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from pipeline.config import Batch, Params
from pipeline.data.layout import UNKNOWN
from pipeline.data.manifest import TEST, UNLABELLED, DataError, Item, first_few, label_problems
from pipeline.data.sources import LAYOUTS
from pipeline.protocols import JUNK, PROTOCOLS, Protocol

log = logging.getLogger(__name__)

CUSTOM = ("folder", "csv")
"""Sources that `data.custom.test` splits, unless the splits are given."""

Cameras = Mapping[str, Counter[str]]
"""Number of images by camera, by identity."""


def check_requirements(items: Sequence[Item], params: Params) -> None:
    """Check that every stage can use the images, whose splits are those of the manifest.

    Raises:
        DataError: Listing all problems, one a line.
    """
    if found := list(problems(items, params)):
        raise DataError("\n".join(found))


def unwatched_weights(stage: Literal["teacher", "student"], params: Params) -> str | None:
    """Return a warning if DVC does not see changes of the weights that a stage begins with."""
    key, path = _weights(stage, params)
    # Links, which DVC may put in place of files, are not followed.
    if path is None or Path(os.path.abspath(path)).is_relative_to(os.path.abspath(Path("weights", stage))):
        return None
    return f"`{key}` is {path}: put it into weights/{stage}/, because DVC does not see it change elsewhere"


def _weights(stage: Literal["teacher", "student"], params: Params) -> tuple[str, Path | None]:
    """Return the key of the weights that a stage begins with, and their path if they are in a file."""
    key, name = {
        "teacher": ("teacher.weights", params.teacher.weights),
        "student": ("student.init", params.student.init),
    }[stage]
    unused = stage == "student" and params.student.method in ("static-magnitude", "static-random")
    return key, None if unused or name in ("none", "imagenet", "teacher", "random") else Path(name)


def _weights_warnings(stage: Literal["teacher", "student"], params: Params) -> Iterator[str]:
    key, path = _weights(stage, params)
    folders = stage == "teacher" and params.teacher.source == "checkpoint"  # of this project
    if path is not None and not (path.is_file() or (folders and (path / "spec.json").is_file())):
        yield f"`{key}` is {path}, which is not a file, so stage {stage} will stop; set it to a path"
    elif unwatched := unwatched_weights(stage, params):
        yield unwatched


def problems(items: Sequence[Item], params: Params) -> Iterator[str]:
    """Yield what keeps a stage from running, each with its remedy."""
    yield from label_problems(items, params.data.closed_set)
    items = [item for item in items if item.split != UNLABELLED]
    yield from _training_problems(items, params)
    yield from _test_problems(items, params)
    if any(item.split == "validation-query" for item in items) and not _scorable(items, "validation-", params):
        yield (
            f"no query of the validation set has a match under protocol {params.data.protocol}, "
            f"{_match(PROTOCOLS[params.data.protocol])}; set `data.validation` to 0, or correct the given splits"
        )


def warnings(items: Sequence[Item], params: Params) -> Iterator[str]:
    """Yield what works and is probably not intended."""
    if any(item.split == UNLABELLED for item in items) and not params.student.batch.unlabelled:
        yield "images without labels are not used, because `student.batch.unlabelled` is 0; raise it, to 48 for example"
    if params.data.source == "folder":
        yield from _identities_around(items, params.data.unlabelled)
    yield from _weights_warnings("teacher", params)
    yield from _weights_warnings("student", params)
    items = [item for item in items if item.split != UNLABELLED]
    trained = _cameras_of(items, "train")
    held_out = {item.identity for item in items if item.split.startswith("validation-")}
    share = params.data.validation
    if not held_out and share and trained:
        smallest = math.ceil(100 / len(trained)) / 100
        why = f"`data.validation` is {share:g} of {len(trained)} training identities"
        if trained.keys() <= {item.identity for item in items if item.split in TEST}:
            why = "all training identities are in the test set too (closed set)"
        elif share >= smallest:
            why = f"no query of them would have a match, {_match(PROTOCOLS[params.data.protocol])}"
        elif smallest <= 0.5:
            why += f"; {smallest:g} holds out one"
        yield f"no identity is held out for validation, so no validation mAP is computed: {why}"
    elif len(held_out) == 1:
        yield (
            f"one identity is held out for validation, so the validation mAP is always 1: `data.validation` is "
            f"{share:g} of {len(trained) + 1} training identities"
        )
    for stage, batch in _batches(params):
        few = sum(images.total() < batch.instances for images in trained.values())
        if few > len(trained) / 2:
            yield (
                f"{few} of {len(trained)} training identities have fewer images than `{stage}.batch.instances` "
                f"({batch.instances}), so batches repeat images"
            )
    queries = sum(item.split == "query" for item in items)
    if 0 < queries < params.benchmark.panels:
        yield f"`benchmark.panels` is {params.benchmark.panels}, but queries of the test set: {queries}; all are shown"


def _identities_around(items: Iterable[Item], unlabelled: Iterable[str]) -> Iterator[str]:
    """Yield the identities whose folder holds a folder of unlabelled images, which is probably not meant."""
    outer = {str(parent): folder for folder in sorted(unlabelled) for parent in PurePosixPath(folder).parents}
    if not outer:  # most often, and there may be many images
        return
    for folder in sorted({str(PurePosixPath(item.path).parent) for item in items if item.split != UNLABELLED}):
        for around in (folder, str(PurePosixPath(folder).parent)):
            if around != "." and around in outer:
                yield (
                    f"images in {folder} count as those of an identity, although {outer[around]} is in "
                    f"`data.unlabelled`; add {around} to it, or move them"
                )
                break


def _unlisted(params: Params) -> str:
    """Return a remedy if folders that are named as splits may have been listed as unlabelled."""
    folders = params.data.unlabelled
    return f"remove its folder from `data.unlabelled` ({', '.join(folders)}), or " if folders else ""


def _batches(params: Params) -> tuple[tuple[str, Batch], ...]:
    return tuple((stage, section.batch) for stage, section in params.trainings)


def _cameras_of(items: Iterable[Item], *splits: str) -> dict[str, Counter[str]]:
    """Count images by identity and camera, of some splits or of all."""
    cameras: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        if not splits or item.split in splits:
            cameras[item.identity][item.camera] += 1
    return cameras


def _training_problems(items: Sequence[Item], params: Params) -> Iterator[str]:
    everyone = {item.identity for item in items}
    trained = {item.identity for item in items if item.split == "train"}
    tested = {item.identity for item in items if item.split in ("query", "gallery")}
    left = (
        f"{len(trained)} identities left for training (of {len(everyone)}: {len(tested)} are in the test set, "
        f"{len(everyone - tested - trained)} in validation)"
    )
    fewer = "lower `data.custom.test`, or " if params.data.source in CUSTOM and len(tested) > 2 else ""
    if not trained:
        yield (
            f"no image is in the training set; {_unlisted(params)}give images the split `train`, or lower "
            "`data.custom.test`"
        )
        return
    if len(trained) < 2:
        yield f"training needs two identities, and there are {left}; {fewer}add identities"
        return
    for stage, batch in _batches(params):
        if batch.identities > len(trained):
            yield (
                f"`{stage}.batch.identities` ({batch.identities}) must not exceed the {left}; "
                f"{fewer}set `{stage}.batch.identities` to {len(trained)} or less"
            )


def _test_problems(items: Sequence[Item], params: Params) -> Iterator[str]:
    """Yield why the test set cannot be scored under `data.protocol`."""
    data = params.data
    protocol = PROTOCOLS[data.protocol]
    tested = [item for item in items if item.split in ("query", "gallery")]
    identities = {item.identity for item in tested}
    gallery = [item.path for item in tested if item.split == "gallery"]
    without_camera = [item.path for item in tested if item.camera == UNKNOWN]
    larger = (
        f"raise `data.custom.test` ({data.custom.test:g}), or give more of them to the test set if the splits are your "
        "own"
    )
    if protocol.cameras and without_camera:
        yield (
            f"protocol {data.protocol} needs the camera of every test image, and {len(without_camera)} have none, such "
            f"as {first_few(without_camera, 1)}; {_other_protocol(data.source)}, or name the cameras"
        )
    elif not tested and data.source in CUSTOM:
        yield (
            f"no image is in the test set; {_unlisted(params)}give images the split `test`, or `query` and `gallery`, "
            f"or, without splits of your own, raise `data.custom.test` ({data.custom.test:g})"
        )
    elif len(identities - {JUNK}) < 2:
        others = len({item.identity for item in items} - {JUNK}) - len(identities - {JUNK})
        yield (
            f"the test set needs two identities, and it has {len(identities - {JUNK})} ({len(tested)} images); "
            + (larger if data.source in CUSTOM and others > 2 else "add identities")
        )
    elif any(item.split == "query" and item.identity == JUNK for item in tested):
        yield f"identity {JUNK} is junk and cannot be a query; remove it under protocol {data.protocol}"
    elif protocol.all_query and gallery:
        yield (
            f"under protocol {data.protocol} all test images are queries, but {len(gallery)} are in a gallery, such as "
            f"{gallery[0]}; set `data.protocol` to query-gallery, or to market if cameras are known"
        )
    elif not _scorable(items, "", params):
        yield f"no query of the test set has a match under protocol {data.protocol}, {_match(protocol)}; " + (
            _remedy(items, params, larger)
        )


def _remedy(items: Sequence[Item], params: Params, larger: str) -> str:
    """Return what gives a query of the test set a match."""
    protocol, source = PROTOCOLS[params.data.protocol], params.data.source
    test = _cameras_of(items, "query", "gallery")
    test.pop(JUNK, None)
    if any(_has_match(images, protocol) for images in test.values()):  # the given splits keep them apart
        return "put one image of an identity into `query` and another one into `gallery`"
    elsewhere = sum(_has_match(images, protocol) for name, images in _cameras_of(items).items() if name != JUNK)
    if source in CUSTOM and elsewhere:
        return f"{elsewhere} training identities have one: {larger}"
    if not protocol.cameras:
        return "add images, so that an identity has two"
    cameras = {item.camera for item in items} - {UNKNOWN}
    why = "all images are of one camera" if len(cameras) == 1 else "no identity was seen by two cameras"
    return f"{why}: {_other_protocol(source)}"


def _other_protocol(source: str) -> str:
    """Name the protocols that need no cameras, as far as the source can be scored by them."""
    possible = LAYOUTS[source].protocols
    if not possible or "query-gallery" in possible:
        return "set `data.protocol` to query-gallery, or to loo without given splits"
    return f"source {source} needs them under every protocol that it supports ({', '.join(possible)})"


def _match(protocol: Protocol) -> str:
    """Describe the match of a query."""
    if protocol.all_query:
        return "another image of its identity"
    return f"a gallery image of its identity{' from another camera' if protocol.cameras else ''}"


def _has_match(images: Counter[str], protocol: Protocol) -> bool:
    """Return whether an image can be a query with another image of the same identity as its match."""
    return len(images.keys() - {UNKNOWN}) > 1 if protocol.cameras else images.total() > 1


def _scorable(items: Sequence[Item], prefix: str, params: Params) -> bool:
    """Return whether any query of the test set, or of the validation set (prefix `validation-`), has a match."""
    protocol = PROTOCOLS[params.data.protocol]
    if protocol.all_query:
        queried = _cameras_of(items, f"{prefix}query")
        return any(_has_match(images, protocol) for images in queried.values())
    gallery = _cameras_of(items, f"{prefix}gallery")
    return any(
        item.identity in gallery
        and item.identity != JUNK
        and (not protocol.cameras or bool(gallery[item.identity].keys() - {item.camera}))
        for item in items
        if item.split == f"{prefix}query"
    )
