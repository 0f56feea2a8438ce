"""A student trained on two devices, as a program: each process writes down what it ended with."""

import sys
from pathlib import Path

import torch

from pipeline.config import Params
from pipeline.runtime import launch
from pipeline.training.loop import Fit
from pipeline.training.state import Checkpoints
from pipeline.training.student import fresh_student, student_task
from pipeline.training.teacher import fresh_teacher
from tests.training.test_fit import IDENTITIES, STEPS, RandomImages, cost_of, digest, preprocess

if __name__ == "__main__":
    folder, content = Path(sys.argv[1]), Path(sys.argv[2]).read_text()
    params = Params.model_validate_json(content)
    fabric = launch(params.runtime, params.seed)
    teacher = fresh_teacher(params.teacher, IDENTITIES).eval()
    calibration = preprocess(next(RandomImages().epoch(99))[0])
    steps = STEPS * params.student.epochs
    task = student_task(fabric, params, teacher, cost_of(params, teacher), steps, calibration, None)
    loader = RandomImages(device=fabric.global_rank)
    fit = Fit(fabric, params.student, task, loader, preprocess, Checkpoints(folder), lambda row: None)
    net = fit.run(lambda: fresh_student(params, teacher, task.compression))
    task.check(net)
    state = {**net.state_dict(), **task.state_dict()}
    (folder / f"{fabric.global_rank}.txt").write_text(f"{torch.get_num_threads()} {digest(state)}")
