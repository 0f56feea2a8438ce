"""What the sections of params.yaml must agree on."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import Params

PUBLISHED = (18, 34, 50, 101, 152)
"""Depths with published torchvision weights, at width 64."""


def problems(params: "Params") -> Iterator[str]:
    """Yield which values do not fit together, each with its remedy."""
    yield from _problems_of_stages(params)
    yield from _problems_of_the_source(params)
    yield from _problems_of_a_given_teacher(params)
    yield from _problems_of_an_own_architecture(params)
    yield from _problems_of_first_weights(params)


def _problems_of_stages(params: "Params") -> Iterator[str]:
    """Yield what stages do not agree on."""
    if params.data.source == "vehicles":
        if params.data.unlabelled:
            yield (
                "`data.unlabelled` must be [] for source vehicles, which renders its images: set "
                "`data.vehicles.unlabelled_identities`"
            )
        rendered = params.data.vehicles.train_identities
        training = rendered - int(params.data.validation * rendered)  # as `split_validation` rounds
        for stage, section in params.trainings:
            if section.batch.identities > training:
                yield (
                    f"`{stage}.batch.identities` ({section.batch.identities}) must not exceed the {training} "
                    "identities left for training: lower it, or raise `data.vehicles.train_identities` "
                    f"({rendered})"
                )
    if params.student.channel_multiple % params.surgery.channel_multiple:
        yield (
            f"`surgery.channel_multiple` ({params.surgery.channel_multiple}) must divide `student.channel_multiple` "
            f"({params.student.channel_multiple})"
        )
    if params.export.batch == "dynamic":
        if 1 not in params.benchmark.batches:
            yield f"`benchmark.batches` must contain 1, got {params.benchmark.batches}"
    elif params.benchmark.batches != [params.export.batch]:
        yield (
            f"`benchmark.batches` must be [{params.export.batch}], got {params.benchmark.batches}, because files with "
            f"`export.batch` {params.export.batch} take no other batch"
        )
    if params.student.method == "paper" and params.runtime.devices * params.runtime.nodes > 1:
        yield (
            "`student.method` paper works on one device only, because its memory of features is not shared; set "
            "`runtime.devices` and `runtime.nodes` to 1"
        )
    if params.student.method == "paper" and params.student.distill.views:
        yield (
            f"`student.distill.views` ({params.student.distill.views}) must be 0, and `average_views` false, "
            "for method paper: an image would be its own nearest neighbours, as the teacher's features of a view "
            "would be the same each time"
        )
    if params.student.method == "paper" and params.surgery.tolerance > params.student.paper.threshold:
        yield (
            f"`surgery.tolerance` ({params.surgery.tolerance:g}) must not exceed `student.paper.threshold` "
            f"({params.student.paper.threshold:g}), or surgery would cut channels that make a width a multiple"
        )
    if params.student.recipe != params.teacher.recipe:
        yield (
            f"`student.recipe` ({params.student.recipe}) must equal `teacher.recipe` ({params.teacher.recipe}): "
            "distillation compares their logits"
        )


def _problems_of_the_source(params: "Params") -> Iterator[str]:
    """Yield which keys of the teacher have values that its source does not use."""
    source, given = params.teacher.source, params.teacher.input
    for key, value, neutral, sources in (
        ("max_pool", params.teacher.max_pool, "auto", ("checkpoint",)),
        ("pool", params.teacher.pool, "auto", ("checkpoint",)),
        ("input.mean", given.mean, [], ("checkpoint", "onnx")),
        ("input.std", given.std, [], ("checkpoint", "onnx")),
        ("input.bgr", given.bgr, False, ("checkpoint", "onnx")),
        ("input.layout", given.layout, "auto", ("onnx",)),
    ):
        if value != neutral and source not in sources:
            yield (
                f"`teacher.{key}` is for `teacher.source` {' and '.join(sources)}: set it to "
                f"{str(neutral).lower()}, or correct `teacher.source`, which is {source}"
            )
    if source != "onnx" and given.size:
        yield (
            f"`teacher.input.size` is for `teacher.source` onnx: set it to [], and `data.image_size` to the size "
            f"of the images of source {source}"
        )


def _problems_of_a_given_teacher(params: "Params") -> Iterator[str]:
    """Yield what does not agree with a teacher that is not trained here."""
    source, student = params.teacher.source, params.student
    if source == "train":
        return
    if params.teacher.weights in ("none", "imagenet"):
        yield f"`teacher.weights` must be the path of the network for `teacher.source` {source}"
    suffix = PurePosixPath(params.teacher.weights).suffix
    if suffix in {"checkpoint": (".onnx",), "onnx": (".pth", ".pt", ".tar", ".safetensors")}[source]:
        other = "onnx" if source == "checkpoint" else "checkpoint"
        yield f"`teacher.source` {source} does not read {params.teacher.weights}: set it to {other}"
    if params.teacher.recipe != "scratch":
        yield (
            f"`teacher.recipe` and `student.recipe` must be scratch for `teacher.source` {source}: the classifier "
            "of such a teacher compares cosines"
        )
    if source == "onnx" and student.method in ("paper", "static-magnitude"):
        yield f"`student.method` must be budget, static-random or none for source onnx, not {student.method}"
    elif source == "onnx" and not student.architecture.depth:
        yield "`student.architecture.depth` must be that of a ResNet for `teacher.source` onnx, not 0"
    if source == "onnx" and student.distill.feature:
        yield "`student.distill.feature` must be 0 for `teacher.source` onnx, whose inner features are not known"


def _problems_of_an_own_architecture(params: "Params") -> Iterator[str]:
    """Yield what does not agree with a student that does not start as its teacher."""
    student, own = params.student, params.student.architecture
    if not own.depth and params.teacher.source != "onnx":
        return
    if student.init == "teacher" and student.method != "static-random":  # which trains random weights
        yield "`student.init` must be imagenet, random or a path for a student of another architecture"
    if student.method in ("paper", "static-magnitude") and params.teacher.source != "onnx":
        yield f"`student.architecture.depth` must be 0 for `student.method` {student.method}"
    if student.distill.feature and params.runtime.devices * params.runtime.nodes > 1:
        yield (
            "`student.distill.feature` must be 0 on several devices if `student.architecture.depth` is not 0: its "
            "projections are trained on one device"
        )


def _problems_of_first_weights(params: "Params") -> Iterator[str]:
    """Yield which networks do not exist, or are not published by torchvision."""
    teacher, own = params.teacher, params.student.architecture
    trained = teacher.source == "train"
    for where, net, built in (("teacher", teacher, trained), ("student.architecture", own, bool(own.depth))):
        if built and net.depth in (18, 34) and net.stem not in (0, net.width):
            yield f"`{where}.stem` must be 0 or {net.width} at `{where}.depth` {net.depth}, got {net.stem}"
    start, of_student = ("student.architecture", own) if own.depth else ("teacher", teacher)
    for name, weights, where, net in (
        ("teacher.weights", teacher.weights, "teacher", teacher),
        ("student.init", params.student.init, start, of_student),
    ):
        published = net.depth in PUBLISHED and net.width == 64 and net.stem in (0, 64)
        known = trained or net is own  # the architecture of a teacher from elsewhere is in its file
        if weights == "imagenet" and known and not published:
            yield (
                f"`{name}` is imagenet, but torchvision publishes no ResNet-{net.depth} of width {net.width}"
                f"{f' and stem {net.stem}' if net.stem else ''}: set `{where}.depth` to one of "
                f"{', '.join(map(str, PUBLISHED))} and `{where}.width` to 64, or use other weights"
            )
