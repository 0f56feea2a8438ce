"""Trained ResNets as teachers: folders of this project, and state dicts of other toolkits."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from pipeline import checkpoint
from pipeline.config import Teacher, TeacherInput
from pipeline.data.augment import MEAN, STD
from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.toolkits import normalisation_of, relative_input, translate
from pipeline.models.weights_file import read_tensors
from pipeline.teachers.checks import Preprocessing, TeacherError, first_line

log = logging.getLogger(__name__)


def load_checkpoint(config: Teacher) -> RetrievalNet:
    """Load the network at `config.weights`, a folder of this project or a state dict of another toolkit.

    Returns:
        The network without a classifier, in evaluation mode.

    Raises:
        TeacherError: If it cannot be a teacher.
        WeightsError: If the file holds no state dict.
        FileNotFoundError: If there is nothing at the path.
    """
    path = Path(config.weights)
    if (path / checkpoint.SPEC).is_file():
        try:
            net = checkpoint.load(path)
        except (ValueError, OSError, SafetensorError, RuntimeError) as error:
            raise TeacherError(
                f"`teacher.weights` {path} is damaged ({first_line(error)}); copy the folder again, or `dvc pull` it"
            ) from error
        for key, value in (("max_pool", config.max_pool), ("pool", config.pool)):
            if value != "auto":
                raise TeacherError(
                    f"`teacher.{key}` is {value}, but {path / checkpoint.SPEC} decides it; set it to auto"
                )
        if net.spec.indicators:
            raise TeacherError(
                f"`teacher.weights` {path} is a student before surgery; set it to artifacts/surgery of its run"
            )
        return _as_given(convert(net, net.spec.bare()), config.input)
    if path.is_dir():
        raise TeacherError(
            f"`teacher.weights` {path} is a folder without {checkpoint.SPEC}; set it to a state dict, or to a copy of "
            "artifacts/teacher or artifacts/surgery"
        )
    state = read_tensors(path, "teacher.weights")
    try:
        max_pool = None if config.max_pool == "auto" else config.max_pool
        pool = None if config.pool == "auto" else config.pool
        translation = translate(state, config.last_stride, (MEAN, STD), max_pool, pool)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:  # the last three: tensors of another shape
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
        raise TeacherError(
            f"`teacher.weights` {path} cannot be used: {reason}; export the network as ONNX, and set `teacher.source` "
            "to onnx"
        ) from error
    net = RetrievalNet(translation.spec)
    net.load_state_dict(net.state_dict() | translation.state, strict=True)
    log.info("%s: a ResNet-%d, %d tensors used, embedding of %d numbers", path, net.spec.depth, len(translation.state),
             net.spec.embedding_dim)  # fmt: skip
    if translation.left_out:
        log.info("%s: tensors that are not used: %s", path, ", ".join(translation.left_out))
    return _as_given(net.to(memory_format=torch.channels_last).eval(), config.input)


def _as_given(net: RetrievalNet, section: TeacherInput) -> RetrievalNet:
    """Return the network with the input that params.yaml names, as far as it names one."""
    if not (section.mean or section.std or section.bgr):
        return net
    kind = Preprocessing.of(section, *normalisation_of((MEAN, STD), net.spec.input))
    already = net.spec.input is not None and net.spec.input.bgr
    return with_preprocessing(net, replace(kind, bgr=kind.bgr or already))


def with_preprocessing(net: RetrievalNet, kind: Preprocessing) -> RetrievalNet:
    """Return the network with another input."""
    expected = relative_input((MEAN, STD), kind.mean, kind.std, bgr=kind.bgr)
    return convert(net, net.spec.model_copy(update={"input": expected}))


def with_classifier(net: RetrievalNet, directions: npt.NDArray[np.float32]) -> RetrievalNet:
    """Return the network with a classifier of cosines; see `class_directions`."""
    spec = net.spec.model_copy(update={"identities": len(directions), "cosine": True})
    weight = torch.from_numpy(directions).to(net.conv1.weight)
    return convert(net, spec, net.state_dict() | {"classifier.weight": weight})


def class_directions(embeddings: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the directions of the mean embeddings of the identities, (identities, D).

    As the weights of a classifier they let distillation compare how similar an image is to each training identity.

    Source: Qi et al., "Low-Shot Learning with Imprinted Weights", CVPR 2018.

    Args:
        embeddings: (N, D) of the training images, normalised.
        labels: (N,) class numbers.
    """
    sums = np.zeros((int(labels.max()) + 1, embeddings.shape[1]))
    np.add.at(sums, labels, embeddings)
    directions: npt.NDArray[np.float32] = nn.functional.normalize(torch.from_numpy(sums), dim=1).float().numpy()
    return directions
