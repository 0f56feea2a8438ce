"""Stage `student`: learn from the teacher while shrinking to the budget.

Reads   artifacts/prepare/, artifacts/teacher/
Writes  artifacts/student/, metrics/student.json, plots/student.csv

With a latency budget the result depends on how fast this machine ran the layers; artifacts/student/latency.json holds
those times, corrected by the timing of the network that was chosen in the end.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, cast

from pipeline import checkpoint
from pipeline.compress.budget import cost_model
from pipeline.compress.student import CALIBRATION, build_student, remaining_spec, spread, student_task
from pipeline.data.augment import as_tensor, normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.models import cost
from pipeline.models.cost import CostModel
from pipeline.records import StudentRecord
from pipeline.retrieval.embed import evaluate
from pipeline.retrieval.scoring import scores
from pipeline.runtime import launch
from pipeline.stage.run import Run, run_stage
from pipeline.training.loop import Fit
from pipeline.training.teacher import validation

LATENCY, MEASURED = "latency.json", "measured.json"

T = TypeVar("T")


def student(run: Run) -> StudentRecord:
    """Train, write the network with what is left of its channels, score it on the test set."""
    params, config = run.params, run.params.student
    size = (params.data.image_size[0], params.data.image_size[1])
    fabric = launch(params.runtime, params.seed)
    manifest, images = open_images(run.files, params)
    loader = training_loader(manifest, images, params.student, params, fabric.global_rank, fabric.world_size)
    teacher = checkpoint.load(run.files.artifacts("teacher"))
    checkpoints = run.checkpoints("data", "teacher", "student")

    def once(call: Callable[[], T]) -> T:
        """Return what the first device finds, on all devices: they must count alike."""
        return cast(T, fabric.broadcast(call() if fabric.is_global_zero else None))

    def measure() -> CostModel:
        from pipeline.inference import latency_model  # ONNX Runtime is needed for this only

        table, timed = checkpoints.folder / LATENCY, checkpoints.folder / MEASURED
        found = once(lambda: latency_model.kept_latency_model(table, teacher.spec, size, config.channel_multiple))
        return replace(
            found, measured=lambda widths: once(lambda: latency_model.kept_share(timed, teacher.spec, size, widths))
        )

    budgeted = cost_model(teacher.spec, config, size, measure)
    validate = validation(manifest, images, params.data.protocol, normalise, fabric.device)
    calibration = normalise(as_tensor(images.batch(spread(manifest.indices("train"), CALIBRATION))).to(fabric.device))
    steps = len(loader) * config.epochs
    task = student_task(fabric, params, teacher, budgeted, steps, calibration, validate, run.files.teacher_outputs)
    fit = Fit(fabric, config, task, loader, normalise, checkpoints, run.curve)
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    task.check(net)
    task.plan().write(run.out)
    checkpoint.save(run.out, net)
    latency = config.budgeted and config.budget.of == "latency"
    counted = task.compression.cost
    if latency and fabric.is_global_zero:  # it cannot be measured twice alike
        from pipeline.inference.latency_model import write_model

        write_model(run.out / LATENCY, counted)
    protocol = params.data.protocol
    found = evaluate(net, manifest, images, "query", "gallery", protocol, normalise, fabric.device)
    small = remaining_spec(net)
    return StudentRecord(
        **scores(protocol, found).model_dump(),
        params=cost.params(small),
        macs=cost.macs(small, size),
        params_reduction=1 - cost.params(small) / cost.params(teacher.spec),
        macs_reduction=1 - cost.macs(small, size) / cost.macs(teacher.spec, size),
        latency_reduction=counted.reduction(teacher.spec.widths, small.widths) if latency else None,
        target=config.budget.reduction if config.budgeted else 0.0,
    )


if __name__ == "__main__":
    run_stage(student)
