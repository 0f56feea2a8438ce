"""Embeddings and scores of a network in torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.progress import track
from pipeline.retrieval.evaluate import Images, Indices, Manifest, evaluate_embedder
from pipeline.retrieval.metrics import Retrieval


def embed(
    net: nn.Module,
    images: Images,
    rows: Indices,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    batch: int = 128,
) -> npt.NDArray[np.float32]:
    """Embed images with a torch network.

    Args:
        net: Already on `device`; returns something with `.embedding` (B, D). Every module is in the mode that it was in
            when this returns.
        images: Where the pixels come from.
        rows: (n,) which images.
        preprocess: From uint8 (B, 3, h, w) to the network's float input.
        device: Where the network is.
        batch: Images at a time.

    Returns:
        (n, D) float32, of length 1.
    """
    chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    embeddings = []
    with _evaluating(net), torch.inference_mode():
        for chunk in track(chunks, total=len(chunks), label="embedding"):
            pixels = torch.from_numpy(images.batch(chunk)).to(device).permute(0, 3, 1, 2)  # (B, 3, h, w)
            embedding = net(preprocess(pixels).contiguous(memory_format=torch.channels_last)).embedding
            embeddings.append(nn.functional.normalize(embedding.float(), dim=1).cpu().numpy())
    return np.concatenate(embeddings)


def evaluate(
    net: nn.Module,
    manifest: Manifest,
    images: Images,
    query_split: str,
    gallery_split: str,
    protocol: str,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    batch: int = 128,
) -> Retrieval:
    """Score a torch network on two splits of the manifest; arguments as in `embed`.

    Raises:
        ValueError: If an embedding is not finite, naming its image, or no query has a match.
    """

    def embedder(rows: Indices) -> npt.NDArray[np.float32]:
        return embed(net, images, rows, preprocess, device, batch)

    return evaluate_embedder(embedder, manifest, query_split, gallery_split, protocol)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Put a network in eval mode and each module back into its own: `net.train()` would wake frozen ones."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
