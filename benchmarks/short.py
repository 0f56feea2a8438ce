"""Short trainings on noise, for measurements that depend on shapes and steps but not on what is learned."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pipeline.compress.budget import cost_model
from pipeline.compress.student import StudentTask, build_student, student_task
from pipeline.config import Params
from pipeline.data.loader import TrainBatch
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet
from pipeline.runtime import launch
from pipeline.stage.presets import load_preset
from pipeline.training.loop import Fit
from pipeline.training.state import Checkpoints
from pipeline.training.teacher import build_teacher

ROOT = Path(__file__).parents[1]
IDENTITIES = 12


class Noise:
    """Batches of random images of `IDENTITIES` identities.

    Args:
        steps: Batches per epoch.
        images: Images per batch.
        size: Height and width, pixels.
    """

    def __init__(self, steps: int, images: int, size: tuple[int, int]) -> None:
        self.steps, self.images, self.size = steps, images, size

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        """Yield the batches of an epoch; the same epoch has the same batches."""
        for step in range(self.steps):
            generator = torch.Generator().manual_seed(1000 * epoch + step)
            pixels = torch.randint(0, 256, (self.images, 3, *self.size), generator=generator, dtype=torch.uint8)
            indices = torch.arange(self.images)
            yield TrainBatch(pixels, indices % IDENTITIES, indices, torch.full_like(indices, epoch))


def preprocess(images: Tensor) -> Tensor:
    """Convert uint8 images to the input of a network."""
    return (images.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)


def with_values(params: Params, changes: dict[str, Any]) -> Params:
    """Return params with other values, by dotted name.

    Raises:
        KeyError: If a name has no section; its argument names it.
        ValidationError: If the params are not valid.
    """
    content = params.model_dump()
    for name, value in changes.items():
        *path, last = name.split(".")
        section: Any = content
        for key in path:
            section = section.get(key)
            if not isinstance(section, dict):
                raise KeyError(f"`{name}`")
        section[last] = value
    return Params.model_validate(content)


def preset(name: str, **changes: Any) -> Params:
    """Return a preset with other values; a double underscore stands for the dot."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return with_values(load_preset(ROOT, name), dotted)


def prepared(params: Params, noise: Noise, budget_cost: CostModel | None = None) -> tuple[StudentTask, RetrievalNet]:
    """Return the task and the untrained network of a student; the teacher is untrained as well."""
    fabric = launch(params.runtime, params.seed)
    teacher = build_teacher(params.teacher, IDENTITIES).eval()
    size = (params.data.image_size[0], params.data.image_size[1])
    steps = len(noise) * params.student.epochs
    calibration = preprocess(next(noise.epoch(99)).images)
    budget_cost = budget_cost or cost_model(teacher.spec, params.student, size)
    task = student_task(fabric, params, teacher, budget_cost, steps, calibration, None)
    return task, build_student(params, teacher, task.compression)


def train(params: Params, noise: Noise, budget_cost: CostModel | None = None) -> tuple[StudentTask, RetrievalNet]:
    """Train a student, and return its task and network."""
    task, net = prepared(params, noise, budget_cost)
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        fit = Fit(task.fabric, params.student, task, noise, preprocess, checkpoints, lambda _: None)
        return task, fit.run(lambda: net)
