"""Decoded images: the one way from a file to pixels, and a cache of all of them.

Preprocessing is the same everywhere: EXIF orientation, RGB, antialiased bilinear resize.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps

from pipeline.config import Params
from pipeline.data.manifest import DataError, Indices, Manifest
from pipeline.data.parallel import in_threads
from pipeline.files import Files, write_atomically
from pipeline.progress import track

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 50_000_000
"""Larger images are refused from their header alone: a small file can unpack to gigabytes."""
MAX_BYTES = 500_000_000
"""Larger files are refused unread: some readers take them into memory as a whole."""
LARGE = 4_000_000
"""Images of more pixels are decoded one at a time, so that memory holds one of them and not one a processor."""
Image.init()
FORMATS = tuple(sorted({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & set(Image.OPEN)))
"""What is read, as far as Pillow was built with it. Others start programs (EPS) or decode before their size is known
(ICO)."""

_ALONE = threading.Lock()


PLAIN = ("RGB", "RGBX", "1", "L", "P", "CMYK", "YCbCr", "HSV")
"""Modes that Pillow converts as they are meant (Adobe's inverted CMYK included), unless something is transparent."""
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
"""Grey with 16 bits: their upper eight count."""
SHALLOW = 2**12
"""Deep images without larger values hold fewer bits, of which hardly any would be left."""
WHITE = (255, 255, 255)
"""What shows through where an image is transparent."""


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file whose header is judged and whose pixels are not decoded yet; large ones one at a time.

    Raises:
        DataError: If it is too large.
        OSError: If it is none that is read (`FORMATS`).
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise DataError(f"{size} bytes exceed {MAX_BYTES}")
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"{width} x {height} pixels exceed {MAX_PIXELS}; make it smaller")
        with _ALONE if width * height > LARGE else nullcontext():
            yield image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an image in full, upright and in RGB; of several frames the first. The given one is used up.

    Raises:
        DataError: If its mode has no plain meaning.
        OSError: If it cannot be decoded to the end (the decoder may raise others too).
    """
    if not (image.mode in PLAIN or image.mode in DEEP or image.mode == "LAB" or image.has_transparency_data):
        raise DataError(f"mode {image.mode} has no plain meaning as colours; convert it to 8 bits a channel")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert by mode: Pillow alone would drop transparency, and most of the values of deep ones, without a word."""
    if image.mode in DEEP:
        values = np.asarray(image)
        if 0 < values.max() < SHALLOW:
            raise DataError(f"mode {image.mode} with values up to {values.max()} only; scale it to 8 bits a channel")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        colours = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *colours, outputMode="RGB")
        if converted is None:
            raise DataError("colours of mode LAB cannot be converted; convert it to RGB")
        return converted
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        ground = Image.new("RGB", seen.size, WHITE)
        ground.paste(seen, mask=seen.getchannel("A"))
        return ground
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(path: Path, size: tuple[int, int]) -> Pixels:
    """Decode an image and resize it to (height, width); returns (height, width, 3) uint8."""
    height, width = size
    with opened(path) as image:
        return np.asarray(upright_rgb(image).resize((width, height), Image.Resampling.BILINEAR))  # antialiases


def build_cache(manifest: Manifest, size: tuple[int, int], path: Path) -> None:
    """Write all images as one array (N, height, width, 3) uint8 to a .npy file; row r is item r of the manifest."""
    paths = [manifest.root / item.path for item in manifest.items]

    def write(temporary: Path) -> None:
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(paths), *size, 3))
        images = in_threads(lambda image: decode(image, size), paths)
        for row, image in enumerate(track(images, len(paths), "caching images")):
            array[row] = image
        array.flush()

    write_atomically(path, write)


class Images:
    """The images of a manifest, by row, from the cache or else from their files.

    Args:
        manifest: Says which row is which image.
        size: Height and width, pixels.
        cache: What `build_cache` wrote, or None.

    Raises:
        FileNotFoundError: If the cache is not there.
        DataError: If the cache belongs to other images or another size.
    """

    def __init__(self, manifest: Manifest, size: tuple[int, int], cache: Path | None) -> None:
        self.manifest, self.size, self.cache = manifest, size, cache
        self._array = None if cache is None else self._open(cache)

    def __len__(self) -> int:
        return len(self.manifest)

    def batch(self, rows: Indices | Sequence[int]) -> Pixels:
        """Images (n, height, width, 3) uint8, a copy."""
        if self.cache is not None:
            if self._array is None:
                self._array = self._open(self.cache)
            return np.asarray(self._array[np.asarray(rows, np.int64)])
        batch = np.empty((len(rows), *self.size, 3), np.uint8)
        for place, row in enumerate(rows):
            batch[place] = decode(self.manifest.root / self.manifest.items[row].path, self.size)
        return batch

    def original(self, row: int) -> Pixels:
        """Image (h, w, 3) uint8 in its own size, decoded from its file."""
        with opened(self.manifest.root / self.manifest.items[row].path) as image:
            return np.asarray(upright_rgb(image))

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
        # A pickled memory map would carry every pixel to the worker; it opens the file itself.
        return {**self.__dict__, "_array": None}


def data_root(files: Files, params: Params) -> Path:
    """Folder that the paths of the manifest are relative to."""
    return files.vehicles if params.data.source == "vehicles" else files.root / params.data.root


def open_images(files: Files, params: Params) -> tuple[Manifest, Images]:
    """What stage `prepare` left: the manifest and its images.

    Raises:
        FileNotFoundError: If the stage has not run.
        DataError: If what it left is of another run.
    """
    manifest = Manifest.read(files.manifest, data_root(files, params))
    height, width = params.data.image_size
    return manifest, Images(manifest, (height, width), files.image_cache if params.data.cache else None)
