"""Stage `student`: train the student by distillation from the teacher while it shrinks to the budget.

Reads   artifacts/prepare/, artifacts/teacher/
Writes  artifacts/student/, metrics/student.json, plots/student.csv

With a latency budget the result depends on layer times measured on this machine; artifacts/student/latency.json holds
these times, corrected by the timing of the final network.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

from pipeline import checkpoint
from pipeline.compress.budget import cost_model
from pipeline.compress.student import (
    CALIBRATION,
    build_student,
    cache_teacher,
    evenly_spaced,
    remaining_spec,
    student_task,
)
from pipeline.compress.teacher_cache import GIB, delete_outputs
from pipeline.data.augment import as_tensor, normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.data.requirements import check_requirements, unwatched_weights
from pipeline.models import cost
from pipeline.models.cost import CostModel
from pipeline.records import StudentRecord
from pipeline.retrieval.embed import evaluate
from pipeline.retrieval.scoring import scores
from pipeline.runtime import launch
from pipeline.stage.run import Run, run_stage
from pipeline.teachers.given import larger_student, load, student_spec
from pipeline.training.loop import Fit
from pipeline.training.teacher import validator

LATENCY, MEASURED = "latency.json", "measured.json"

T = TypeVar("T")

log = logging.getLogger(__name__)


def student(run: Run) -> StudentRecord:
    """Train the student, write it, and evaluate it on the test set."""
    params, config = run.params, run.params.student
    size = (params.data.image_size[0], params.data.image_size[1])
    fabric = launch(params.runtime, params.seed)
    manifest, images = open_images(run.files, params)
    check_requirements(manifest.items, params)
    if warning := unwatched_weights("student", params):
        log.warning(warning)
    loader = training_loader(manifest, images, params.student, params, fabric.global_rank, fabric.world_size)
    teacher = load(run.files.artifacts("teacher"))
    full = student_spec(teacher, params, len(manifest.train_identities))
    if warning := larger_student(teacher, full, params):
        log.warning(warning)
    checkpoints = run.checkpoints("data", "teacher", "student")

    def on_first_device(function: Callable[[], T]) -> T:
        """Call a function on the first device and broadcast the result, so that all devices use the same times."""
        return cast(T, fabric.broadcast(function() if fabric.is_global_zero else None))

    def measure_latency() -> CostModel:
        from pipeline.inference import latency_model  # only a latency budget needs ONNX Runtime

        def ratio(widths: Mapping[str, int]) -> float:
            path = checkpoints.folder / MEASURED
            return on_first_device(lambda: latency_model.stored_latency_ratio(path, full, size, widths))

        path = checkpoints.folder / LATENCY
        model = on_first_device(lambda: latency_model.stored_latency_model(path, full, size, config.channel_multiple))
        return replace(model, measured=ratio)

    budget_cost = cost_model(full, config, size, measure_latency)
    validate = validator(manifest, images, params.data.protocol, normalise, fabric.device)
    indices = evenly_spaced(manifest.indices("train"), CALIBRATION)
    calibration = normalise(as_tensor(images.batch(indices)).to(fabric.device))
    steps = len(loader) * config.epochs
    task = student_task(fabric, params, teacher, budget_cost, steps, calibration, validate, full)
    outputs = run.files.teacher_outputs
    if config.distill.views:
        cache_teacher(task, loader, run.inputs_digest, outputs, params)
    fit = Fit(fabric, config, task, loader, normalise, checkpoints, run.curve)
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    task.check(net)
    task.plan().write(run.out)
    checkpoint.save(run.out, net)
    checkpoint.save_spec(run.out / checkpoint.FULL, full)
    latency = config.budgeted and config.budget.of == "latency"
    corrected_cost = task.compression.cost
    if latency and fabric.is_global_zero:  # stored, because a second measurement would differ
        from pipeline.inference.latency_model import write_model

        write_model(run.out / LATENCY, corrected_cost)
    protocol = params.data.protocol
    retrieval = evaluate(net, manifest, images, "query", "gallery", protocol, normalise, fabric.device)
    small = remaining_spec(net)
    if fabric.local_rank == 0:
        delete_outputs(outputs, params.runtime.teacher_cache_gib * GIB)
    return StudentRecord(
        **scores(protocol, retrieval).model_dump(),
        params=cost.params(small),
        macs=cost.macs(small, size),
        params_reduction=1 - cost.params(small) / cost.params(full),
        macs_reduction=1 - cost.macs(small, size) / cost.macs(full, size),
        latency_reduction=corrected_cost.reduction(full.widths, small.widths) if latency else None,
        target=config.budget.reduction if config.budgeted else 0.0,
    )


if __name__ == "__main__":
    run_stage(student)
