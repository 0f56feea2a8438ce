"""How long a training step of the teacher waits for its batch, by number of workers.

On the data that stage `prepare` left, with the params of the working tree; `dvc repro prepare` first. The ways take
turns, an epoch each; a minute or two on 2 cores.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch

from benchmarks.short import section
from pipeline.data.augment import normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.files import Files
from pipeline.runtime import launch
from pipeline.stage.params_file import load
from pipeline.training.optimizer import build_optimizer
from pipeline.training.teacher import TeacherTask, build_teacher

WORKERS = (0, 1)
ROUNDS, WARM_UP = 3, 3


def epoch(workers: int) -> Callable[[int], tuple[list[float], list[float]]]:
    """Makes an epoch of the teacher and tells seconds of waiting and of all else, step by step."""
    params = section(load(Files.here().params), {"runtime.workers": workers})
    fabric = launch(params.runtime, params.seed)
    manifest, images = open_images(Files.here(), params)
    loader = training_loader(manifest, images, params.teacher, params)
    net = build_teacher(params.teacher, len(manifest.train_identities)).to(memory_format=torch.channels_last).train()
    optimizer, task = build_optimizer(net, params.teacher.optimizer), TeacherTask(params.teacher, None)

    def run(number: int) -> tuple[list[float], list[float]]:
        waits, works = [], []
        started = perf_counter()
        for pixels, labels, _ in loader.epoch(number):
            loaded = perf_counter()
            inputs = normalise(pixels).contiguous(memory_format=torch.channels_last)
            loss = task.losses(net, net, inputs, labels, 0.0)["loss"]
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)
            optimizer.step()
            done = perf_counter()
            waits.append(loaded - started)
            works.append(done - loaded)
            started = done
        return waits[WARM_UP:], works[WARM_UP:]

    return run


def main() -> None:
    """Print medians and shares."""
    runs = {workers: epoch(workers) for workers in WORKERS}
    waits: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    works: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for number in range(ROUNDS):
        for workers, run in runs.items():
            waited, worked = run(number)
            waits[workers] += waited
            works[workers] += worked
    for workers in WORKERS:
        wait, work = np.median(waits[workers]), np.median(works[workers])
        share = np.sum(waits[workers]) / (np.sum(waits[workers]) + np.sum(works[workers]))
        print(
            f"{workers} workers: {1000 * wait:.1f} ms of {1000 * (wait + work):.1f} ms a step, {share:.1%} of the time"
        )


if __name__ == "__main__":
    main()
