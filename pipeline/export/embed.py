"""Compute embeddings with an exported file, with or without built-in preprocessing."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.inference.session import INPUT, OUTPUT, InferenceSession
from pipeline.progress import track

Pixels = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]
PerChannel = tuple[float, ...]
"""A mean or standard deviation per channel (RGB), for pixels in [0, 1]."""


class Images(Protocol):
    """Decoded images of a manifest."""

    def batch(self, indices: npt.NDArray[np.int64]) -> Pixels:
        """Return the images (n, h, w, 3), RGB, at these indices of the manifest."""


def embed_pixels(session: InferenceSession, pixels: Pixels, mean: PerChannel, std: PerChannel) -> Embeddings:
    """Embed upright images with an exported file, (n, h, w, 3) uint8 RGB -> (n, D), L2-normalised.

    A model with float input needs images of its input size, which are normalised with `mean` and `std`. A file with a
    fixed batch is called as often as needed.
    """
    size = fixed_batch(session) or len(pixels)
    embeddings = []
    for start in range(0, len(pixels), size):
        batch = fill(pixels[start : start + size], size)
        feed = batch if has_preprocessing(session) else normalise_pixels(batch, mean, std)
        embeddings.append(session.run([OUTPUT], {INPUT: feed})[0])
    return np.concatenate(embeddings)[: len(pixels)]


def fixed_batch(session: InferenceSession) -> int | None:
    """Return the number of images that every call of a file takes; None if it takes any number."""
    size = session.get_inputs()[0].shape[0]
    return size if isinstance(size, int) else None


def fill(pixels: Pixels, size: int) -> Pixels:
    """Append copies of the last image until there are `size`, (n, h, w, 3) -> (size, h, w, 3), n >= 1."""
    return np.concatenate([pixels, np.repeat(pixels[-1:], size - len(pixels), axis=0)])


def has_preprocessing(session: InferenceSession) -> bool:
    """Return whether the model takes uint8 images of any size and resizes and normalises them itself."""
    return bool(session.get_inputs()[0].type == "tensor(uint8)")


def normalise_pixels(pixels: Pixels, mean: PerChannel, std: PerChannel) -> npt.NDArray[np.float32]:
    """Normalise images, (n, h, w, 3) uint8 -> (n, 3, h, w) float32; bit-identical to `data.augment.normalise`."""
    channels_first = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    normalised: npt.NDArray[np.float32] = (channels_first - scale_to_255(mean)) / scale_to_255(std)
    return normalised


def scale_to_255(values: PerChannel) -> npt.NDArray[np.float32]:
    """Convert a mean or standard deviation for pixels in [0, 1] to one for uint8 pixels, shape (3, 1, 1)."""
    scaled: npt.NDArray[np.float32] = (255 * np.array(values, np.float64)).astype(np.float32)[:, None, None]
    return scaled


def embed(
    session: InferenceSession,
    images: Images,
    indices: npt.NDArray[np.int64],
    mean: PerChannel,
    std: PerChannel,
    batch: int = 32,
) -> Embeddings:
    """Embed the images at `indices` (n,), n >= 1, of a manifest -> (n, D); see `embed_pixels`.

    Args:
        batch: Images in a call, unless the file fixes their number.
    """
    batch = fixed_batch(session) or batch
    chunks = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    return np.concatenate(
        [
            embed_pixels(session, images.batch(chunk), mean, std)
            for chunk in track(chunks, total=len(chunks), label="embedding")
        ]
    )
