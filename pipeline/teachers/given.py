"""Stage `teacher` for a teacher that was trained elsewhere: it is checked instead of trained."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.augment import as_tensor, normalise
from pipeline.data.images import Images
from pipeline.data.manifest import Manifest
from pipeline.inference.session import RUNTIME_ERRORS
from pipeline.models import cost
from pipeline.models.resnet import RetrievalNet, TeacherNet, convert
from pipeline.models.spec import ArchSpec, MaxPool
from pipeline.retrieval.embed import embed
from pipeline.retrieval.evaluate import evaluate_embedder
from pipeline.retrieval.metrics import Retrieval
from pipeline.teachers.checks import (
    USUAL,
    Preprocessing,
    TeacherError,
    check_retrieval,
    compare_settings,
    first_line,
    probes,
)
from pipeline.teachers.onnx_file import normalisation_of, read_file
from pipeline.teachers.onnx_rewriting import expectation, standardised
from pipeline.teachers.onnx_teacher import CLASSIFIER, FILE, OnnxTeacher
from pipeline.teachers.state_dict import class_directions, load_checkpoint, with_classifier, with_preprocessing

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]

ORDERS = 5
"""Random orders of the embeddings that stand for chance."""

MIN_COSINE = 0.99999
"""Of the embeddings of an image in two batches, as stage `export` requires it of every file."""


def given_teacher(
    params: Params, manifest: Manifest, images: Images, device: torch.device
) -> tuple[TeacherNet, Retrieval]:
    """Load the teacher that params.yaml names, check it, and give it a classifier of the training identities.

    Returns:
        The teacher, and its scores on the test set.

    Raises:
        TeacherError: If it cannot be used, or retrieves no better than chance.
        FileNotFoundError: If there is nothing at `teacher.weights`.
    """
    teacher, variants = LOADERS[params.teacher.source](params)
    teacher.to(device)
    weights = f"`teacher.weights` {params.teacher.weights}"
    if isinstance(teacher, OnnxTeacher):
        check_batches(teacher, weights, normalise(as_tensor(images.batch(manifest.indices("train")[:3]))))

    def embeddings(net: TeacherNet, indices: npt.NDArray[np.int64]) -> Vectors:
        vectors = embed(net, images, indices, normalise, device)
        if not (finite := np.isfinite(vectors).all(axis=1)).all():
            path = manifest.items[indices[~finite][0]].path
            raise TeacherError(f"{weights} embeds {path} as values that are not finite; check `teacher.input`")
        return vectors

    def score(vectors: Vectors) -> Retrieval:
        return evaluate_embedder(lambda _: vectors, manifest, "query", "gallery", params.data.protocol)

    train = manifest.indices("train")
    names = manifest.identities(train)
    chosen = probes(names)
    probed = train[chosen]
    present = embeddings(teacher, probed) if len(probed) else np.zeros((0, teacher.embedding_dim), np.float32)
    others = {
        settings: lambda build=build: embeddings(build().to(device), probed) for settings, build in variants.items()
    }
    advice = compare_settings(present, others, names[chosen])
    of_test = embeddings(teacher, np.concatenate([manifest.indices("query"), manifest.indices("gallery")]))
    retrieval = score(of_test)
    log.info("%s: mAP %.4f on the test set", params.teacher.weights, retrieval.map)
    random = np.random.default_rng(params.seed)
    check_retrieval(retrieval, [score(random.permutation(of_test)) for _ in range(ORDERS)], advice)
    labels = np.searchsorted(np.array(manifest.train_identities), names)
    return _complete(teacher, class_directions(embeddings(teacher, train), labels)).to(device), retrieval


Variants = Mapping[str, Callable[[], TeacherNet]]
"""Build the teacher with other settings, by keys and values in words."""


def _checkpoint(params: Params) -> tuple[TeacherNet, Variants]:
    net = load_checkpoint(params.teacher)
    variants: dict[str, Callable[[], TeacherNet]] = {
        str(kind): partial(with_preprocessing, net, kind) for kind in USUAL
    }
    stride: Literal[1, 2] = 1 if net.spec.last_stride == 2 else 2
    max_pool: MaxPool = "padded" if net.spec.max_pool == "unpadded" else "unpadded"
    if Path(params.teacher.weights).is_file():  # no tensor of a state dict shows them
        for key, value in (("last_stride", stride), ("max_pool", max_pool)):
            spec = net.spec.model_copy(update={key: value})
            variants[f"`teacher.{key}` {value}"] = partial(convert, net, spec)
    return net, variants


def _onnx(params: Params) -> tuple[TeacherNet, Variants]:
    path, size = Path(params.teacher.weights), (params.data.image_size[0], params.data.image_size[1])
    if not path.is_file():
        raise FileNotFoundError(f"`teacher.weights` is {path}, which is not a file; set it to the path of an ONNX file")
    name = f"`teacher.weights` {path}"
    model = read_file(path.read_bytes(), name, path.parent, path.resolve().parent)
    given = params.teacher.input

    def variant(kind: Preprocessing) -> OnnxTeacher:
        expected = expectation(model, name, kind, size, given.size, given.layout)
        return OnnxTeacher(standardised(model, name, expected, size).SerializeToString(deterministic=True))

    try:
        teacher = variant(Preprocessing.of(given, *normalisation_of(model)))
        onnx.checker.check_model(teacher.model(), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, *RUNTIME_ERRORS) as error:
        raise _cannot_run(name, error) from error
    if not teacher.count_params():
        raise TeacherError(f"{name} has no weights, so there is nothing to compress; export a trained network")
    if teacher.batch is not None and teacher.batch != params.export.batch:
        raise TeacherError(
            f"{name} takes exactly {teacher.batch} images in a call; export it with a variable number, or set "
            f"`export.batch` to {teacher.batch} and `benchmark.batches` to [{teacher.batch}]"
        )
    log.info("%s: embedding of %d numbers", path, teacher.embedding_dim)
    return teacher, {str(kind): partial(variant, kind) for kind in USUAL}


def _cannot_run(name: str, error: Exception) -> TeacherError:
    return TeacherError(
        f"{name} cannot be run by ONNX Runtime ({first_line(error)}); export it again, with standard operators and "
        "a variable number of images"
    )


def check_batches(teacher: OnnxTeacher, name: str, images: Tensor) -> None:
    """Check that a file runs, and that the embedding of an image does not depend on the others of its batch.

    Args:
        images: Normalised images (B, 3, H, W), more than one.

    Raises:
        TeacherError: If it does not run, or an embedding depends on other images.
    """
    try:
        together = teacher(images).embedding
        alone = torch.cat([teacher(image[None]).embedding for image in images])
    except RUNTIME_ERRORS as error:
        raise _cannot_run(name, error) from error
    if together.shape != alone.shape:
        raise TeacherError(
            f"{name} returns {tuple(together.shape)} for {len(images)} images instead of {tuple(alone.shape)}; export "
            "it with a variable number of images"
        )
    if not torch.isfinite(alone).all() or not alone.any(dim=1).all():
        raise TeacherError(f"{name} embeds an image as zeros, or as values that are not finite; check `teacher.input`")
    cosine = float((together * alone).sum(dim=1).min())
    if not cosine >= MIN_COSINE:
        raise TeacherError(
            f"{name} embeds an image in a batch of {len(images)} and alone with a cosine of {cosine:.6f}, below "
            f"{MIN_COSINE}: export it with float weights and without random operators, since quantisation by the batch "
            "changes embeddings"
        )


LOADERS: Mapping[str, Callable[[Params], tuple[TeacherNet, Variants]]] = {"checkpoint": _checkpoint, "onnx": _onnx}


def unchecked_teacher(params: Params, identities: int) -> TeacherNet:
    """Load the teacher that params.yaml names, with a random classifier: enough to measure how long a step takes.

    Raises:
        TeacherError: If it cannot be used.
        FileNotFoundError: If there is nothing at `teacher.weights`.
    """
    teacher, _ = LOADERS[params.teacher.source](params)
    dim = teacher.embedding_dim
    directions = np.random.default_rng(0).standard_normal((identities, dim), dtype=np.float32)
    return _complete(teacher, directions / np.linalg.norm(directions, axis=1, keepdims=True))


def _complete(teacher: TeacherNet, directions: Vectors) -> TeacherNet:
    """Return the teacher with a classifier of cosines to these directions."""
    if isinstance(teacher, OnnxTeacher):
        teacher.classifier = torch.from_numpy(directions)
        return teacher
    return with_classifier(cast(RetrievalNet, teacher), directions)


def larger_student(teacher: TeacherNet, full: ArchSpec, params: Params) -> str | None:
    """Return a warning if the compressed student will need more multiply-accumulates than its teacher."""
    size, student = (params.data.image_size[0], params.data.image_size[1]), params.student
    before, limit = cost.macs(full, size), teacher.count_macs(size)
    kept = 1 - student.budget.reduction if student.budgeted and student.budget.of == "macs" else 1.0
    if limit is None or kept * before <= limit:
        return None
    return (
        f"the student will need up to {kept * before / 1e6:,.1f} M multiply-accumulates, its teacher needs "
        f"{limit / 1e6:,.1f} M: choose a smaller `student.architecture`, or raise `student.budget.reduction`"
    )


def save(teacher: TeacherNet, folder: Path) -> None:
    """Write a teacher in place of another one."""
    for name in (FILE, CLASSIFIER, checkpoint.SPEC, checkpoint.WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    if isinstance(teacher, OnnxTeacher):
        teacher.save(folder)
    else:
        checkpoint.save(folder, cast(RetrievalNet, teacher))


def load(folder: Path) -> TeacherNet:
    """Read the result of `save`, to the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: If there is none.
    """
    return OnnxTeacher.load(folder).eval() if (folder / FILE).is_file() else checkpoint.load(folder)


def student_spec(teacher: TeacherNet, params: Params, identities: int) -> ArchSpec:
    """Return the spec of the uncompressed student: the teacher's, unless `student.architecture` names another.

    Args:
        identities: Classes of the student's classifier.
    """
    own = params.student.architecture
    if isinstance(teacher, RetrievalNet) and not own.depth:
        return teacher.spec
    spec = ArchSpec.of_student(own, teacher.embedding_dim, identities, params.student.recipe == "scratch")
    if not (isinstance(teacher, RetrievalNet) and params.student.distill.feature):
        return spec
    stages = [site for site in spec.stream if site != "conv1"]
    return spec.model_copy(update={"projections": {stage: teacher.spec.widths[stage] for stage in stages}})
