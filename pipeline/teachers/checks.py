"""Whether a teacher from elsewhere retrieves at all, and whether it gets the images that it expects."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import TeacherInput
from pipeline.data.augment import MEAN, STD
from pipeline.retrieval import scoring
from pipeline.retrieval.metrics import Retrieval
from pipeline.retrieval.scoring import Side

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.str_]
Precisions = npt.NDArray[np.float64]

log = logging.getLogger(__name__)

PROBES = 1000
"""Training images at most that kinds of preprocessing are compared on."""

SURE = 3.0
"""Standard errors that a difference of mAP must have before it decides anything."""


class TeacherError(ValueError):
    """A teacher from elsewhere cannot be used."""

    exit_code = 2


def first_line(error: Exception) -> str:
    """Return the beginning of a message, which may be long."""
    return str(error).partition("\n")[0][:200]


@dataclass(frozen=True)
class Preprocessing:
    """The images that a network expects.

    Attributes:
        mean: Subtracted from pixels in [0, 1], in the order red, green, blue.
        std: The difference is divided by it.
        bgr: Whether the channels stand in the order blue, green, red.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    @classmethod
    def of(cls, section: TeacherInput, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> "Preprocessing":
        """Return what params.yaml describes; `mean` and `std` are those of the file."""
        return cls(tuple(section.mean or mean), tuple(section.std or std), section.bgr)

    def __str__(self) -> str:
        mean, std = ([round(value, 6) for value in values] for values in (self.mean, self.std))
        return f"`teacher.input.mean` {mean}, `std` {std} and `bgr` {str(self.bgr).lower()}"


UNIT, BYTE = (1.0,) * 3, (1 / 255,) * 3
USUAL = (
    Preprocessing(MEAN, STD),  # ImageNet's, as most networks of torch
    Preprocessing(MEAN, STD, bgr=True),  # the same in OpenCV's order
    Preprocessing((0.5,) * 3, (0.5,) * 3),  # [-1, 1]
    Preprocessing((0.0,) * 3, UNIT),
    Preprocessing((0.0,) * 3, UNIT, bgr=True),
    Preprocessing((0.0,) * 3, BYTE),
    Preprocessing((0.0,) * 3, BYTE, bgr=True),
    Preprocessing((0.485, 0.458, 0.408), BYTE, bgr=True),  # Caffe's
)
"""Usual kinds of preprocessing."""


def check_retrieval(retrieval: Retrieval, shuffled: Sequence[Retrieval], advice: str) -> None:
    """Check that a network retrieves better than chance.

    Args:
        retrieval: Scores of the queries.
        shuffled: Scores of the same queries with the embeddings of other images, in several random orders.
        advice: What to try, appended to the message.

    Raises:
        TeacherError: If it does not.
    """
    chance = np.mean([scores.ap for scores in shuffled], axis=0)
    if not _is_better(retrieval.ap, chance):
        raise TeacherError(
            f"the teacher has mAP {retrieval.map:.4f} on the test set, which cannot be distinguished from chance "
            f"({float(np.nanmean(chance)):.4f}); wrong preprocessing is the usual reason: {advice}"
        )


def compare_settings(present: Vectors, others: Mapping[str, Callable[[], Vectors]], labels: Labels) -> str:
    """Compare other settings of a network on training images, and warn if one of them is better than the present one.

    Args:
        present: (N, D) embeddings with the present settings.
        others: Embed the same images with other ones, (N, D), or raise `TeacherError`; by keys and values in words.
        labels: (N,) identities of the images; without any, nothing is compared.

    Returns:
        Advice for a message.
    """
    advice = "check `teacher.input`, `teacher.last_stride`, `teacher.max_pool`, `teacher.pool` and `data.image_size`"
    if not len(labels):
        return advice
    before, precisions = _precisions(present, labels), {}
    for settings, embed in others.items():
        with suppress(TeacherError):  # embeddings that are not finite: they are not the right ones
            precisions[settings] = _precisions(embed(), labels)
    best = max(precisions, key=lambda settings: float(np.nanmean(precisions[settings])), default="")
    if not best or not _is_better(precisions[best], before):
        return advice
    maps = float(np.nanmean(before)), float(np.nanmean(precisions[best]))
    log.warning("wrong settings of the teacher? On training images it has mAP %.3f as it is, and %.3f with %s", *maps,
                best)  # fmt: skip
    return f"set {best}: on training images mAP is {maps[1]:.3f} then, instead of {maps[0]:.3f}"


def _precisions(embeddings: Vectors, labels: Labels) -> Precisions:
    """Return the average precision of each image against all others, (N,)."""
    return scoring.evaluate("loo", Side(embeddings, labels)).ap


def _is_better(first: Precisions, second: Precisions) -> bool:
    """Return whether average precisions (Q,) are larger than others, beyond `SURE` standard errors."""
    differences = first - second
    differences = differences[np.isfinite(differences)]
    if len(differences) < 2:
        return False
    return bool(differences.mean() > SURE * differences.std(ddof=1) / len(differences) ** 0.5)


def probes(labels: Labels, count: int = PROBES) -> npt.NDArray[np.int64]:
    """Return positions of whole identities, evenly spaced over all identities, at most about `count` images."""
    names, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    wanted = max(1, int(len(names) * min(1.0, count / len(labels))))
    chosen = np.linspace(0, len(names) - 1, wanted).round().astype(int)
    return np.flatnonzero(np.isin(inverse, chosen) & (sizes[inverse] > 1))
