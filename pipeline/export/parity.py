"""Whether an exported file does what the network did: if not, there is no file."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config import Limits
from pipeline.export.embed import Colour, Embeddings, Images, Pixels, embed, embed_pixels
from pipeline.inference.session import InferenceSession, open_session

log = logging.getLogger(__name__)

BATCHES = (1, 3, 8)
"""Batch sizes that must give the same embeddings."""
PROBED = 4096
"""Test images that are run at each of them; all are run at one."""
NEAR = 1e-5
"""Gap of two similarities below which rounding may change places."""
RESIZED = 0.999
"""Smallest cosine where a file resizes by itself and Pillow does it otherwise: their last bits differ."""


class ParityError(RuntimeError):
    """An exported file does not do what the network did."""

    exit_code = 4


@dataclass(frozen=True)
class Probe:
    """What files are compared on.

    Attributes:
        images: Where the pixels come from.
        rows: (n,) the test images, queries first.
        queries: How many of them ask the others; where all do, each asks all others.
        mean: By channel (RGB), of pixels in [0, 1], for files that take floats.
        std: Likewise.
        score: mAP of embeddings (n, D) of these rows.
        limits: What must hold.
    """

    images: Images
    rows: npt.NDArray[np.int64]
    queries: int
    mean: Colour
    std: Colour
    score: Callable[[Embeddings], float]
    limits: Limits

    def embed(self, session: InferenceSession, rows: slice = slice(None), batch: int = 32) -> Embeddings:
        """What a file makes of the test images, or of some of them."""
        return embed(session, self.images, self.rows[rows], self.mean, self.std, batch)

    def reference(self, embeddings: Embeddings) -> "Reference":
        """Score torch's embeddings (n, D), once for all comparisons with them."""
        return Reference(embeddings, self.score(embeddings), *neighbours(embeddings, self.queries))


@dataclass(frozen=True)
class Reference:
    """Output of a torch network for the probe's images, which its files are compared with.

    Attributes:
        embeddings: (n, D).
        map: mAP of the embeddings.
        nearest: (queries,) row of the image nearest to each query.
        gap: (queries,) similarity of that image less that of the second nearest.
    """

    embeddings: Embeddings
    map: float
    nearest: npt.NDArray[np.int64]
    gap: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Parity:
    """How close ONNX Runtime came to torch.

    Attributes:
        min_cosine: Smallest cosine between the two embeddings of an image.
        map: mAP of ONNX Runtime's embeddings.
        embeddings: (n, D) of ONNX Runtime.
    """

    min_cosine: float
    map: float
    embeddings: Embeddings


def verify(name: str, content: bytes, reference: Reference, probe: Probe) -> Parity:
    """Compare a file with torch on all test images.

    Args:
        name: Of the file, for the message.
        content: Of the file.
        reference: Output of the network that the file was exported from.
        probe: What to compare on.

    Raises:
        ParityError: If a gate does not hold, naming file, figure and bound.
    """
    parity = _compare(name, reference, probe.embed(open_session(content)), probe)
    log.info("%s: mAP %.4f, smallest cosine with torch %.8f", name, parity.map, parity.min_cosine)
    return parity


def verify_batches(name: str, content: bytes, reference: Reference, probe: Probe) -> None:
    """Run test images in batches of 1, 3 and 8; arguments as in `verify`.

    Of more than `PROBED` every second, third ... one is run; torch's embeddings stand for the others.

    Raises:
        ParityError: If an embedding depends on the batch that it is computed in.
    """
    session, some = open_session(content), probed(len(reference.embeddings))
    for batch in BATCHES:
        found = reference.embeddings.copy()
        found[some] = probe.embed(session, some, batch)
        _compare(f"{name}, batch {batch}", reference, found, probe)


def probed(images: int) -> slice:
    """Indices of test images, queries first, that are run at each batch size: spread over all of them."""
    step = -(-images // PROBED)
    if step > 1:
        log.info("batches of %s are tried with one in %d of %d test images", BATCHES, step, images)
    return slice(None, None, step)


def verify_resizing(name: str, resizing: bytes, core: bytes, pictures: Iterable[Pixels], probe: Probe) -> float:
    """Compare a file that resizes with one that gets resized pictures.

    Args:
        name: Of the file that resizes.
        resizing: Its content.
        core: Content of the other.
        pictures: (h, w, 3) each, of any size.
        probe: Its mean and deviation count.

    Returns:
        Smallest cosine between the two embeddings of a picture.

    Raises:
        ParityError: If it is below `RESIZED`.
    """
    inside, outside = open_session(resizing), open_session(core)
    height, width = outside.get_inputs()[0].shape[2:]
    closest = 1.0
    for picture in pictures:
        resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
        pair = [
            embed_pixels(session, pixels[None], probe.mean, probe.std)
            for session, pixels in ((inside, picture), (outside, np.asarray(resized)))
        ]
        close = float(cosines(*pair)[0])
        if not close >= RESIZED:
            raise ParityError(
                f"{name}: for a picture of {picture.shape[1]} x {picture.shape[0]} pixels the cosine with Pillow's "
                f"resizing is {close:.6f}; {RESIZED} is asked for"
            )
        closest = min(closest, close)
    return closest


def neighbours(embeddings: Embeddings, queries: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Nearest other image of each query, and how far ahead of the next it is.

    Args:
        embeddings: (n, D), of length 1, queries first.
        queries: How many ask the others; where all do, each asks all others.

    Returns:
        Indices (queries,) of the nearest; similarity (queries,) less that of the second, infinite where there is none.
    """
    alone = queries == len(embeddings)
    asked = embeddings if alone else embeddings[queries:]
    nearest, gap = np.zeros(queries, np.int64), np.full(queries, np.inf)
    for start in range(0, queries, 256):
        block = slice(start, min(start + 256, queries))
        similarity = (embeddings[block] @ asked.T).astype(np.float64)
        rows = np.arange(len(similarity))
        if alone:
            similarity[rows, np.arange(block.start, block.stop)] = -np.inf
        best = similarity.argmax(axis=1)
        first = similarity[rows, best]
        similarity[rows, best] = -np.inf
        nearest[block], gap[block] = best + (0 if alone else queries), first - similarity.max(axis=1)
    return nearest, gap


def cosines(left: Embeddings, right: Embeddings) -> npt.NDArray[np.float64]:
    """Cosines (n,) between the rows of two (n, D), in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found: npt.NDArray[np.float64] = np.einsum("nd,nd->n", a, b) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return found


def _compare(what: str, reference: Reference, found: Embeddings, probe: Probe) -> Parity:
    """Compare embeddings with torch's: image by image, nearest neighbour by nearest neighbour, and in mAP.

    Raises:
        ParityError: If one of the three differs by more than is allowed.
    """
    if found.shape != reference.embeddings.shape:
        raise ParityError(
            f"{what}: embeddings are {found.shape} in ONNX Runtime and {reference.embeddings.shape} in torch"
        )
    close = cosines(reference.embeddings, found)
    worst = int(np.argmin(close))  # NaN counts as the smallest
    if not close[worst] >= probe.limits.min_cosine:
        raise ParityError(
            f"{what}: cosine with torch is {close[worst]:.8f} for the image in row {probe.rows[worst]} of the "
            f"manifest; `export.limits.min_cosine` asks for {probe.limits.min_cosine:g}; try another `export.opset`"
        )
    nearest, _ = neighbours(found, probe.queries)
    changed = np.flatnonzero((nearest != reference.nearest) & (reference.gap > NEAR))
    if len(changed):
        query = changed[0]
        raise ParityError(
            f"{what}: {len(changed)} of {probe.queries} queries find another image first than in torch, such as the "
            f"one in row {probe.rows[query]} of the manifest, where the first was {reference.gap[query]:.2e} ahead"
        )
    quality = probe.score(found)
    difference = abs(quality - reference.map)
    if not difference <= probe.limits.map_difference:
        raise ParityError(
            f"{what}: mAP is {quality:.6f} in ONNX Runtime and {reference.map:.6f} in torch, {difference:.2e} apart; "
            f"`export.limits.map_difference` allows {probe.limits.map_difference:g}"
        )
    return Parity(float(close[worst]), quality, found)
