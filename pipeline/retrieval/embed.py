"""Embed images with a torch network, and score it."""

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
    indices: Indices,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    batch: int = 128,
) -> npt.NDArray[np.float32]:
    """Embed images with a torch network in eval mode; each module is back in its previous mode afterwards.

    Args:
        net: Network on `device` that returns an object with `.embedding` (B, D).
        indices: (n,) images to embed.
        preprocess: Maps uint8 (B, 3, h, w) to the network's float input.
        batch: Images in a batch.

    Returns:
        (n, D) float32, L2-normalised.
    """
    chunks = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    embeddings = []
    with _eval_mode(net), torch.inference_mode():
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
    """Score a torch network on two splits of the manifest; for the other arguments see `embed`.

    Raises:
        ValueError: If an embedding is not finite, naming its image, or no query has a match.
    """

    def embedder(indices: Indices) -> npt.NDArray[np.float32]:
        return embed(net, images, indices, preprocess, device, batch)

    return evaluate_embedder(embedder, manifest, query_split, gallery_split, protocol)


@contextmanager
def _eval_mode(net: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, and restore the mode of each module: `net.train()` would unfreeze frozen norms."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
