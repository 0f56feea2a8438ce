"""Program that trains a student on several devices; each process writes its result to a file.

Arguments: a folder for the states and results of the devices, and a JSON file with params.
"""

import sys
from pathlib import Path

import torch

from pipeline.compress.student import build_student, cache_teacher, student_task
from pipeline.config import Params
from pipeline.runtime import launch
from pipeline.training.loop import Fit
from pipeline.training.state import Checkpoints
from pipeline.training.teacher import build_teacher
from tests.training.short_training import (
    IDENTITIES,
    STEPS,
    RandomImages,
    cost_of,
    digest,
    preprocess,
)

if __name__ == "__main__":
    folder, content = Path(sys.argv[1]), Path(sys.argv[2]).read_text()
    params = Params.model_validate_json(content)
    fabric = launch(params.runtime, params.seed)
    teacher = build_teacher(params.teacher, IDENTITIES).eval()
    calibration = preprocess(next(RandomImages().epoch(99))[0])
    steps = STEPS * params.student.epochs
    task = student_task(fabric, params, teacher, cost_of(params, teacher), steps, calibration, None)
    loader = RandomImages(device=fabric.global_rank)
    if params.student.distill.views:
        cache_teacher(task, loader, "inputs", folder / "cache", params)
    states = folder / str(fabric.global_rank)  # like two nodes without a shared folder
    epochs: list[str] = []
    fit = Fit(fabric, params.student, task, loader, preprocess, Checkpoints(states), lambda row: None)
    for state in fit.states(lambda: build_student(params, teacher, task.compression)):
        epochs.append(str(state.epoch))
    task.check(state.net)
    result = {**state.net.state_dict(), **task.state_dict()}
    text = f"{torch.get_num_threads()} {digest(result)} epochs {' '.join(epochs)}"
    (folder / f"{fabric.global_rank}.txt").write_text(text)
