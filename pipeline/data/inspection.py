"""Check raw images before they are used: decode each one completely, and search for duplicates."""

import hashlib
import stat
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps

from pipeline.data.images import open_image, upright_rgb
from pipeline.data.manifest import TEST, DataError, ImageWarning, Item, first_few
from pipeline.data.parallel import in_threads
from pipeline.progress import track

STRIP = 256
"""Rows of pixels that are copied at a time for hashing."""


@dataclass(frozen=True)
class DecodedImage:
    """Fingerprints of one image.

    Attributes:
        pixels: SHA-256 of size and decoded pixels.
        hashes: Perceptual hashes (64 bits) of the image and of its mirror image.
        state: Size (bytes) and modification time (ns) of the file before it was decoded.
        flat: Whether the image has one colour, and so looks like every other flat image.
        warning: What is unusual about the image, or "".
    """

    pixels: str
    hashes: tuple[int, int]
    state: tuple[int, int] | None
    flat: bool
    warning: str


@dataclass(frozen=True)
class Inspection:
    """The result of decoding every image.

    Attributes:
        good: Items that can be decoded, in their original order.
        decoded: The fingerprints of `good`, in the same order.
        quarantined: (path, reason) of the others.
    """

    good: list[Item]
    decoded: list[DecodedImage]
    quarantined: list[ImageWarning]

    @property
    def pairs(self) -> list[tuple[Item, DecodedImage]]:
        """Usable items with their fingerprints."""
        return list(zip(self.good, self.decoded, strict=True))

    @property
    def warnings(self) -> list[ImageWarning]:
        """(path, warning) of images that are usable but unusual."""
        return [(item.path, image.warning) for item, image in self.pairs if image.warning]


def inspect(items: Sequence[Item], root: Path) -> Inspection:
    """Decode every image completely (`Image.verify` misses truncated files); links that leave `root` are refused."""
    resolved_root = root.resolve()

    def inspect_one(item: Item) -> DecodedImage | str:
        try:
            return _decode(_regular_file(root / item.path, resolved_root))
        except Exception as error:
            reason = str(error).replace(str(root / item.path), item.path).replace(str(resolved_root), "")
            return f"{type(error).__name__}: {reason}"

    good, decoded, quarantined = [], [], []
    results = track(in_threads(inspect_one, items), len(items), "inspecting images")
    for item, result in zip(items, results, strict=True):
        if isinstance(result, str):
            quarantined.append((item.path, result))
        else:
            good.append(item)
            decoded.append(result)
    return Inspection(good, decoded, quarantined)


def _regular_file(path: Path, root: Path) -> Path:
    """Resolve a path and check that it is a regular file below `root`: opening a pipe would block for ever."""
    resolved = path.resolve(strict=True)
    if not resolved.is_relative_to(root):
        raise DataError("is outside `data.root`")
    if not stat.S_ISREG(resolved.stat().st_mode):
        raise DataError("is not a regular file")
    return resolved


def _decode(path: Path) -> DecodedImage:
    """Decode one file; raises whatever the decoder raises."""
    before = _state(path)
    with open_image(path) as image:
        actual_format, frames = image.format or "", int(getattr(image, "n_frames", 1))
        rgb = upright_rgb(image)
        pixels = hashlib.sha256(repr(rgb.size).encode())
        for top in range(0, rgb.height, STRIP):
            pixels.update(rgb.crop((0, top, rgb.width, min(top + STRIP, rgb.height))).tobytes())
        flat = all(high - low <= 1 for low, high in rgb.getextrema())  # type: ignore[misc]
        small = rgb.convert("L").resize((32, 32), Image.Resampling.LANCZOS)  # the first step of `imagehash.phash`
        del rgb  # frees the memory of a large image before the next one is decoded
    hashes = (_perceptual_hash(small), _perceptual_hash(ImageOps.mirror(small)))
    warnings = []
    named_format = Image.registered_extensions().get(path.suffix.lower())
    if named_format != actual_format:
        warnings.append(f"is {actual_format}, which does not match its suffix")
    if frames > 1:
        warnings.append(f"has {frames} frames, only the first is used")
    if flat:
        warnings.append("has only one colour")
    return DecodedImage(pixels.hexdigest(), hashes, before, flat, "; ".join(warnings))


def _state(path: Path) -> tuple[int, int] | None:
    """Return size (bytes) and modification time (ns) of a file; None if it does not exist."""
    try:
        result = path.stat()
    except OSError:
        return None
    return result.st_size, result.st_mtime_ns


def _perceptual_hash(grey: Image.Image) -> int:
    bits = imagehash.phash(grey).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes())


def changed_files(inspection: Inspection, root: Path) -> list[str]:
    """Return the paths of files whose size or modification time changed since they were inspected."""
    return [item.path for item, image in inspection.pairs if _state(root / item.path) != image.state]


def find_leaks(inspection: Inspection) -> list[tuple[str, str]]:
    """Return pairs of paths (training image, test image) with the same pixels.

    Duplicates within the test set are no leaks: VeRi-776's queries are in its gallery too.
    """
    trained = {image.pixels: item.path for item, image in inspection.pairs if item.split not in TEST}
    return [
        (trained[image.pixels], item.path)
        for item, image in inspection.pairs
        if item.split in TEST and image.pixels in trained
    ]


def deduplicate(inspection: Inspection) -> Inspection:
    """Quarantine training images whose pixels occur under several identities.

    Such test images are kept with a warning: without them, mAP would not be comparable with published results.
    """
    claims: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for item, image in inspection.pairs:
        claims[image.pixels, item.split in TEST].add(item.identity)
    good, decoded, quarantined = [], [], list(inspection.quarantined)
    for item, image in inspection.pairs:
        is_test = item.split in TEST
        others = claims[image.pixels, is_test] - {item.identity}
        warning = f"has the same pixels as an image of identity {first_few(sorted(others))}" if others else ""
        if warning and not is_test:
            quarantined.append((item.path, warning))
            continue
        good.append(item)
        decoded.append(replace(image, warning="; ".join(filter(None, (image.warning, warning)))))
    return Inspection(good, decoded, quarantined)


def duplicates_in_test(inspection: Inspection) -> list[tuple[str, str]]:
    """Return pairs of paths of test images with the same pixels: the first such image, and each later one."""
    first: dict[str, str] = {}
    tested = [(item, image) for item, image in inspection.pairs if item.split in TEST]
    pairs = [(first.setdefault(image.pixels, item.path), item.path) for item, image in tested]
    return [(original, copy) for original, copy in pairs if original != copy]


def near_duplicates(inspection: Inspection, bits: int) -> list[tuple[str, str, int]]:
    """Find, for each test image, the training image that looks most like it, mirrored or not.

    Flat images and exact duplicates are left out.

    Args:
        bits: Bits of 64 in which the perceptual hashes of near duplicates may differ; below 0 nothing is searched.

    Returns:
        Path of the training image, path of the test image, and number of differing bits.
    """
    textured = [(item, image) for item, image in inspection.pairs if not image.flat]
    train = [(item, image) for item, image in textured if item.split not in TEST]
    if bits < 0 or not train:
        return []
    hashes = np.array([image.hashes[0] for _, image in train], np.uint64)
    exact = {image.pixels for _, image in train}
    pairs = []
    for item, image in textured:
        if item.split in TEST and image.pixels not in exact:
            distances = np.bitwise_count(hashes[:, None] ^ np.array(image.hashes, np.uint64)).min(axis=1)
            nearest = int(distances.argmin())
            if distances[nearest] <= bits:
                pairs.append((train[nearest][0].path, item.path, int(distances[nearest])))
    return pairs


def check_limits(inspection: Inspection, images: int, max_quarantined: float, max_leaked: float) -> None:
    """Check the shares of unusable images and of test images that are training images too.

    Args:
        images: Number of images of the data set, before the inspection.

    Raises:
        DataError: If a share exceeds its limit.
    """
    unusable = [f"{path} ({reason})" for path, reason in inspection.quarantined]
    if len(unusable) > max_quarantined * images:
        raise DataError(
            f"{len(unusable)} of {images} images are unusable, more than `data.max_quarantined` ({max_quarantined}): "
            f"{first_few(unusable)}; all are in quarantine.csv: replace them or raise the limit"
        )
    tested = sum(item.split in TEST for item in inspection.good)
    pairs = [f"{test} = {train}" for train, test in find_leaks(inspection)]
    if len(pairs) > max_leaked * tested:
        raise DataError(
            f"{len(pairs)} of {tested} test images are training images too, more than `data.max_leaked` "
            f"({max_leaked}): {first_few(pairs)}; remove them from one of the two, or raise the limit"
        )
