"""Embeddings by an exported file."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.inference.session import INPUT, OUTPUT, InferenceSession
from pipeline.progress import track


class Images(Protocol):
    """Pictures by their row in the manifest."""

    def batch(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Images (n, h, w, 3) of these rows, RGB."""


def embed(
    session: InferenceSession,
    images: Images,
    rows: npt.NDArray[np.int64],
    preprocess: Callable[[Tensor], Tensor],
    batch: int = 32,
) -> npt.NDArray[np.float32]:
    """Embed images with an exported file.

    Args:
        session: Of a file that this package wrote.
        images: Where the pixels come from.
        rows: (n,) which images.
        preprocess: From uint8 (B, 3, h, w) to the network's float input.
        batch: Images at a time.

    Returns:
        (n, D) float32, of length 1.
    """
    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    embeddings = []
    for chunk in track(chunks, total=len(chunks), label="embedding"):
        pixels = torch.from_numpy(images.batch(chunk)).permute(0, 3, 1, 2)  # (B, 3, h, w)
        embeddings.append(session.run([OUTPUT], {INPUT: preprocess(pixels).contiguous().numpy()})[0])
    return np.concatenate(embeddings)
