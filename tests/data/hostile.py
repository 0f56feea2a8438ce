"""Damaged, malicious and unusual files of data sets, and how each must be treated."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tests import layouts

GOOD, BAD, UNUSUAL = "good", "quarantined", "warning"
"""Usable; refused, with a reason; usable, with a warning."""


def encoded(kind: str, size: tuple[int, int] = (48, 48), seed: int = 0, mode: str = "RGB", **options: object) -> bytes:
    """Return the content of an image file with random pixels."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, rows: bytes = b"", *, depth: int = 8, colour: int = 2) -> bytes:
    """Return a PNG with this header and any content."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def large_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 70_000_000, zip=True)
    return encoded("PNG", pnginfo=text)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("JPEG", exif=exif)


def multi_frame(kind: str) -> bytes:
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (20, 20, 3), dtype=np.uint8)) for n in range(3)]
    sink = io.BytesIO()
    frames[0].save(sink, kind, save_all=True, append_images=frames[1:])
    return sink.getvalue()


def corrupt(content: bytes, at: float, by: bytes = b"\xff" * 8) -> bytes:
    start = int(at * len(content))
    return content[:start] + by + content[start + len(by) :]


def array(values: np.ndarray, kind: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(values).save(sink, kind)
    return sink.getvalue()


CONTENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.jpg": (lambda: b"", BAD),
    "one byte.jpg": (lambda: b"\xff", BAD),
    "cut early.jpg": (lambda: encoded("JPEG")[:200], BAD),
    "cut late.jpg": (lambda: encoded("JPEG")[:-40], BAD),
    "cut.png": (lambda: encoded("PNG")[:-40], BAD),
    "cut.webp": (lambda: encoded("WEBP")[:-40], BAD),
    "cut.gif": (lambda: encoded("GIF")[:-200], BAD),
    "cut.tif": (lambda: encoded("TIFF")[:-400], BAD),
    "cut.bmp": (lambda: encoded("BMP")[:-400], BAD),
    "wrong checksum.png": (lambda: corrupt(encoded("PNG"), 0.5), BAD),
    "zeros.jpg": (lambda: bytes(5000), BAD),
    "page.jpg": (lambda: b"<!DOCTYPE html><title>404</title>", BAD),
    "json.png": (lambda: b'{"error": "not found"}', BAD),
    "text.jpg": (lambda: "h\u00e4".encode() * 400, BAD),
    "drawing.svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', BAD),
    "archive.jpg": (lambda: b"PK\x03\x04" + bytes(200), BAD),
    "program.jpg": (lambda: b"\x7fELF" + bytes(200), BAD),
    "huge by its header.png": (lambda: png(60_000, 60_000), BAD),
    "huge.png": (lambda: png(7_100, 7_100, bytes(7_100 * (1 + 3 * 7_100))), BAD),
    "wide by its header.bmp": (lambda: encoded("BMP")[:18] + struct.pack("<ii", 10**6, 10**6) + bytes(500), BAD),
    "no pixels.png": (lambda: png(0, 0), BAD),
    "no width.png": (lambda: png(0, 40), BAD),
    "large text.png": (large_text, BAD),
    "program.eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop", BAD),
    "icon.ico": (lambda: encoded("ICO"), BAD),
    "deep.tif": (lambda: array(np.arange(400, dtype=np.int32).reshape(20, 20), "TIFF"), BAD),
    "floats.tif": (lambda: array(np.random.default_rng(0).random((20, 20), dtype=np.float32), "TIFF"), BAD),
    "large but allowed.png": (
        lambda: png(6_000, 6_000, b"".join(b"\0" + bytes([row % 256]) * 18_000 for row in range(6_000))),
        GOOD,
    ),
    "grey.png": (lambda: encoded("PNG", mode="L"), GOOD),
    "grey, 16 bits.png": (lambda: array(np.arange(0, 64_000, 160, dtype=np.uint16).reshape(20, 20), "PNG"), GOOD),
    "transparent.png": (lambda: encoded("PNG", mode="RGBA"), GOOD),
    "printed.jpg": (lambda: encoded("JPEG", mode="CMYK"), GOOD),
    "rotated.jpg": (lambda: rotated(6), GOOD),
    "invalid orientation.jpg": (lambda: rotated(99), GOOD),
    "progressive.jpg": (lambda: encoded("JPEG", progressive=True), GOOD),
    "with profile.jpg": (lambda: encoded("JPEG", icc_profile=os.urandom(200_000)), GOOD),
    "with a tail.jpg": (lambda: encoded("JPEG") + bytes(5000), GOOD),
    "narrow.png": (lambda: encoded("PNG", (400, 1)), GOOD),
    "CAPITALS.JPG": (lambda: encoded("JPEG"), GOOD),
    "one pixel.png": (lambda: encoded("PNG", (1, 1)), UNUSUAL),
    "black.png": (lambda: array(np.zeros((30, 30, 3), np.uint8), "PNG"), UNUSUAL),
    "png.jpg": (lambda: encoded("PNG"), UNUSUAL),
    "webp.jpeg": (lambda: encoded("WEBP"), UNUSUAL),
    "no ending": (lambda: encoded("JPEG"), UNUSUAL),
    "wrong ending.txt": (lambda: encoded("JPEG"), UNUSUAL),
    "moving.gif": (lambda: multi_frame("GIF"), UNUSUAL),
    "moving.webp": (lambda: multi_frame("WEBP"), UNUSUAL),
    "moving.png": (lambda: multi_frame("PNG"), UNUSUAL),
    "pages.tif": (lambda: multi_frame("TIFF"), UNUSUAL),
    "pair.mpo": (lambda: multi_frame("MPO"), UNUSUAL),
    "phone.jpg": (lambda: multi_frame("MPO"), GOOD),
}
"""Content and expected treatment by file name."""


def write(root: Path) -> dict[str, str]:
    """Write all files, and links and pipes; returns the expected treatment by path."""
    root.mkdir()
    for name, (make, _) in CONTENTS.items():
        (root / name).write_bytes(make())
    layouts.picture(root.parent / "outside.png", 1)
    layouts.picture(root / "inside.png", 2)
    (root / "link out.png").symlink_to(root.parent / "outside.png")
    (root / "link in.png").symlink_to("inside.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "nowhere.png").symlink_to("gone.png")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    layouts.picture(root / "-dash \u00fc\u4e16 \n.png", 4)
    layouts.picture(root / f"{'n' * 251}.png", 5)
    expected = {name: treatment for name, (_, treatment) in CONTENTS.items()}
    expected |= dict.fromkeys(("loop.png", "nowhere.png", "folder.png", "pipe.png", "gone.png"), BAD)
    expected |= dict.fromkeys(
        ("inside.png", "link in.png", "link out.png", "-dash \u00fc\u4e16 \n.png", f"{'n' * 251}.png"), GOOD
    )
    return expected
