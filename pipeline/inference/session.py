"""ONNX Runtime: the only place that imports it, after its telemetry is off."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, when the library is loaded

import numpy as np
import numpy.typing as npt
import torch
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from torch import Tensor

from pipeline.progress import track
from pipeline.runtime import available_threads

INPUT, OUTPUT = "image", "embedding"
"""Names of the one input and the one output of every exported file."""


class Images(Protocol):
    """Pictures by their row in the manifest."""

    def batch(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Images (n, h, w, 3) of these rows, RGB."""


def open_session(model: Path | bytes, threads: int = 0, profile: Path | None = None) -> InferenceSession:
    """Load an ONNX model on the CPU, with all of the graph's optimisations.

    Args:
        model: The file, or its content.
        threads: Intra-op threads; 0 for all that this process may use.
        profile: Start of the path of a profile to write; `end_profiling` tells the whole.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if isinstance(model, Path) and not model.is_file():
        raise FileNotFoundError(f"{model} is missing; run `dvc repro` or `dvc pull` first")
    options = SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])


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
