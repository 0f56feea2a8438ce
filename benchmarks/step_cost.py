"""Time and memory of a training step of the student compared with plain distillation, before anything has shrunk.

Default network and batch size; each row changes one thing in the row above. Stored outputs are in memory: reading them
from disk is not measured. Steps alternate in one process, memory is the peak of a process of its own; four minutes on 2
cores.
"""

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.short import Noise, prepared, preprocess, with_values
from benchmarks.short import preset as load
from pipeline.system.process import peak_memory
from pipeline.training.optimizer import build_optimizer

ROUNDS, WARM_UP = 30, 3
PLAIN = "plain distillation"
ROWS: dict[str, Mapping[str, Any]] = {
    PLAIN: {"student.method": "none"},
    "compactors": {"student.method": "budget", "student.sites": ["conv1", "conv2"]},
    "gates of the stream": {"student.sites": ["conv1", "conv2", "stream"]},
    "importance `embedding`": {"student.resetting.importance": "embedding"},
    "48 images without labels": {"student.batch.unlabelled": 48},
    "stored outputs of the teacher": {"student.distill.views": 1},
    "no feature loss": {"student.distill.feature": 0.0},
}
"""Params that differ from the row above."""


def stepper(name: str) -> Callable[[], float]:
    """Return a function that takes one training step of a row and returns its seconds."""
    params = load("vehicles")
    for row, changes in ROWS.items():
        params = with_values(params, dict(changes))
        if row == name:
            break
    sizes = params.student.batch
    noise = Noise(1, sizes.size, (params.data.image_size[0], params.data.image_size[1]))
    task, net = prepared(params, Noise(10**6, noise.images, noise.size))
    net.train()
    optimizer = build_optimizer(net, params.student.optimizer)
    batch = next(noise.epoch(0))
    batch = batch._replace(labels=batch.labels[: sizes.labelled])
    if params.student.distill.views:
        outputs = task.teacher_outputs(preprocess(batch.images))
        task.cache = lambda _: outputs

    def step() -> float:
        start = perf_counter()
        loss = task.losses(net, net, batch._replace(images=preprocess(batch.images)), 0.0)["loss"]
        optimizer.zero_grad(set_to_none=True)
        task.fabric.backward(loss)
        task.step(net, optimizer.step, 0.0)
        return perf_counter() - start

    return step


def memory(name: str) -> int:
    """Return the peak memory of a process that takes a few steps of a row, bytes."""
    step = stepper(name)
    for _ in range(WARM_UP):
        step()
    return peak_memory()


def main() -> None:
    """Print the median time of a step, its peak memory, and the ratios of both to plain distillation."""
    bytes_ = {}
    for name in ROWS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            bytes_[name] = process.submit(memory, name).result()
    steppers = {name: stepper(name) for name in ROWS}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(ROUNDS + WARM_UP):
        for name, step in steppers.items():
            duration = step()
            if turn >= WARM_UP:
                seconds[name].append(duration)
    plain = np.array(seconds[PLAIN])
    for name, values in seconds.items():
        ratio = np.median(np.array(values) / plain)
        print(f"{name:<30} {1000 * np.median(values):7.1f} ms, {ratio:.3f} of plain distillation; "
              f"{bytes_[name] / 2**20:6.0f} MiB, {bytes_[name] / bytes_[PLAIN]:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
