"""How fast, and in how little memory, a retrieval is scored.

2,000 queries to 500,000 images; then, at the size of VeRi-776 (1,678 queries, 11,579 images, 512 dimensions), side by
side in one run: this project; the classic loop (argsort of all similarities, then every query by itself, as in public
toolkits); rank by rank (Market-1501's official script, in Python); and one argsort with all else vectorised.
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
    """Identities as centres with noise around them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((identities, dim), dtype=np.float32)
    found = []
    for count in (queries, gallery):
        ids = rng.integers(0, identities, count)
        vectors = np.empty((count, dim), np.float32)
        for start in range(0, count, 10_000):  # so that memory's peak is not that of making them
            part = slice(start, start + 10_000)
            vectors[part] = centres[ids[part]]
            vectors[part] += noise * rng.standard_normal(vectors[part].shape, dtype=np.float32)
        found.append(Side(vectors, ids.astype(str), rng.integers(0, CAMERAS, count).astype(str)))
    return found[0], found[1]


def numbers(side: Side) -> Side:
    """The same with whole numbers for labels."""
    identities, cameras = (np.asarray(labels).astype(np.int64) for labels in (side.identities, side.cameras))
    return Side(side.vectors, identities, cameras)  # type: ignore[arg-type]


def seen_by(side: Side) -> npt.NDArray[np.str_]:
    """Its cameras."""
    return np.asarray(side.cameras)


def unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """At length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def classic(query: Side, gallery: Side) -> float:
    """Argsort of the whole matrix, then a loop over the queries in NumPy."""
    order = np.argsort(1 - unit(query.vectors) @ unit(gallery.vectors).T, axis=1)
    matches = (gallery.identities[order] == query.identities[:, None]).astype(np.int32)
    found = []
    for row in range(len(query.identities)):
        keep = ~matches[row].astype(bool) | (seen_by(gallery)[order[row]] != seen_by(query)[row])
        hits = matches[row][keep]
        if hits.any():
            precision = hits.cumsum() / (np.arange(len(hits)) + 1.0)
            found.append((precision * hits).sum() / hits.sum())
    return float(np.mean(found))


def rank_by_rank(query: Side, gallery: Side) -> float:
    """The official script's way: down each ranked list until the last positive."""
    similarity, found = unit(query.vectors) @ unit(gallery.vectors).T, []
    for row in range(len(query.identities)):
        order = np.argsort(-similarity[row])
        same = gallery.identities == query.identities[row]
        mine = seen_by(gallery) == seen_by(query)[row]
        good, junk = set(np.flatnonzero(same & ~mine).tolist()), set(np.flatnonzero(same & mine).tolist())
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
            found.append(total / len(good))
    return float(np.mean(found))


def argsorted(query: Side, gallery: Side) -> float:
    """One argsort a block of queries, everything else by whole arrays."""
    left, right, found = unit(query.vectors), unit(gallery.vectors), []
    _, codes = np.unique(np.concatenate([gallery.identities, query.identities]), return_inverse=True)
    _, seen = np.unique(np.concatenate([seen_by(gallery), seen_by(query)]), return_inverse=True)
    count = len(gallery.identities)
    for start in range(0, len(left), 256):
        rows = slice(count + start, count + min(start + 256, len(left)))
        order = np.argsort(-(left[start : start + 256] @ right.T), axis=1)
        hits = codes[:count][order] == codes[rows][:, None]
        out = hits & (seen[:count][order] == seen[rows][:, None])
        position = np.cumsum(~out, axis=1)
        hits &= ~out
        total = hits.sum(axis=1)
        precision = np.cumsum(hits, axis=1) / np.maximum(position, 1)
        found.append(((precision * hits).sum(axis=1) / np.maximum(total, 1))[total > 0])
    return float(np.concatenate(found).mean())


def ours(query: Side, gallery: Side) -> float:
    """This project's mAP."""
    return evaluate("market", query, gallery).map


WAYS: dict[str, Callable[[Side, Side], float]] = {
    "this project": ours,
    "argsort, vectorised": argsorted,
    "classic loop": classic,
    "rank by rank": rank_by_rank,
}


def side_by_side(noise: float) -> None:
    """All ways in turn, at the size of VeRi-776."""
    query, gallery = sides(QUERIES, GALLERY, DIM, IDENTITIES, noise)
    numbered = [numbers(side) for side in (query, gallery)]  # as toolkits have labels: text would slow them down
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    values = {}
    for _ in range(REPEATS):
        for name, way in WAYS.items():
            started = time.perf_counter()
            values[name] = way(query, gallery) if way is ours else way(*numbered)
            seconds[name].append(time.perf_counter() - started)
    print(f"{QUERIES} x {GALLERY} x {DIM}, mAP {values['this project']:.4f}")
    for name, taken in seconds.items():
        agrees = abs(values[name] - values["this project"]) < 1e-5
        ratio = median([a / b for a, b in zip(taken, seconds["this project"], strict=True)])
        print(f"  {name:20} {median(taken):7.3f} s  {ratio:6.1f} times  same mAP: {agrees}")


def large() -> None:
    """Time and memory where others run out of it."""
    queries, count, dim = LARGE
    query, gallery = sides(queries, count, dim, count // 20, 3.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    score = ours(query, gallery)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gib = (after - before) / 2**20
    print(f"{queries} x {count} x {dim}: {seconds:.1f} s, {gib:.2f} GiB above the inputs, mAP {score:.4f}")


def main() -> None:
    """The large one first: its memory must not hide in what was used before."""
    large()
    for noise in (2.0, 3.0):
        side_by_side(noise)


if __name__ == "__main__":
    main()
