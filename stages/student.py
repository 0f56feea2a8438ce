"""Stage `student`: learn from the teacher while shrinking to the budget.

Reads   artifacts/prepare/, artifacts/teacher/
Writes  artifacts/student/, metrics/student.json, plots/student.csv
"""

from pipeline import checkpoint
from pipeline.data.augment import as_tensor, normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.models import cost
from pipeline.ops.stage import Run, run_stage
from pipeline.records import StudentRecord
from pipeline.retrieval.embed import evaluate
from pipeline.runtime import launch
from pipeline.training.loop import Fit
from pipeline.training.student import CALIBRATION, fresh_student, remaining_spec, spread, student_task
from pipeline.training.teacher import validation


def student(run: Run) -> StudentRecord:
    """Train, write the network with what is left of its channels, score it on the test set."""
    params = run.params
    fabric = launch(params.runtime, params.seed)
    manifest, images = open_images(run.files, params)
    loader = training_loader(manifest, images, params.student, params, fabric.global_rank, fabric.world_size)
    teacher = checkpoint.load(run.files.artifacts("teacher"))
    validate = validation(manifest, images, normalise, fabric.device)
    calibration = normalise(as_tensor(images.batch(spread(manifest.rows("train"), CALIBRATION))).to(fabric.device))
    steps = len(loader) * params.student.epochs
    task = student_task(fabric, params, teacher, steps, calibration, validate)
    fit = Fit(fabric, params.student, task, loader, normalise, run.checkpoints("data", "teacher", "student"), run.curve)
    net = fit.run(lambda: fresh_student(params, teacher))
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
        target=params.student.budget.reduction if params.student.method == "budget" else 0.0,
    )


if __name__ == "__main__":
    run_stage(student)
