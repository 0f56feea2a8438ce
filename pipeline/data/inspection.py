"""What raw images must survive before anything learns from them: full decoding, and a search for copies."""

import hashlib
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps

from pipeline.data.images import opened, upright_rgb
from pipeline.data.manifest import TEST, DataError, ImageWarning, Item, some
from pipeline.data.parallel import in_threads
from pipeline.progress import track

STRIP = 256
"""Indices of pixels that are copied at a time."""


@dataclass(frozen=True)
class DecodedImage:
    """What one image is.

    Attributes:
        pixels: SHA-256 of size and decoded pixels.
        hashes: Perceptual hashes of it and of its mirror image.
        state: Size and time of change of the file, in bytes and nanoseconds.
        flat: Whether it is of one colour, and so looks like all others that are.
        remark: What is odd about it; empty where nothing is.
    """

    pixels: str
    hashes: tuple[int, int]
    state: tuple[int, int] | None
    flat: bool
    remark: str


@dataclass(frozen=True)
class Inspection:
    """What came of decoding every image.

    Attributes:
        good: Items that decode, in the given order.
        looks: What each of them is.
        quarantined: (path, reason) of the others.
    """

    good: list[Item]
    looks: list[DecodedImage]
    quarantined: list[ImageWarning]

    @property
    def warnings(self) -> list[ImageWarning]:
        """(path, remark) of images that are odd, but usable."""
        return [(item.path, look.remark) for item, look in zip(self.good, self.looks, strict=True) if look.remark]


def inspect(items: Sequence[Item], root: Path) -> Inspection:
    """Decode every image to its end: `Image.verify` misses truncated files. Links out of `root` are refused."""
    inside = root.resolve()

    def look(item: Item) -> DecodedImage | str:
        try:
            return _look(_regular(root / item.path, inside))
        except Exception as error:
            reason = str(error).replace(str(root / item.path), item.path).replace(str(inside), "")
            return f"{type(error).__name__}: {reason}"

    good, looks, quarantined = [], [], []
    found = track(in_threads(look, items), len(items), "inspecting images")
    for item, seen in zip(items, found, strict=True):
        if isinstance(seen, str):
            quarantined.append((item.path, seen))
        else:
            good.append(item)
            looks.append(seen)
    return Inspection(good, looks, quarantined)


def _regular(path: Path, inside: Path) -> Path:
    """Where a path leads to, if that is a file inside of the root: opening a pipe would wait for ever."""
    end = path.resolve(strict=True)
    if not end.is_relative_to(inside):
        raise DataError("leads out of `data.root`")
    if not stat.S_ISREG(end.stat().st_mode):
        raise DataError("is no regular file")
    return end


def _look(path: Path) -> DecodedImage:
    """Decode one file.

    Raises:
        Exception: Whatever the decoder finds.
    """
    before = _state(path)
    with opened(path) as image:
        kind, frames = image.format or "", int(getattr(image, "n_frames", 1))
        rgb = upright_rgb(image)
        pixels = hashlib.sha256(repr(rgb.size).encode())
        for top in range(0, rgb.height, STRIP):
            pixels.update(rgb.crop((0, top, rgb.width, min(top + STRIP, rgb.height))).tobytes())
        flat = all(high - low <= 1 for low, high in rgb.getextrema())  # type: ignore[misc]
        small = rgb.convert("L").resize((32, 32), Image.Resampling.LANCZOS)  # as the hash does it
        del rgb
    hashes = (_hash(small), _hash(ImageOps.mirror(small)))
    warnings = []
    expected = Image.registered_extensions().get(path.suffix.lower())
    if expected != kind:
        warnings.append(f"is {kind}, whatever its name says")
    if frames > 1:
        warnings.append(f"has {frames} frames, of which the first is taken")
    if flat:
        warnings.append("is of one colour")
    return DecodedImage(pixels.hexdigest(), hashes, before, flat, "; ".join(warnings))


def _state(path: Path) -> tuple[int, int] | None:
    """Size (bytes) and time of change (ns) of a file; None if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _hash(grey: Image.Image) -> int:
    bits = imagehash.phash(grey).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes())


def changed(found: Inspection, root: Path) -> list[str]:
    """Paths of files that are not what they were when they were looked at."""
    pairs = zip(found.good, found.looks, strict=True)
    return [item.path for item, look in pairs if _state(root / item.path) != look.state]


def leaks(found: Inspection) -> list[tuple[str, str]]:
    """Pairs of paths (training, test) with the same pixels.

    Duplicates inside of the test set are left alone: VeRi-776's own queries are in its gallery too.
    """
    pairs = list(zip(found.good, found.looks, strict=True))
    trained = {look.pixels: item.path for item, look in pairs if item.split not in TEST}
    return [(trained[look.pixels], item.path) for item, look in pairs if item.split in TEST and look.pixels in trained]


def deduplicate(found: Inspection) -> Inspection:
    """The same without training images that two identities claim; those of a test set are kept, with a remark.

    A benchmark's test set is what it is: without some of it mAP would be another one.
    """
    claims: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for item, look in zip(found.good, found.looks, strict=True):
        claims[look.pixels, item.split in TEST].add(item.identity)
    good, looks, quarantined = [], [], list(found.quarantined)
    for item, look in zip(found.good, found.looks, strict=True):
        tested = item.split in TEST
        others = claims[look.pixels, tested] - {item.identity}
        said = f"identities {some(sorted(others))} claim the same pixels" if others else ""
        if said and not tested:
            quarantined.append((item.path, said))
            continue
        good.append(item)
        looks.append(replace(look, remark="; ".join(filter(None, (look.remark, said)))))
    return Inspection(good, looks, quarantined)


def twins(found: Inspection) -> list[tuple[str, str]]:
    """Pairs of paths of test images with the same pixels: the first that has them, and each other."""
    first: dict[str, str] = {}
    tested = [(item, look) for item, look in zip(found.good, found.looks, strict=True) if item.split in TEST]
    pairs = [(first.setdefault(look.pixels, item.path), item.path) for item, look in tested]
    return [(one, other) for one, other in pairs if one != other]


def near_duplicates(found: Inspection, bits: int) -> list[tuple[str, str, int]]:
    """For each test image that looks like a training image, mirrored or not: the nearest one.

    Images of one colour, and those with the same pixels, are none. Of the 64 bits of the hashes at most `bits` differ
    (below 0, none are looked for). Returns path of the training image, path of the test image, and differing bits.
    """
    told = [(item, look) for item, look in zip(found.good, found.looks, strict=True) if not look.flat]
    train = [(item, look) for item, look in told if item.split not in TEST]
    if bits < 0 or not train:
        return []
    hashes = np.array([look.hashes[0] for _, look in train], np.uint64)
    exact = {look.pixels for _, look in train}
    pairs = []
    for item, look in told:
        if item.split in TEST and look.pixels not in exact:
            apart = np.bitwise_count(hashes[:, None] ^ np.array(look.hashes, np.uint64)).min(axis=1)
            place = int(apart.argmin())
            if apart[place] <= bits:
                pairs.append((train[place][0].path, item.path, int(apart[place])))
    return pairs


def refuse(found: Inspection, images: int, max_quarantined: float, max_leaked: float) -> None:
    """Stop where too much is unreadable, or where too much of the test set would be known from training.

    Raises:
        DataError: Naming the images, and the limit.
    """
    bad = [f"{path} ({reason})" for path, reason in found.quarantined]
    if len(bad) > max_quarantined * images:
        raise DataError(
            f"{len(bad)} of {images} images are unusable, more than `data.max_quarantined` ({max_quarantined}): "
            f"{some(bad)}; all are in quarantine.csv: replace them or raise the limit"
        )
    tested = sum(item.split in TEST for item in found.good)
    pairs = [f"{test} = {train}" for train, test in leaks(found)]
    if len(pairs) > max_leaked * tested:
        raise DataError(
            f"{len(pairs)} of {tested} test images are training images too, more than `data.max_leaked` "
            f"({max_leaked}): {some(pairs)}; remove them from one of the two, or raise the limit"
        )
