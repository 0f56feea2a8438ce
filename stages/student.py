"""Stage `student`: learn from the teacher while shrinking to the budget.

Reads   artifacts/prepare/, artifacts/teacher/
Writes  artifacts/student/, metrics/student.json, plots/student.csv
"""

from pathlib import Path

from pipeline import checkpoint
from pipeline.compress.budget import cost_model, refuse_unreachable
from pipeline.config import Params
from pipeline.data.augment import as_tensor, normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.inference.layers import kept_latency_model
from pipeline.models import cost
from pipeline.models.cost import CostModel
from pipeline.models.spec import ArchSpec
from pipeline.ops.stage import Run, run_stage
from pipeline.records import StudentRecord
from pipeline.retrieval.embed import evaluate
from pipeline.runtime import launch
from pipeline.training.loop import Fit
from pipeline.training.student import CALIBRATION, fresh_student, remaining_spec, spread, student_task
from pipeline.training.teacher import validation

WITHOUT_BUDGET = ("none", "paper")
"""Methods that promise no reduction."""


def student(run: Run) -> StudentRecord:
    """Train, write the network with what is left of its channels, score it on the test set."""
    params = run.params
    full = checkpoint.load_spec(run.files.artifacts("teacher"))
    checkpoints = run.checkpoints("data", "teacher", "student")
    budgeted = counted(params, full, checkpoints.folder / "latency.json")
    fabric = launch(params.runtime, params.seed)
    manifest, images = open_images(run.files, params)
    loader = training_loader(manifest, images, params.student, params, fabric.global_rank, fabric.world_size)
    teacher = checkpoint.load(run.files.artifacts("teacher"))
    validate = validation(manifest, images, normalise, fabric.device)
    calibration = normalise(as_tensor(images.batch(spread(manifest.rows("train"), CALIBRATION))).to(fabric.device))
    steps = len(loader) * params.student.epochs
    task = student_task(fabric, params, teacher, budgeted, steps, calibration, validate)
    fit = Fit(fabric, params.student, task, loader, normalise, checkpoints, run.curve)
    net = fit.run(lambda: fresh_student(params, teacher, task.compression))
    task.check(net)
    task.plan().write(run.out)
    checkpoint.save(run.out, net)
    scores = evaluate(net, manifest, images, "query", "gallery", normalise, fabric.device).scores()
    height, width = params.data.image_size
    small = remaining_spec(net)
    params_left, macs_left = cost.params(small), cost.macs(small, (height, width))
    return StudentRecord(
        **scores.model_dump(),
        params=params_left,
        macs=macs_left,
        params_reduction=1 - params_left / cost.params(teacher.spec),
        macs_reduction=1 - macs_left / cost.macs(teacher.spec, (height, width)),
        target=0.0 if params.student.method in WITHOUT_BUDGET else params.student.budget.reduction,
    )


def counted(params: Params, full: ArchSpec, latency: Path) -> CostModel:
    """What the budget counts, refused before training where it cannot be kept.

    Args:
        params: All of params.yaml.
        full: The teacher's.
        latency: Where the times of the layers are kept until the training is over.
    """
    student, (height, width) = params.student, params.data.image_size
    if student.method in WITHOUT_BUDGET:
        return cost.macs_model(full, (height, width))
    if student.budget.of != "latency":  # refused when params.yaml was read
        return cost_model(full, student, (height, width))
    model = kept_latency_model(latency, full, (height, width), student.channel_multiple)
    refuse_unreachable(full, student, model)
    return model


if __name__ == "__main__":
    run_stage(student)
