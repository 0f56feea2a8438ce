"""Whether an exported file does what the network did: if not, there is no file."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.config import Gates
from pipeline.export.embed import Images, embed
from pipeline.inference.session import open_session

log = logging.getLogger(__name__)

BATCHES = (1, 3, 8)
"""Batch sizes that must give the same embeddings."""

Embeddings = npt.NDArray[np.float32]


class ParityError(RuntimeError):
    """An exported file does not do what the network did."""

    exit_code = 4


@dataclass(frozen=True)
class Probe:
    """What files are compared on.

    Attributes:
        images: Where the pixels come from.
        rows: (n,) the test images.
        preprocess: From uint8 (B, 3, h, w) to the network's float input.
        score: mAP of embeddings (n, D) of these rows.
        gates: What must hold.
    """

    images: Images
    rows: npt.NDArray[np.int64]
    preprocess: Callable[[Tensor], Tensor]
    score: Callable[[Embeddings], float]
    gates: Gates


@dataclass(frozen=True)
class Parity:
    """How close ONNX Runtime came to torch.

    Attributes:
        min_cosine: Smallest cosine between the two embeddings of an image.
        map: mAP of ONNX Runtime's embeddings.
        map_torch: mAP of torch's.
    """

    min_cosine: float
    map: float
    map_torch: float


def verify(name: str, content: bytes, reference: Embeddings, probe: Probe) -> Parity:
    """Compare a file with torch on all test images.

    Args:
        name: Of the file, for the message.
        content: Of the file.
        reference: (n, D) torch's embeddings of the probe's rows.
        probe: What to compare on.

    Raises:
        ParityError: If a gate does not hold, naming file, figure and bound.
    """
    found = embed(open_session(content), probe.images, probe.rows, probe.preprocess)
    parity = Parity(_check_cosines(name, reference, found, probe), probe.score(found), probe.score(reference))
    difference = abs(parity.map - parity.map_torch)
    if not difference <= probe.gates.map_difference:
        raise ParityError(
            f"{name}: mAP is {parity.map:.6f} in ONNX Runtime and {parity.map_torch:.6f} in torch, {difference:.2e} "
            f"apart; `export.gates.map_difference` allows {probe.gates.map_difference:g}"
        )
    log.info("%s: mAP %.4f, smallest cosine with torch %.8f", name, parity.map, parity.min_cosine)
    return parity


def verify_batches(name: str, content: bytes, reference: Embeddings, probe: Probe) -> None:
    """Run the first few test images in batches of 1, 3 and 8; arguments as in `verify`.

    Raises:
        ParityError: If an embedding depends on the batch that it is computed in.
    """
    session = open_session(content)
    few = slice(0, max(BATCHES))
    for batch in BATCHES:
        found = embed(session, probe.images, probe.rows[few], probe.preprocess, batch)
        _check_cosines(f"{name}, batch {batch}", reference[few], found, probe)


def cosines(left: Embeddings, right: Embeddings) -> npt.NDArray[np.float64]:
    """Cosines (n,) between the rows of two (n, D), in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: npt.NDArray[np.float64] = np.einsum("nd,nd->n", a, b) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return found


def _check_cosines(what: str, reference: Embeddings, found: Embeddings, probe: Probe) -> float:
    """Smallest cosine, if it is large enough."""
    if found.shape != reference.shape:
        raise ParityError(f"{what}: embeddings are {found.shape} in ONNX Runtime and {reference.shape} in torch")
    close = cosines(reference, found)
    worst = int(np.argmin(close))  # NaN counts as the smallest
    if not close[worst] >= probe.gates.min_cosine:
        raise ParityError(
            f"{what}: cosine with torch is {close[worst]:.8f} for the image in row {probe.rows[worst]} of the "
            f"manifest; `export.gates.min_cosine` asks for {probe.gates.min_cosine:g}; try another `export.opset`"
        )
    return float(close[worst])
