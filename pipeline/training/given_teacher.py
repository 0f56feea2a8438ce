"""A teacher that was trained elsewhere: loading it, checking its preprocessing, and giving it a classifier."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.config import Params, Teacher
from pipeline.data.augment import MEAN, STD, normalise
from pipeline.data.images import Images
from pipeline.data.manifest import Manifest
from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.spec import Input
from pipeline.models.toolkits import relative_input, translate
from pipeline.retrieval import scoring
from pipeline.retrieval.embed import embed
from pipeline.retrieval.evaluate import evaluate_embedder
from pipeline.retrieval.metrics import Retrieval
from pipeline.retrieval.scoring import Side
from pipeline.training.weights_file import read_tensors

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.str_]

log = logging.getLogger(__name__)

PROBES = 1000
"""Training images at most that kinds of preprocessing are compared on."""

SURE = 3.0
"""Standard errors that a difference of mAP must have before it decides anything."""


class TeacherError(ValueError):
    """A teacher from elsewhere cannot be used."""

    exit_code = 2


USUAL_INPUTS: Mapping[str, tuple[Sequence[float], Sequence[float], bool]] = {
    "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]": (MEAN, STD, False),
    "the same with bgr true": (MEAN, STD, True),
    "mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]": ((0.5,) * 3, (0.5,) * 3, False),
    "mean [0, 0, 0], std [1, 1, 1]": ((0.0,) * 3, (1.0,) * 3, False),
    "mean [0, 0, 0], std [0.00392157, 0.00392157, 0.00392157]": ((0.0,) * 3, (1 / 255,) * 3, False),
    "mean [0.485, 0.458, 0.408], std [0.00392157, 0.00392157, 0.00392157], bgr true": (
        (0.485, 0.458, 0.408),
        (1 / 255,) * 3,
        True,
    ),
}
"""Usual values of `teacher.input`: torchvision and most others; with OpenCV's order; timm's ViTs; pixels in [0, 1];
pixels in [0, 255]; Caffe."""


def given_teacher(params: Params, manifest: Manifest, images: Images, device: torch.device) -> RetrievalNet:
    """Load the teacher that params.yaml names, check it on the test set, and give it a classifier.

    Raises:
        TeacherError: If it cannot be used, or retrieves no better than chance.
        FileNotFoundError: If there is nothing at the path.
    """
    net, protocol = load_given(params.teacher).to(device), params.data.protocol
    train = manifest.indices("train")
    names = manifest.identities(train)
    chosen = probes(names)

    def embeddings(other: RetrievalNet, indices: npt.NDArray[np.int64]) -> Vectors:
        return embed(other, images, indices, normalise, device)

    def score(vectors: Vectors) -> Retrieval:
        return evaluate_embedder(lambda _: vectors, manifest, "query", "gallery", protocol)

    advice = compare_inputs(net, lambda other: embeddings(other, train[chosen]), names[chosen])
    of_test = embeddings(net, np.concatenate([manifest.indices("query"), manifest.indices("gallery")]))
    check_retrieval(score(of_test), score(np.random.default_rng(params.seed).permutation(of_test)), advice)
    labels = np.searchsorted(np.array(manifest.train_identities), names)
    return with_classifier(net, embeddings(net, train), labels)


def load_given(config: Teacher) -> RetrievalNet:
    """Load the network at `config.weights`, a folder of this project or a state dict of another toolkit.

    Returns:
        The network without a classifier, in evaluation mode.

    Raises:
        TeacherError: If it is no network that can be a teacher.
        FileNotFoundError: If there is nothing at the path.
    """
    path = Path(config.weights)
    if (path / checkpoint.SPEC).is_file():
        net = checkpoint.load(path)
        if net.spec.indicators:
            raise TeacherError(
                f"`teacher.weights` {path} is a student before surgery; use artifacts/surgery of its run, or a teacher"
            )
        return convert(net, net.spec.model_copy(update={"identities": 0}))
    state = read_tensors(path)
    try:
        pool = None if config.max_pool == "auto" else config.max_pool
        translation = translate(state, config.last_stride, (MEAN, STD), pool)
    except ValueError as error:
        raise TeacherError(f"`teacher.weights` {path} cannot be used: {error}") from error
    spec = translation.spec
    if spec.input is None:
        given = relative_input((MEAN, STD), config.input.mean, config.input.std, bgr=config.input.bgr)
        spec = spec.model_copy(update={"input": given})
    net = RetrievalNet(spec)
    net.load_state_dict(net.state_dict() | translation.state, strict=True)
    left_out = f"; left out: {', '.join(translation.left_out)}" if translation.left_out else ""
    log.info("%s: a ResNet-%d, %d tensors used, embedding of %d numbers%s", path, spec.depth, len(translation.state),
             spec.embedding_dim, left_out)  # fmt: skip
    return net.to(memory_format=torch.channels_last).eval()


def with_classifier(net: RetrievalNet, embeddings: Vectors, labels: npt.NDArray[np.int64]) -> RetrievalNet:
    """Return the network with a classifier whose weights are the mean embeddings of the identities.

    Distillation then compares how similar an image is to each training identity, in the teacher's space.

    Source: Qi et al., "Low-Shot Learning with Imprinted Weights", CVPR 2018.

    Args:
        embeddings: (N, D) of the training images, normalised.
        labels: (N,) class numbers.
    """
    count = int(labels.max()) + 1
    sums = np.zeros((count, embeddings.shape[1]))
    np.add.at(sums, labels, embeddings)
    weight = nn.functional.normalize(torch.from_numpy(sums), dim=1).float()
    spec = net.spec.model_copy(update={"identities": count, "cosine": True})
    return convert(net, spec, net.state_dict() | {"classifier.weight": weight})


def check_retrieval(retrieval: Retrieval, shuffled: Retrieval, advice: str) -> None:
    """Check that a network retrieves better than chance.

    Args:
        retrieval: Scores of the queries.
        shuffled: Scores of the same queries with the embeddings of other images.
        advice: What to try, appended to the message.

    Raises:
        TeacherError: If it does not.
    """
    if not _is_better(retrieval.ap, shuffled.ap):
        raise TeacherError(
            f"the teacher has mAP {retrieval.map:.4f} on the test set, no better than chance ({shuffled.map:.4f}); "
            f"wrong preprocessing is the usual reason: {advice}"
        )


def compare_inputs(net: RetrievalNet, embed: Callable[[RetrievalNet], Vectors], labels: Labels) -> str:
    """Compare usual kinds of preprocessing on training images, and warn if another one is better than the present one.

    Args:
        net: The teacher.
        embed: Embeds the images with a network, (N, D).
        labels: (N,) identities of the images.

    Returns:
        Advice for a message.
    """
    present = _score(embed(net), labels)
    scores = {}
    for name, (mean, std, bgr) in USUAL_INPUTS.items():
        expected = relative_input((MEAN, STD), mean, std, bgr=bgr)
        scores[name] = _score(embed(_with_input(net, expected)), labels)
    best = max(scores, key=lambda name: np.nanmean(scores[name]))
    before, after = np.nanmean(present), np.nanmean(scores[best])
    if not _is_better(scores[best], present):
        return "check `teacher.input`, `teacher.last_stride`, `teacher.max_pool` and `data.image_size`"
    log.warning("on training images the teacher has mAP %.3f with `teacher.input` %s, and %.3f as it is", after, best,
                before)  # fmt: skip
    return f"set `teacher.input` to {best}, which has mAP {after:.3f} instead of {before:.3f} on training images"


def _with_input(net: RetrievalNet, expected: Input | None) -> RetrievalNet:
    return convert(net, net.spec.model_copy(update={"input": expected}))


def _score(embeddings: Vectors, labels: Labels) -> npt.NDArray[np.float64]:
    """Return the average precision of each image against all others, (N,)."""
    return scoring.evaluate("loo", Side(embeddings, labels)).ap


def _is_better(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> bool:
    """Return whether average precisions (Q,) are larger than others, beyond `SURE` standard errors."""
    differences = (first - second)[np.isfinite(first - second)]
    error = differences.std(ddof=1) / len(differences) ** 0.5 if len(differences) > 1 else np.inf
    return bool(differences.mean() > SURE * error) if len(differences) else False


def probes(labels: Labels, count: int = PROBES) -> npt.NDArray[np.int64]:
    """Return positions of whole identities, evenly spaced over all identities, at most about `count` images."""
    names, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    wanted = max(1, int(len(names) * min(1.0, count / len(labels))))
    chosen = np.linspace(0, len(names) - 1, wanted).round().astype(int)
    return np.flatnonzero(np.isin(inverse, chosen) & (sizes[inverse] > 1))
