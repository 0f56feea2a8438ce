"""Time that a training step of the teacher waits for its batch, by number of workers.

Uses params.yaml and the data of stage `prepare`; run `dvc repro prepare` first. The settings alternate by epoch; one or
two minutes on 2 cores.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch

from benchmarks.short import with_values
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


def epoch_timer(workers: int) -> Callable[[int], tuple[list[float], list[float]]]:
    """Return a function that trains an epoch and returns the seconds of waiting and of computing, by step."""
    params = with_values(load(Files.here().params), {"runtime.workers": workers})
    fabric = launch(params.runtime, params.seed)
    manifest, images = open_images(Files.here(), params)
    loader = training_loader(manifest, images, params.teacher, params)
    net = build_teacher(params.teacher, len(manifest.train_identities)).to(memory_format=torch.channels_last).train()
    optimizer, task = build_optimizer(net, params.teacher.optimizer), TeacherTask(params.teacher, None)

    def run(number: int) -> tuple[list[float], list[float]]:
        waiting, computing = [], []
        started = perf_counter()
        for batch in loader.epoch(number):
            loaded = perf_counter()
            inputs = normalise(batch.images).contiguous(memory_format=torch.channels_last)
            loss = task.losses(net, net, batch._replace(images=inputs), 0.0)["loss"]
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)
            optimizer.step()
            done = perf_counter()
            waiting.append(loaded - started)
            computing.append(done - loaded)
            started = done
        return waiting[WARM_UP:], computing[WARM_UP:]

    return run


def main() -> None:
    """Print the median times of a step and the share of waiting."""
    timers = {workers: epoch_timer(workers) for workers in WORKERS}
    waiting: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    computing: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for number in range(ROUNDS):
        for workers, run in timers.items():
            waits, computes = run(number)
            waiting[workers] += waits
            computing[workers] += computes
    for workers in WORKERS:
        wait, compute = np.median(waiting[workers]), np.median(computing[workers])
        share = np.sum(waiting[workers]) / (np.sum(waiting[workers]) + np.sum(computing[workers]))
        step = 1000 * (wait + compute)
        print(f"{workers} workers: {1000 * wait:.1f} of {step:.1f} ms per step are waiting, {share:.1%} of the time")


if __name__ == "__main__":
    main()
