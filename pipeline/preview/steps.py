"""Take and time a few steps of a training: `python -m pipeline.preview.steps STAGE FOLDER ROOT`.

The folder holds what `pipeline.preview.estimate` wrote there. Prints a line when the steps begin, and `Measured` as
JSON after each network.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from lightning_fabric import Fabric

from pipeline.compress.budget import cost_model
from pipeline.compress.student import CALIBRATION, build_student, student_task
from pipeline.config import Params
from pipeline.data.augment import as_tensor, normalise
from pipeline.data.images import Images, Pixels
from pipeline.data.loader import TrainBatch, TrainLoader, training_loader
from pipeline.data.manifest import Indices, Manifest
from pipeline.models.resnet import RetrievalNet, TeacherNet
from pipeline.preview.estimate import MANIFEST, PARAMS, Measured, Timed
from pipeline.retrieval.embed import embed
from pipeline.runtime import device_memory, launch, limit_threads
from pipeline.system.process import die_with_parent, peak_memory
from pipeline.teachers.given import student_spec, unchecked_teacher
from pipeline.training.loop import Fit, Task
from pipeline.training.state import Checkpoints
from pipeline.training.teacher import TeacherTask, build_teacher

SECONDS, MAX_STEPS = 4.0, 40
"""Time and number of steps after which no further one is taken; if the first one takes longer, it is the only one."""
EVALUATED = 128
"""Images in a batch of an evaluation, as in `embed`."""


class RandomImages(Images):
    """Random pixels, as fast to read as the image cache, which is not written yet."""

    def __init__(self, manifest: Manifest, size: tuple[int, int]) -> None:
        super().__init__(manifest, size, None)
        self._pixels = np.random.default_rng(0).integers(0, 256, (EVALUATED, *size, 3), np.uint8)

    def batch(self, indices: Indices | Sequence[int]) -> Pixels:
        """Return images (n, height, width, 3) uint8, a copy."""
        return self._pixels[np.asarray(indices) % EVALUATED]


class FirstSteps:
    """The first batches of an epoch, and the seconds from each to the next."""

    def __init__(self, loader: TrainLoader, finish: Callable[[], object]) -> None:
        self._loader, self._finish = loader, finish
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        """Yield batches until the time is over."""
        times = [perf_counter()]
        for batch in self._loader.epoch(epoch):
            yield batch
            self._finish()
            times.append(perf_counter())
            if len(times) > MAX_STEPS or times[-1] - times[0] > SECONDS:
                break
        self.seconds = [after - before for before, after in pairwise(times)]


class Trial:
    """The trainings of one data set, each from its start."""

    def __init__(self, fabric: Fabric, params: Params, manifest: Manifest, folder: Path) -> None:
        self.fabric, self.params, self.manifest, self._folder = fabric, params, manifest, folder
        self._size = (params.data.image_size[0], params.data.image_size[1])
        cached = params.data.cache
        self._images = RandomImages(manifest, self._size) if cached else Images(manifest, self._size, None)

    def teacher(self) -> Timed:
        """Time the teacher, with random weights."""
        return self._time("teacher", TeacherTask(self.params.teacher, None), self._build_teacher)

    def student(self, method: str) -> Timed:
        """Time the student of a method, with a teacher of random weights.

        The teacher is evaluated in each step, unless its outputs are stored.
        """
        own = self.params.teacher.source == "onnx" or self.params.student.architecture.depth
        start = "random" if own else "teacher"
        config = self.params.student.model_copy(
            update={
                "method": method,
                "init": "random" if "random" in (start, self.params.student.init) else "teacher",
                # A latency budget takes a minute to measure, and leaves a network of about the same size.
                "budget": self.params.student.budget.model_copy(
                    update={
                        "of": "macs" if self.params.student.budget.of == "latency" else self.params.student.budget.of
                    }
                ),
            }
        )
        params = self.params.model_copy(update={"student": config})
        teacher = self._teacher_of_student()
        calibration = normalise(as_tensor(self._images.batch(list(range(CALIBRATION)))).to(self.fabric.device))
        full = student_spec(teacher, params, len(self.manifest.train_identities))
        budget_cost = cost_model(full, config, self._size)
        task = student_task(self.fabric, params, teacher, budget_cost, 10**6, calibration, None, full)
        if config.distill.views:  # stored outputs are read in almost no time; the estimate adds that of the teacher
            outputs = cache(lambda images: task.teacher_outputs(calibration[torch.arange(images) % CALIBRATION]))
            task.cache = lambda batch: outputs(len(batch.images))
        return self._time("student", task, lambda: build_student(params, teacher, task.compression), teacher)

    def _build_teacher(self) -> RetrievalNet:
        return build_teacher(
            self.params.teacher.model_copy(update={"weights": "none"}), len(self.manifest.train_identities)
        )

    def _teacher_of_student(self) -> TeacherNet:
        identities = len(self.manifest.train_identities)
        if self.params.teacher.source == "train":
            return self._build_teacher().eval()
        return unchecked_teacher(self.params, identities)

    def _time(
        self, stage: str, task: Task, start: Callable[[], RetrievalNet], teacher: TeacherNet | None = None
    ) -> Timed:
        training = getattr(self.params, stage)
        loader = training_loader(self.manifest, self._images, training, self.params)
        steps = FirstSteps(loader, lambda: device_memory(self.fabric.device))
        long = training.model_copy(update={"epochs": 10_000})  # so that nothing is scheduled in these steps
        checkpoints = Checkpoints(self._folder / "checkpoints")
        states = Fit(self.fabric, long, task, steps, normalise, checkpoints, lambda row: None).states(start)
        next(states)
        began = perf_counter()
        state = next(states)
        epoch = perf_counter() - began - sum(steps.seconds)
        checkpoints.clear()
        seconds = steps.seconds[1:] or steps.seconds
        times: dict[str, float] = {}
        if min(seconds) * EVALUATED / training.batch.size < SECONDS:
            indices = self.manifest.indices("query", "gallery")
            some = indices[np.arange(EVALUATED) % len(indices)]
            for name, net in (("image", state.net.eval()), ("teacher", teacher)):
                if net is not None:
                    began = perf_counter()
                    embed(net, self._images, some, normalise, self.fabric.device)
                    times[name] = (perf_counter() - began) / EVALUATED
        return Timed(seconds=seconds, steps=len(loader), epoch=epoch, **times)


def main() -> None:
    """Measure the stage in `sys.argv`."""
    die_with_parent()
    score = Path("/proc/self/oom_score_adj")
    if score.is_file():  # if memory does not suffice, Linux ends this process before any other one
        score.write_text("1000")
    stage, folder, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    params = Params.model_validate_json((folder / PARAMS).read_text(encoding="utf-8"))
    limit_threads(params.runtime.threads)
    fabric = launch(params.runtime.alone(), params.seed)
    trial = Trial(fabric, params, Manifest.read(folder / MANIFEST, root), folder)

    def report(whole: Timed, shrunk: Timed | None = None) -> None:
        measured = Measured(
            whole=whole,
            shrunk=shrunk,
            memory=peak_memory(),
            device_memory=device_memory(fabric.device),
            threads=torch.get_num_threads(),
        )
        sys.stdout.write(measured.model_dump_json() + "\n")
        sys.stdout.flush()

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    student = params.student
    whole = trial.teacher() if stage == "teacher" else trial.student(student.method)
    report(whole)
    if stage == "student" and student.method == "budget" and student.shrink == "live":
        report(whole, trial.student("static-random"))  # has the size of the end from the start


if __name__ == "__main__":
    main()
