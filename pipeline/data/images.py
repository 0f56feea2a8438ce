"""Decode image files, and cache the decoded images of a manifest.

The preprocessing is the same everywhere: EXIF orientation, RGB, antialiased bilinear resize.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps

from pipeline.config import Params
from pipeline.data.manifest import Box, DataError, Indices, Manifest
from pipeline.data.parallel import in_threads
from pipeline.files import Files, write_atomically
from pipeline.progress import track

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 50_000_000
"""Images with more pixels are refused by their header: a small file can decompress to gigabytes."""
MAX_BYTES = 500_000_000
"""Larger files are refused unread: some decoders read the whole file into memory."""
LARGE = 4_000_000
"""Images with more pixels are decoded one at a time, so that memory holds one of them, not one per thread."""
Image.init()
FORMATS = tuple(sorted({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN)))
"""Supported formats, as far as this Pillow was built with them. Pillow's others start programs (EPS) or decode before
their size is known (ICO)."""

_LARGE_IMAGE = threading.Lock()


PLAIN = ("RGB", "RGBX", "1", "L", "P", "CMYK", "YCbCr", "HSV")
"""Modes that Pillow converts to RGB correctly (Adobe's inverted CMYK included), unless they have transparency."""
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
"""Modes of 16-bit grey; the upper eight bits are used."""
SHALLOW = 2**12
"""A 16-bit image whose values are all smaller was scaled to fewer bits: its upper eight bits would be almost black."""
WHITE = (255, 255, 255)
"""Background of transparent images."""


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file and check its header, without decoding; large images are opened one at a time.

    Raises:
        DataError: If it is too large.
        OSError: If its format is not one of `FORMATS`.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise DataError(f"{size} bytes exceed {MAX_BYTES}")
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"{width} x {height} pixels exceed {MAX_PIXELS}; make it smaller")
        with _LARGE_IMAGE if width * height > LARGE else nullcontext():
            yield image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode the first frame completely, apply its EXIF orientation and convert it to RGB; `image` is modified.

    Raises:
        DataError: If its mode has no unambiguous conversion to RGB.
        OSError: If it is truncated or damaged (decoders may raise other exceptions too).
    """
    if not (image.mode in PLAIN or image.mode in DEEP or image.mode == "LAB" or image.has_transparency_data):
        raise DataError(f"mode {image.mode} has no defined colours; convert it to 8 bits a channel")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB by mode: `convert` alone silently drops transparency and clips 16-bit values."""
    if image.mode in DEEP:
        values = np.asarray(image)
        if 0 < values.max() < SHALLOW:
            raise DataError(f"mode {image.mode} with values up to {values.max()} only; scale it to 8 bits a channel")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        if converted is None:
            raise DataError("mode LAB cannot be converted; convert it to RGB")
        return converted
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGB", rgba.size, WHITE)
        background.paste(rgba, mask=rgba.getchannel("A"))
        return background
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(path: Path, size: tuple[int, int], box: Box | None = None) -> Pixels:
    """Decode an image, or a part of it, and resize it to (height, width); returns (height, width, 3) uint8."""
    return decode_parts(path, size, [box])[0]


def decode_parts(path: Path, size: tuple[int, int], boxes: Sequence[Box | None]) -> list[Pixels]:
    """Decode an image once, and resize each of its parts to (height, width); None stands for the whole image."""
    height, width = size
    with open_image(path) as image:
        rgb = upright_rgb(image)
        parts = (rgb.crop(box) if box else rgb for box in boxes)
        return [np.asarray(part.resize((width, height), Image.Resampling.BILINEAR)) for part in parts]  # antialiased


def build_cache(manifest: Manifest, size: tuple[int, int], path: Path) -> None:
    """Write all images as one array (N, height, width, 3) uint8 to a .npy file, in the manifest's order."""
    files: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(manifest.items):
        files[item.path].append(index)

    def read(path: str) -> list[Pixels]:
        return decode_parts(manifest.root / path, size, [manifest.items[index].box for index in files[path]])

    def write(temporary: Path) -> None:
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(manifest), *size, 3))
        images = track(in_threads(read, files), len(files), "caching images")
        for indices, parts in zip(files.values(), images, strict=True):
            for index, part in zip(indices, parts, strict=True):
                array[index] = part
        array.flush()

    write_atomically(path, write)


class Images:
    """The decoded images of a manifest, by index, from the cache or from their files.

    Args:
        size: (height, width), pixels.
        cache: File written by `build_cache`, or None to decode the files.

    Raises:
        FileNotFoundError: If the cache does not exist.
        DataError: If the cache has another number of images or another size.
    """

    def __init__(self, manifest: Manifest, size: tuple[int, int], cache: Path | None) -> None:
        self.manifest, self.size, self.cache = manifest, size, cache
        self._array = None if cache is None else self._open(cache)

    def __len__(self) -> int:
        return len(self.manifest)

    def batch(self, indices: Indices | Sequence[int]) -> Pixels:
        """Return images (n, height, width, 3) uint8, a copy."""
        if self.cache is not None:
            if self._array is None:
                self._array = self._open(self.cache)
            return np.asarray(self._array[np.asarray(indices, np.int64)])
        batch = np.empty((len(indices), *self.size, 3), np.uint8)
        for position, index in enumerate(indices):
            item = self.manifest.items[index]
            batch[position] = decode(self.manifest.root / item.path, self.size, item.box)
        return batch

    def original(self, index: int) -> Pixels:
        """Decode an image from its file, without resizing; returns (h, w, 3) uint8."""
        item = self.manifest.items[index]
        with open_image(self.manifest.root / item.path) as image:
            rgb = upright_rgb(image)
            return np.asarray(rgb.crop(item.box) if item.box else rgb)

    def _open(self, cache: Path) -> Pixels:
        try:
            array: Pixels = np.load(cache, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{cache} is missing; run `dvc repro prepare` or `dvc pull` first") from error
        expected = (len(self.manifest), *self.size, 3)
        if array.shape != expected or array.dtype != np.uint8:
            raise DataError(f"{cache} holds {array.shape} {array.dtype}, not {expected} uint8; run prepare again")
        return array

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would copy every pixel to each worker process; the worker opens the file instead.
        return {**self.__dict__, "_array": None}


def data_root(files: Files, params: Params) -> Path:
    """Return the folder that the paths of the manifest are relative to."""
    return files.vehicles if params.data.source == "vehicles" else files.root / params.data.root


def open_images(files: Files, params: Params) -> tuple[Manifest, Images]:
    """Open the manifest and the images that stage `prepare` wrote.

    Raises:
        FileNotFoundError: If the stage has not run.
        DataError: If its outputs do not fit together or do not fit `data.image_size`.
    """
    manifest = Manifest.read(files.manifest, data_root(files, params))
    height, width = params.data.image_size
    return manifest, Images(manifest, (height, width), files.image_cache if params.data.cache else None)
