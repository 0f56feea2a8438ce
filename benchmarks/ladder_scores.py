"""Compare the students of a ladder with their teacher: mAP with its standard error, and distances."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.augment import normalise
from pipeline.data.images import open_images
from pipeline.files import Files, csv_text, write_text
from pipeline.models import cost
from pipeline.retrieval import scoring
from pipeline.retrieval.embed import embed
from pipeline.retrieval.evaluate import sides

Vectors = npt.NDArray[np.float32]
Precisions = npt.NDArray[np.float64]


def read(table: Path) -> list[dict[str, str]]:
    """Read a CSV file; it is empty if it is missing."""
    if not table.is_file():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measure(files: Files, params: Params, student: str, precisions: Path) -> dict[str, str]:
    """Compare the cut student with its teacher, and add its average precisions to a table.

    Distances are means of 1 - cosine.
    """
    protocol, (height, width) = params.data.protocol, params.data.image_size
    manifest, images = open_images(files, params)
    seen = manifest.indices("train")
    unseen = np.concatenate([manifest.indices("query"), manifest.indices("gallery")])
    teacher, small = (checkpoint.load(files.artifacts(stage)) for stage in ("teacher", "surgery"))

    def mirrored(batch: Tensor) -> Tensor:
        return normalise(batch.flip(3))

    embeddings = [embed(net, images, unseen, normalise) for net in (teacher, small)]
    both = unit(embeddings[0] + embed(teacher, images, unseen, mirrored))
    scores = [
        scoring.evaluate(protocol, *sides(vectors, manifest, "query", "gallery", protocol))
        for vectors in (*embeddings, both)
    ]
    identities = manifest.identities(manifest.indices("query"))[scores[0].query]
    columns = {"teacher": scores[0].ap, student: scores[1].ap}
    queries, (of_teacher, of_student) = add_precisions(precisions, identities, columns)
    macs = [cost.macs(net.spec, (height, width)) for net in (teacher, small)]
    weights = [cost.params(net.spec) for net in (teacher, small)]
    return {
        "teacher_map": f"{scores[0].map:.5f}",
        "map": f"{scores[1].map:.5f}",
        "difference": f"{scores[1].map - scores[0].map:+.5f}",
        "standard_error": f"{standard_error(of_student - of_teacher, queries):.5f}",
        "distance_seen": f"{distance(*(embed(net, images, seen, normalise) for net in (teacher, small))):.4f}",
        "distance_unseen": f"{distance(*embeddings):.4f}",
        "distance_unseen_to_mirrored_mean": f"{distance(embeddings[1], both):.4f}",
        "teacher_with_mirror_map": f"{scores[2].map:.5f}",
        "macs_reduction": f"{1 - macs[1] / macs[0]:.4f}",
        "params_reduction": f"{1 - weights[1] / weights[0]:.4f}",
        "layer4_width": str(small.spec.widths["layer4"]),
    }


def add_precisions(
    path: Path, identities: npt.NDArray[np.str_], columns: Mapping[str, Precisions]
) -> tuple[npt.NDArray[np.int64], list[Precisions]]:
    """Average the average precision over the queries of each identity, and add the columns to a CSV file.

    Args:
        path: File with a line for each identity.
        identities: (Q,) of the queries.
        columns: (Q,) average precisions by column, NaN for a query without a match.

    Returns:
        The number of queries of each identity, (I,), and the columns that were added, (I,) each.
    """
    names, queries = np.unique(identities[np.isfinite(next(iter(columns.values())))], return_counts=True)
    means = {column: np.array([np.nanmean(ap[identities == name]) for name in names]) for column, ap in columns.items()}
    lines = read(path) or [
        {"identity": str(name), "queries": str(count)} for name, count in zip(names, queries, strict=True)
    ]
    for column, values in means.items():
        for line, value in zip(lines, values, strict=True):
            line[column] = f"{value:.5f}"
    write_text(path, csv_text(list(lines[0]), [list(line.values()) for line in lines]))
    return queries, list(means.values())


def standard_error(differences: Precisions, queries: npt.NDArray[np.int64]) -> float:
    """Return the standard error of a mean over queries, where those of one identity resemble each other.

    Args:
        differences: (I,) mean of the queries of each identity.
        queries: (I,) their number.
    """
    count = len(differences)
    residuals = queries * (differences - np.average(differences, weights=queries))
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / queries.sum())


def unit(vectors: Vectors) -> Vectors:
    """Divide vectors (n, D) by their lengths."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def distance(first: Vectors, second: Vectors) -> float:
    """Return the mean of 1 - cosine of pairs of unit vectors (n, D)."""
    return float(1 - np.einsum("nd,nd->n", first, second).mean())
