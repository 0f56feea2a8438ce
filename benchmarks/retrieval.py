"""Time and memory of computing mAP.

First 2,000 queries against 500,000 images. Then four implementations in turns, at the size of VeRi-776 (1,678 queries,
11,579 images, 512 dimensions): this project; the classic loop (argsort of all similarities, then one query at a time,
as in public toolkits); rank by rank (Market-1501's official script, in Python); and one vectorised argsort.
"""

import resource
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import numpy.typing as npt

from pipeline.retrieval.scoring import Side, evaluate

REPEATS = 5
QUERIES, GALLERY, DIM, IDENTITIES, CAMERAS = 1678, 11579, 512, 200, 20
LARGE = (2000, 500_000, 256)


def sides(queries: int, gallery: int, dim: int, identities: int, noise: float) -> tuple[Side, Side]:
    """Draw embeddings around one centre per identity."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((identities, dim), dtype=np.float32)
    result = []
    for count in (queries, gallery):
        ids = rng.integers(0, identities, count)
        vectors = np.empty((count, dim), np.float32)
        for start in range(0, count, 10_000):  # keeps the peak of memory below that of the evaluation
            part = slice(start, start + 10_000)
            vectors[part] = centres[ids[part]]
            vectors[part] += noise * rng.standard_normal(vectors[part].shape, dtype=np.float32)
        result.append(Side(vectors, ids.astype(str), rng.integers(0, CAMERAS, count).astype(str)))
    return result[0], result[1]


def numeric_labels(side: Side) -> Side:
    """Return a copy with integer labels, as toolkits have them: text would slow them down."""
    identities, camera_labels = (np.asarray(labels).astype(np.int64) for labels in (side.identities, side.cameras))
    return Side(side.vectors, identities, camera_labels)  # type: ignore[arg-type]


def cameras(side: Side) -> npt.NDArray[np.str_]:
    """Return the cameras as an array."""
    return np.asarray(side.cameras)


def unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Scale vectors to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def classic(query: Side, gallery: Side) -> float:
    """Compute mAP by an argsort of the whole matrix and a loop over the queries in NumPy."""
    order = np.argsort(1 - unit(query.vectors) @ unit(gallery.vectors).T, axis=1)
    matches = (gallery.identities[order] == query.identities[:, None]).astype(np.int32)
    precisions = []
    for row in range(len(query.identities)):
        keep = ~matches[row].astype(bool) | (cameras(gallery)[order[row]] != cameras(query)[row])
        hits = matches[row][keep]
        if hits.any():
            precision = hits.cumsum() / (np.arange(len(hits)) + 1.0)
            precisions.append((precision * hits).sum() / hits.sum())
    return float(np.mean(precisions))


def rank_by_rank(query: Side, gallery: Side) -> float:
    """Compute mAP like the official script: walk down each ranked list until the last positive."""
    similarity, precisions = unit(query.vectors) @ unit(gallery.vectors).T, []
    for row in range(len(query.identities)):
        order = np.argsort(-similarity[row])
        same = gallery.identities == query.identities[row]
        same_camera = cameras(gallery) == cameras(query)[row]
        good, junk = set(np.flatnonzero(same & ~same_camera).tolist()), set(np.flatnonzero(same & same_camera).tolist())
        hits, position, total = 0, 0, 0.0
        for image in order.tolist():
            if image in junk:
                continue
            position += 1
            if image in good:
                hits += 1
                total += hits / position
                if hits == len(good):
                    break
        if good:
            precisions.append(total / len(good))
    return float(np.mean(precisions))


def argsorted(query: Side, gallery: Side) -> float:
    """Compute mAP by one argsort per block of queries and array operations."""
    left, right, precisions = unit(query.vectors), unit(gallery.vectors), []
    _, codes = np.unique(np.concatenate([gallery.identities, query.identities]), return_inverse=True)
    _, camera_codes = np.unique(np.concatenate([cameras(gallery), cameras(query)]), return_inverse=True)
    count = len(gallery.identities)
    for start in range(0, len(left), 256):
        rows = slice(count + start, count + min(start + 256, len(left)))
        order = np.argsort(-(left[start : start + 256] @ right.T), axis=1)
        hits = codes[:count][order] == codes[rows][:, None]
        ignored = hits & (camera_codes[:count][order] == camera_codes[rows][:, None])
        position = np.cumsum(~ignored, axis=1)
        hits &= ~ignored
        total = hits.sum(axis=1)
        precision = np.cumsum(hits, axis=1) / np.maximum(position, 1)
        precisions.append(((precision * hits).sum(axis=1) / np.maximum(total, 1))[total > 0])
    return float(np.concatenate(precisions).mean())


def ours(query: Side, gallery: Side) -> float:
    """Compute mAP with this project."""
    return evaluate("market", query, gallery).map


IMPLEMENTATIONS: dict[str, Callable[[Side, Side], float]] = {
    "this project": ours,
    "argsort, vectorised": argsorted,
    "classic loop": classic,
    "rank by rank": rank_by_rank,
}


def side_by_side(noise: float) -> None:
    """Time all implementations in turns, at the size of VeRi-776."""
    query, gallery = sides(QUERIES, GALLERY, DIM, IDENTITIES, noise)
    numbered = [numeric_labels(side) for side in (query, gallery)]
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    values = {}
    for _ in range(REPEATS):
        for name, compute in IMPLEMENTATIONS.items():
            started = time.perf_counter()
            values[name] = compute(query, gallery) if compute is ours else compute(*numbered)
            seconds[name].append(time.perf_counter() - started)
    print(f"{QUERIES} x {GALLERY} x {DIM}, mAP {values['this project']:.4f}")
    for name, durations in seconds.items():
        agrees = abs(values[name] - values["this project"]) < 1e-5
        ratio = median([a / b for a, b in zip(durations, seconds["this project"], strict=True)])
        print(f"  {name:20} {median(durations):7.3f} s  {ratio:6.1f} times  same mAP: {agrees}")


def large() -> None:
    """Measure time and memory at a size where the other implementations run out of memory."""
    queries, count, dim = LARGE
    query, gallery = sides(queries, count, dim, count // 20, 3.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    score = ours(query, gallery)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gib = (after - before) / 2**20
    print(f"{queries} x {count} x {dim}: {seconds:.1f} s, {gib:.2f} GiB above the inputs, mAP {score:.4f}")


def main() -> None:
    """Run the large measurement first, because memory used before would hide its peak."""
    large()
    for noise in (2.0, 3.0):
        side_by_side(noise)


if __name__ == "__main__":
    main()
