"""Check that an exported file reproduces its torch network; otherwise stage `export` fails and writes nothing."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config import Limits
from pipeline.export.embed import Embeddings, Images, PerChannel, Pixels, embed, embed_pixels, fixed_batch
from pipeline.inference.session import InferenceSession, open_session

log = logging.getLogger(__name__)

BATCH_SIZES = (1, 3, 8)
"""Batch sizes that must give the same embeddings as the default of `ParityCheck.embed`."""
MAX_BATCH_IMAGES = 4096
"""Test images that run at each of `BATCH_SIZES`; all of them run at the default batch size."""
ROUNDING_GAP = 1e-5
"""Two gallery images may swap ranks if their similarities differ by less: rounding explains that."""
MIN_COSINE_RESIZED = 0.999
"""Smallest allowed cosine between resizing in ONNX Runtime and in Pillow, whose pixels differ by at most one level."""


class ParityError(RuntimeError):
    """An exported file does not reproduce its torch network."""

    exit_code = 4


@dataclass(frozen=True)
class Reference:
    """Embeddings of the test images by the torch network that a file was exported from.

    Attributes:
        embeddings: (n, D).
        map: mAP of the embeddings, in [0, 1].
        nearest: (queries,) index of the nearest gallery image of each query.
        gap: (queries,) similarity of that image minus the similarity of the second nearest.
    """

    embeddings: Embeddings
    map: float
    nearest: npt.NDArray[np.int64]
    gap: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Parity:
    """Agreement of ONNX Runtime with torch.

    Attributes:
        min_cosine: Smallest cosine, over the test images, between the embeddings of both.
        map: mAP of the embeddings of ONNX Runtime, in [0, 1].
        embeddings: (n, D), by ONNX Runtime.
    """

    min_cosine: float
    map: float
    embeddings: Embeddings


@dataclass(frozen=True)
class ParityCheck:
    """Compares exported files with torch on the test images.

    Attributes:
        images: Images of the manifest.
        indices: (n,) indices of the test images in the manifest, queries first.
        queries: Number of queries; n if the protocol compares every image with all others.
        score: Computes the mAP of embeddings (n, D), in the order of `indices`.
        limits: Largest differences that pass.
    """

    images: Images
    indices: npt.NDArray[np.int64]
    queries: int
    mean: PerChannel
    std: PerChannel
    score: Callable[[Embeddings], float]
    limits: Limits

    def embed(self, session: InferenceSession) -> Embeddings:
        """Embed the test images with an exported file, (n, D)."""
        return embed(session, self.images, self.indices, self.mean, self.std)

    def embed_regrouped(self, session: InferenceSession) -> Iterator[tuple[str, slice, Embeddings]]:
        """Embed `batch_subset` of the test images in other batches than `embed` does.

        Yields:
            What is different, the subset, and its embeddings: for each of `BATCH_SIZES`, or, if the file fixes the
            batch, once with other neighbours.
        """
        subset, fixed = batch_subset(len(self.indices)), fixed_batch(session)
        indices = self.indices[subset]
        if fixed is None:
            for batch in BATCH_SIZES:
                yield f"batch {batch}", subset, embed(session, self.images, indices, self.mean, self.std, batch)
        else:
            moved = embed(session, self.images, np.roll(indices, 1), self.mean, self.std)
            yield f"batch {fixed}, other neighbours", subset, np.roll(moved, -1, axis=0)

    def reference(self, embeddings: Embeddings) -> Reference:
        """Evaluate the embeddings (n, D) of a torch network, once for all comparisons with it."""
        return Reference(embeddings, self.score(embeddings), *nearest_neighbours(embeddings, self.queries))

    def verify(self, name: str, content: bytes, reference: Reference) -> Parity:
        """Compare a file with its torch network on all test images.

        Raises:
            ParityError: If a limit is exceeded; the message names the file, the value and the limit.
        """
        parity = self.compare(name, reference, self.embed(open_session(content)))
        log.info("%s: mAP %.4f, smallest cosine with torch %.8f", name, parity.map, parity.min_cosine)
        return parity

    def verify_batches(self, name: str, content: bytes, reference: Reference) -> None:
        """Compare a file with its torch network in other batches; see `embed_regrouped`.

        The embeddings of torch stand in for the images outside the subset.

        Raises:
            ParityError: If an embedding depends on the batch.
        """
        for label, subset, part in self.embed_regrouped(open_session(content)):
            embeddings = reference.embeddings.copy()
            embeddings[subset] = part
            self.compare(f"{name}, {label}", reference, embeddings)

    def verify_resizing(self, name: str, resizing: bytes, core: bytes, originals: Iterable[Pixels]) -> float:
        """Compare a file with built-in resizing with Pillow's resizing followed by the file without.

        Args:
            name: Name of the file that resizes.
            resizing: Content of that file.
            core: Content of the file with float input.
            originals: Images (h, w, 3) of any size.

        Returns:
            Smallest cosine between the two embeddings of an image.

        Raises:
            ParityError: If it is below `MIN_COSINE_RESIZED`.
        """
        inside, outside = open_session(resizing), open_session(core)
        height, width = outside.get_inputs()[0].shape[2:]
        smallest = 1.0
        for original in originals:
            resized = Image.fromarray(original).resize((width, height), Image.Resampling.BILINEAR)
            pair = [
                embed_pixels(session, pixels[None], self.mean, self.std)
                for session, pixels in ((inside, original), (outside, np.asarray(resized)))
            ]
            cosine = float(cosines(*pair)[0])
            if not cosine >= MIN_COSINE_RESIZED:
                raise ParityError(
                    f"{name}: for an image of {original.shape[1]} x {original.shape[0]} pixels the cosine with "
                    f"Pillow's resizing is {cosine:.6f}; at least {MIN_COSINE_RESIZED} is required"
                )
            smallest = min(smallest, cosine)
        return smallest

    def compare(self, name: str, reference: Reference, embeddings: Embeddings) -> Parity:
        """Compare embeddings (n, D) with torch's by three measures: cosine, nearest neighbour and mAP.

        Raises:
            ParityError: If one of the three exceeds its limit.
        """
        if embeddings.shape != reference.embeddings.shape:
            raise ParityError(
                f"{name}: embeddings are {embeddings.shape} in ONNX Runtime and {reference.embeddings.shape} in torch"
            )
        cosine = cosines(reference.embeddings, embeddings)
        worst = int(np.argmin(cosine))  # argmin treats NaN as the smallest
        if not cosine[worst] >= self.limits.min_cosine:
            raise ParityError(
                f"{name}: cosine with torch is {cosine[worst]:.8f} for the image in row {self.indices[worst]} of the "
                f"manifest; `export.limits.min_cosine` requires {self.limits.min_cosine:g}; try another `export.opset`"
            )
        nearest, _ = nearest_neighbours(embeddings, self.queries)
        changed = np.flatnonzero((nearest != reference.nearest) & (reference.gap > ROUNDING_GAP))
        if len(changed):
            query = changed[0]
            raise ParityError(
                f"{name}: {len(changed)} of {self.queries} queries have another nearest image than in torch, such as "
                f"row {self.indices[query]} of the manifest, where the first led by {reference.gap[query]:.2e}"
            )
        score = self.score(embeddings)
        difference = abs(score - reference.map)
        if not difference <= self.limits.map_difference:
            raise ParityError(
                f"{name}: mAP is {score:.6f} in ONNX Runtime and {reference.map:.6f} in torch, {difference:.2e} apart; "
                f"`export.limits.map_difference` allows {self.limits.map_difference:g}"
            )
        return Parity(float(cosine[worst]), score, embeddings)


def batch_subset(images: int) -> slice:
    """Return every k-th test image so that at most `MAX_BATCH_IMAGES` remain, queries and gallery alike."""
    step = -(-images // MAX_BATCH_IMAGES)
    if step > 1:
        log.info("other batches are tested on one in %d of %d test images", step, images)
    return slice(None, None, step)


def nearest_neighbours(embeddings: Embeddings, queries: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Find the nearest gallery image of each query, and its lead over the second nearest.

    Args:
        embeddings: (n, D), L2-normalised, queries first.
        queries: Number of queries; if it is n, every image is compared with all others.

    Returns:
        Indices (queries,) of the nearest images; gaps (queries,) in similarity, infinite without a second image.
    """
    all_query = queries == len(embeddings)
    gallery = embeddings if all_query else embeddings[queries:]
    nearest, gap = np.zeros(queries, np.int64), np.full(queries, np.inf)
    for start in range(0, queries, 256):
        block = slice(start, min(start + 256, queries))
        similarity = (embeddings[block] @ gallery.T).astype(np.float64)
        rows = np.arange(len(similarity))
        if all_query:
            similarity[rows, np.arange(block.start, block.stop)] = -np.inf
        best = similarity.argmax(axis=1)
        first = similarity[rows, best]
        similarity[rows, best] = -np.inf
        nearest[block], gap[block] = best + (0 if all_query else queries), first - similarity.max(axis=1)
    return nearest, gap


def cosines(left: Embeddings, right: Embeddings) -> npt.NDArray[np.float64]:
    """Compute the cosines (n,) between corresponding rows of two (n, D) arrays, in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: npt.NDArray[np.float64] = np.einsum("nd,nd->n", a, b) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return result
