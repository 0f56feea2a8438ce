"""Training time that live shrinking saves: a student that is cut after each epoch and one that is cut at the end.

Run `dvc repro` first. The two trainings have the same seed and alternate by epoch; ten minutes on 2 cores.
"""

import logging
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.short import with_values
from pipeline import checkpoint
from pipeline.compress.budget import cost_model
from pipeline.compress.student import CALIBRATION, build_student, evenly_spaced, student_task
from pipeline.data.augment import as_tensor, normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.files import Files
from pipeline.retrieval.embed import evaluate
from pipeline.runtime import launch
from pipeline.stage.params_file import load
from pipeline.training.loop import Fit
from pipeline.training.state import Checkpoints, TrainingState


def main() -> None:
    """Print the seconds of each epoch, the share of time saved, and both mAPs."""
    files = Files.here()
    base = load(Path(sys.argv[1]) if len(sys.argv) > 1 else files.params)
    manifest, images = open_images(files, base)
    fabric = launch(base.runtime, base.seed)
    calibration = normalise(as_tensor(images.batch(evenly_spaced(manifest.indices("train"), CALIBRATION))))
    size = (base.data.image_size[0], base.data.image_size[1])
    with TemporaryDirectory() as folder:
        runs, seconds, last = {}, {"live": 0.0, "off": 0.0}, dict[str, TrainingState]()
        for shrink in seconds:
            params = with_values(base, {"student.shrink": shrink})
            teacher = checkpoint.load(files.artifacts("teacher"))
            loader = training_loader(manifest, images, params.student, params, 0, 1)
            steps = len(loader) * params.student.epochs
            budget_cost = cost_model(teacher.spec, params.student, size)
            task = student_task(fabric, params, teacher, budget_cost, steps, calibration, None)
            checkpoints = Checkpoints(Path(folder) / shrink)
            fit = Fit(fabric, params.student, task, loader, normalise, checkpoints, lambda _: None)
            runs[shrink] = fit.states(partial(build_student, params, teacher, task.compression))
            next(runs[shrink])
        for epoch in range(base.student.epochs):
            for shrink, states in runs.items():
                start = perf_counter()
                last[shrink] = next(states)
                duration = perf_counter() - start
                seconds[shrink] += duration
                print(f"epoch {epoch + 1} {shrink:<5} {duration:6.1f} s", flush=True)
        for shrink, state in last.items():
            splits = ("query", "gallery")
            retrieval = evaluate(
                state.net.eval(), manifest, images, *splits, base.data.protocol, normalise, fabric.device
            )
            print(f"{shrink:<5} {seconds[shrink]:6.1f} s, mAP {retrieval.map:.4f}")
    print(f"saved {1 - seconds['live'] / seconds['off']:.1%} of the training time")


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main()
