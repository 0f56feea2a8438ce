"""Time of a training step of the student compared with plain distillation, before anything has shrunk.

Default network and batch size; steps alternate in one process; two minutes on 2 cores.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np

from benchmarks.short import Noise, prepared, preprocess, preset
from pipeline.training.optimizer import build_optimizer

ROUNDS, WARM_UP = 30, 3
SITES = {"none": None, "inner sites": ["conv1", "conv2"], "inner sites and stream": ["conv1", "conv2", "stream"]}


def stepper(sites: list[str] | None) -> Callable[[], float]:
    """Return a function that takes one training step and returns its seconds."""
    changes = {"student__method": "none"} if sites is None else {"student__sites": sites, "student__method": "budget"}
    params = preset("vehicles", **changes)
    noise = Noise(1, params.student.batch.labelled, (params.data.image_size[0], params.data.image_size[1]))
    task, net = prepared(params, Noise(10**6, noise.images, noise.size))
    net.train()
    optimizer = build_optimizer(net, params.student.optimizer)
    batch = next(noise.epoch(0))

    def step() -> float:
        start = perf_counter()
        loss = task.losses(net, net, batch._replace(images=preprocess(batch.images)), 0.0)["loss"]
        optimizer.zero_grad(set_to_none=True)
        task.fabric.backward(loss)
        task.step(net, optimizer.step, 0.0)
        return perf_counter() - start

    return step


def main() -> None:
    """Print the median time of a step and its ratio to plain distillation."""
    steppers = {name: stepper(sites) for name, sites in SITES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(ROUNDS + WARM_UP):
        for name, step in steppers.items():
            duration = step()
            if turn >= WARM_UP:
                seconds[name].append(duration)
    plain = np.array(seconds["none"])
    for name, values in seconds.items():
        ratio = np.median(np.array(values) / plain)
        print(f"{name:<24} median {1000 * np.median(values):7.1f} ms per step, {ratio:.3f} of plain distillation")


if __name__ == "__main__":
    main()
