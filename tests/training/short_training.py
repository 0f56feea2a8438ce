"""Short trainings of teacher and student on random images, shared by the tests of this folder."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.compress.budget import cost_model
from pipeline.compress.student import StudentTask, student_task
from pipeline.config import Params
from pipeline.data.loader import TrainBatch
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.runtime import launch
from pipeline.training.loop import Fit
from pipeline.training.state import Checkpoints

ROOT = Path(__file__).parents[2]
IDENTITIES, PER_IDENTITY, STEPS = 4, 2, 6


class RandomImages:
    """Batches of noise with a colour for each identity; they depend on the epoch and the device."""

    def __init__(self, device: int = 0) -> None:
        self.device, self.pool = device, np.arange(IDENTITIES * PER_IDENTITY)

    def __len__(self) -> int:
        return STEPS

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(self.device * 10**6 + epoch * 1000 + step)
            labels = torch.arange(IDENTITIES).repeat_interleave(PER_IDENTITY)
            images = torch.randint(0, 128, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8)
            images[:, 0] += (labels * 30).to(torch.uint8)[:, None, None]
            indices = torch.arange(len(labels))
            yield TrainBatch(images, labels, indices, torch.full_like(indices, epoch))

    def view(self, view: int) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
        batch = next(self.epoch(view))
        yield batch.indices.numpy(), batch.images


def preprocess(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)


def change(params: Params, stage: str, **values: object) -> Params:
    content = params.model_dump()
    content[stage] |= values
    return Params.model_validate(content)


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def cost_of(params: Params, teacher: RetrievalNet) -> CostModel:
    return cost_model(teacher.spec, params.student, (32, 32))


def prepared(
    params: Params, teacher: RetrievalNet, folder: Path, full: ArchSpec | None = None
) -> tuple[StudentTask, Fit, list[dict[str, float]]]:
    fabric = launch(params.runtime, params.seed)
    rows: list[dict[str, float]] = []
    calibration = preprocess(next(RandomImages().epoch(99)).images)
    steps = STEPS * params.student.epochs
    budget_cost = cost_model((full or teacher.spec), params.student, (32, 32))
    task = student_task(fabric, params, teacher, budget_cost, steps, calibration, None, full)
    fit = Fit(fabric, params.student, task, RandomImages(), preprocess, Checkpoints(folder), rows.append)
    return task, fit, rows
