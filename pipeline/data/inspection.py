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
from pipeline.data.manifest import TEST, UNLABELLED, Box, DataError, ImageWarning, Item, box_text, first_few
from pipeline.data.parallel import in_threads
from pipeline.progress import track

STRIP = 256
"""Rows of pixels that are copied at a time for hashing."""

FileState = tuple[int, int]
"""Size (bytes) and modification time (ns) of a file."""

WRONG_SUFFIX = "the suffix is not that of the format"
MORE_FRAMES = "only the first frame is used"
FLAT = "has only one colour"
CLIPPED = "the box leaves the image and is clipped"
TWO_IDENTITIES = "has the same pixels as an image of another identity"


@dataclass(frozen=True)
class DecodedImage:
    """Fingerprints of one image.

    Attributes:
        pixels: SHA-256 of size and decoded pixels.
        hashes: Perceptual hashes (64 bits) of the image and of its mirror image.
        state: Of the file, before it was decoded.
        flat: Whether the image has one colour, and so looks like every other flat image.
        warnings: (kind, detail) of what is unusual about the image.
    """

    pixels: str
    hashes: tuple[int, int]
    state: FileState | None
    flat: bool
    warnings: tuple[tuple[str, str], ...]


Pair = tuple[Item, DecodedImage]
_Result = tuple[Item, DecodedImage | str]
"""An item, its box clipped, with its fingerprints or the reason why it is unusable."""


@dataclass(frozen=True)
class Inspection:
    """The result of decoding every image.

    Attributes:
        good: Items that can be decoded, in their original order.
        decoded: The fingerprints of `good`, in the same order.
        quarantined: (name, reason) of the others.
    """

    good: list[Item]
    decoded: list[DecodedImage]
    quarantined: list[tuple[str, str]]

    @property
    def pairs(self) -> list[Pair]:
        """Usable items with their fingerprints."""
        return list(zip(self.good, self.decoded, strict=True))

    @property
    def warnings(self) -> list[ImageWarning]:
        """Warnings about images that are usable but unusual."""
        return [ImageWarning(item.name, *warning) for item, image in self.pairs for warning in image.warnings]


def inspect(items: Sequence[Item], root: Path) -> Inspection:
    """Decode every file completely (`Image.verify` misses truncated files), once for all of its parts."""
    parts: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        parts[item.path].append(item)

    def inspect_file(path: str) -> list[_Result]:
        try:
            return _decode(_regular_file(root / path), parts[path])
        except Exception as error:
            return [(item, _reason(error, root, path)) for item in parts[path]]

    good, decoded, quarantined = [], [], []
    by_file = track(in_threads(inspect_file, parts), len(parts), "inspecting images")
    results = dict(zip(parts, map(iter, by_file), strict=True))
    for written in items:
        item, result = next(results[written.path])
        if isinstance(result, str):
            quarantined.append((item.name, result))
        else:
            good.append(item)
            decoded.append(result)
    return Inspection(good, decoded, quarantined)


def _reason(error: Exception, root: Path, path: str) -> str:
    """Describe why a file cannot be used, without the folders around `root`."""
    if isinstance(error, FileNotFoundError):
        return "a link to nothing" if (root / path).is_symlink() else "there is no such file"
    if (root / path).is_symlink() and not (root / path).exists():
        return "a link that leads to itself"
    text = str(error)
    for place, shown in ((root / path, path), ((root / path).resolve(), path), (root.resolve(), "")):
        text = text.replace(str(place), shown)
    return f"{type(error).__name__}: {text}"


def _regular_file(path: Path) -> Path:
    """Follow links, and check that a regular file is at their end: opening a pipe would block for ever."""
    resolved = path.resolve(strict=True)
    if not stat.S_ISREG(resolved.stat().st_mode):
        raise DataError("is not a regular file")
    return resolved


def _decode(path: Path, items: Sequence[Item]) -> list[_Result]:
    """Decode one file, and take the fingerprints of its parts; raises whatever the decoder raises."""
    state, suffix = _state(path), Path(items[0].path).suffix.lower()  # links to a cache end at names without a suffix
    with open_image(path) as image:
        actual_format, frames = image.format or "", int(getattr(image, "n_frames", 1))
        warnings = []
        if actual_format == "MPO":  # phones: a JPEG picture, followed by previews or a gain map
            actual_format, frames = "JPEG", 1
        if Image.registered_extensions().get(suffix) != actual_format:
            warnings.append((WRONG_SUFFIX, f"is {actual_format}"))
        if frames > 1:
            warnings.append((MORE_FRAMES, f"of {frames}"))
        rgb = upright_rgb(image)
        results = [_fingerprint(item, rgb, state, warnings) for item in items]
        del rgb  # frees the memory of a large image before the next one is decoded
    return results


def _fingerprint(item: Item, rgb: Image.Image, state: FileState | None, warnings: list[tuple[str, str]]) -> _Result:
    """Take the fingerprints of one part of a decoded image; the box is clipped to the image."""
    if item.box:
        left, top, right, bottom = item.box
        box = max(left, 0), max(top, 0), min(right, rgb.width), min(bottom, rgb.height)
        if box[0] >= box[2] or box[1] >= box[3]:
            return item, f"the box has no area inside of the upright image of {rgb.width} x {rgb.height} pixels"
        if box != item.box:
            size = f"{box_text(item.box)} in {rgb.width} x {rgb.height} pixels"
            item, warnings = replace(item, box=box), [*warnings, (CLIPPED, size)]
        rgb = rgb.crop(box)
    pixels = hashlib.sha256(repr(rgb.size).encode())
    for top in range(0, rgb.height, STRIP):
        pixels.update(rgb.crop((0, top, rgb.width, min(top + STRIP, rgb.height))).tobytes())
    flat = all(high - low <= 1 for low, high in rgb.getextrema())  # type: ignore[misc]
    if flat:
        warnings = [*warnings, (FLAT, "")]
    small = rgb.convert("L").resize((32, 32), Image.Resampling.LANCZOS)  # the first step of `imagehash.phash`
    hashes = (_perceptual_hash(small), _perceptual_hash(ImageOps.mirror(small)))
    return item, DecodedImage(pixels.hexdigest(), hashes, state, flat, tuple(warnings))


def _state(path: Path) -> FileState | None:
    """Return the state of a file; None if it does not exist."""
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
    states = {item.path: image.state for item, image in inspection.pairs}
    return [path for path, state in states.items() if _state(root / path) != state]


def _is_training(item: Item) -> bool:
    """Return whether an image is of training or validation, which may not be divided yet."""
    return item.split not in (*TEST, UNLABELLED)


def find_leaks(inspection: Inspection) -> list[tuple[str, str]]:
    """Return pairs of names (training image, test image) with the same pixels.

    Duplicates within the test set are no leaks: VeRi-776's queries are in its gallery too.
    """
    trained = {image.pixels: item.name for item, image in inspection.pairs if _is_training(item)}
    return [
        (trained[image.pixels], item.name)
        for item, image in inspection.pairs
        if item.split in TEST and image.pixels in trained
    ]


def deduplicate(inspection: Inspection) -> Inspection:
    """Quarantine training images whose pixels occur under several identities.

    Such test images are kept with a warning: without them, mAP would not be comparable with published results. Copies
    among the unlabelled images, or of training images, are kept too: they contradict no label, and a copy is only drawn
    more often.
    """
    claims: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for item, image in inspection.pairs:
        if item.split != UNLABELLED:
            claims[image.pixels, item.split in TEST].add(item.identity)
    good, decoded, quarantined = [], [], list(inspection.quarantined)
    for item, image in inspection.pairs:
        is_test = item.split in TEST
        others = set() if item.split == UNLABELLED else claims[image.pixels, is_test] - {item.identity}
        if others and not is_test:
            quarantined.append((item.name, f"{TWO_IDENTITIES}: {first_few(sorted(others))}"))
            continue
        good.append(item)
        more = ((TWO_IDENTITIES, first_few(sorted(others))),) if others else ()
        decoded.append(replace(image, warnings=(*image.warnings, *more)))
    return Inspection(good, decoded, quarantined)


def duplicates_in_test(inspection: Inspection) -> list[tuple[str, str]]:
    """Return pairs of names of test images with the same pixels: the first such image, and each later one."""
    first: dict[str, str] = {}
    tested = [(item, image) for item, image in inspection.pairs if item.split in TEST]
    pairs = [(first.setdefault(image.pixels, item.name), item.name) for item, image in tested]
    return [(original, copy) for original, copy in pairs if original != copy]


def near_duplicates(inspection: Inspection, bits: int) -> list[tuple[str, str, int]]:
    """Find, for each test image, the training image that looks most like it, mirrored or not.

    Flat images and exact duplicates are left out.

    Args:
        bits: Bits of 64 in which the perceptual hashes of near duplicates may differ; below 0 nothing is searched.

    Returns:
        Name of the training image, name of the test image, and number of differing bits.
    """
    training = [(item, image) for item, image in inspection.pairs if _is_training(item)]
    tested = [(item, image) for item, image in inspection.pairs if item.split in TEST]
    return _look_alikes(training, tested, bits)


def unlabelled_copies(inspection: Inspection, bits: int) -> list[tuple[str, str, int | None]]:
    """Find the unlabelled images that have the pixels of a test or validation image, or look like one, mirrored or not.

    Args:
        inspection: With the splits of the manifest.
        bits: See `near_duplicates`; below 0, only equal pixels count.

    Returns:
        Name of the test or validation image, name of the unlabelled image, and number of differing bits, None if all
        pixels are equal.
    """
    evaluated = [(item, image) for item, image in inspection.pairs if item.split not in ("train", UNLABELLED)]
    unlabelled = [(item, image) for item, image in inspection.pairs if item.split == UNLABELLED]
    names = {image.pixels: item.name for item, image in evaluated}
    equal = [(names[image.pixels], item.name, None) for item, image in unlabelled if image.pixels in names]
    return [*equal, *_look_alikes(evaluated, unlabelled, bits)]


def unlabelled_overlaps(inspection: Inspection) -> list[tuple[str, str]]:
    """Find the unlabelled images that show a part of the same file as a test or validation image.

    Args:
        inspection: With the splits of the manifest.

    Returns:
        Names of the test or validation image and of the unlabelled image.
    """
    evaluated: dict[str, list[Item]] = defaultdict(list)
    for item in inspection.good:
        if item.split not in ("train", UNLABELLED):
            evaluated[item.path].append(item)
    pairs = []
    for item in inspection.good:
        if item.split == UNLABELLED:
            known = next((other for other in evaluated.get(item.path, ()) if _overlap(item.box, other.box)), None)
            if known is not None:
                pairs.append((known.name, item.name))
    return pairs


def _overlap(first: Box | None, second: Box | None) -> bool:
    """Return whether two parts of a file share a pixel; None is the whole file."""
    if first is None or second is None:
        return True
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _look_alikes(references: Sequence[Pair], images: Sequence[Pair], bits: int) -> list[tuple[str, str, int]]:
    """Return the names of reference and image, and the differing bits, for images that look like a reference.

    20,000 references and 100,000 images take 4 s: a row of hashes for one image fits into the processor's cache.
    """
    references = [(item, image) for item, image in references if not image.flat]
    if bits < 0 or not references:
        return []
    hashes = np.array([image.hashes[0] for _, image in references], np.uint64)
    exact = {image.pixels for _, image in references}
    pairs = []
    for item, image in images:
        if not image.flat and image.pixels not in exact:
            distances = np.bitwise_count(hashes ^ np.array(image.hashes, np.uint64)[:, None]).min(axis=0)
            nearest = int(distances.argmin())
            if distances[nearest] <= bits:
                pairs.append((references[nearest][0].name, item.name, int(distances[nearest])))
    return pairs


def check_limits(inspection: Inspection, listed: Sequence[Item], max_quarantined: float, max_leaked: float) -> None:
    """Check the shares of unusable images and of test images that are training images too.

    Unusable images count among those with labels and among those without: many of one kind must not hide the other.

    Args:
        listed: Images of the data set, before the inspection.

    Raises:
        DataError: If a share exceeds its limit.
    """
    unlabelled = {item.name for item in listed if item.split == UNLABELLED}
    for kind, images in (("", len(listed) - len(unlabelled)), (f"{UNLABELLED} ", len(unlabelled))):
        unusable = [
            f"{name} ({reason})" for name, reason in inspection.quarantined if (name in unlabelled) == bool(kind)
        ]
        if len(unusable) > max_quarantined * images:
            raise DataError(
                f"{len(unusable)} of {images} {kind}images are unusable, more than `data.max_quarantined` "
                f"({max_quarantined}): {first_few(unusable)}; all are in quarantine.csv: replace them or raise "
                "the limit"
            )
    tested = sum(item.split in TEST for item in inspection.good)
    pairs = [f"{test} = {train}" for train, test in find_leaks(inspection)]
    if len(pairs) > max_leaked * tested:
        raise DataError(
            f"{len(pairs)} of {tested} test images are training images too, more than `data.max_leaked` "
            f"({max_leaked}): {first_few(pairs)}; remove them from one of the two, or raise the limit"
        )
