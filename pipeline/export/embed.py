"""Embeddings by an exported file, whichever input it takes."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.inference.session import INPUT, OUTPUT, InferenceSession
from pipeline.progress import track

Pixels = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]
Colour = tuple[float, ...]
"""A number for each channel (RGB), of pixels in [0, 1]."""


class Images(Protocol):
    """Pictures by their row in the manifest."""

    def batch(self, rows: npt.NDArray[np.int64]) -> Pixels:
        """Images (n, h, w, 3) of these rows, RGB."""


def embed_pixels(session: InferenceSession, pixels: Pixels, mean: Colour, std: Colour) -> Embeddings:
    """Embed pictures, (n, h, w, 3) uint8 RGB -> (n, D), of length 1.

    Args:
        session: Of a file that this package wrote; one that takes floats gets them normalised.
        pixels: Upright; a file that takes floats wants its own height and width.
        mean: That the file was trained with.
        std: Likewise.
    """
    feed = pixels if takes_pixels(session) else normalised(pixels, mean, std)
    found: Embeddings = session.run([OUTPUT], {INPUT: feed})[0]
    return found


def takes_pixels(session: InferenceSession) -> bool:
    """Whether a file resizes and normalises by itself."""
    return bool(session.get_inputs()[0].type == "tensor(uint8)")


def normalised(pixels: Pixels, mean: Colour, std: Colour) -> npt.NDArray[np.float32]:
    """What a file that takes floats wants: (n, h, w, 3) uint8 -> (n, 3, h, w) float32, the same bits as torch's."""
    channels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    found: npt.NDArray[np.float32] = (channels - scaled(mean)) / scaled(std)
    return found


def scaled(colour: Colour) -> npt.NDArray[np.float32]:
    """A colour for pixels up to 255, (3, 1, 1)."""
    found: npt.NDArray[np.float32] = (255 * np.array(colour, np.float64)).astype(np.float32)[:, None, None]
    return found


def embed(
    session: InferenceSession,
    images: Images,
    rows: npt.NDArray[np.int64],
    mean: Colour,
    std: Colour,
    batch: int = 32,
) -> Embeddings:
    """Embed images of a manifest.

    Args:
        session: Of a file that this package wrote.
        images: Where the pixels come from.
        rows: (n,) which images, n >= 1.
        mean: As in `embed_pixels`.
        std: Likewise.
        batch: Images at a time.

    Returns:
        (n, D) float32, of length 1.
    """
    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return np.concatenate(
        [
            embed_pixels(session, images.batch(chunk), mean, std)
            for chunk in track(chunks, total=len(chunks), label="embedding")
        ]
    )
