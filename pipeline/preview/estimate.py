"""Time and memory of a training on this machine, from a few of its steps.

A process of its own takes real steps: the chosen network, batch, image size, losses, optimiser and threads, on random
pixels where the images are cached and on the real images where each step decodes them. Its peak memory is that of the
stage, as far as the first steps and an evaluation batch reach it.
"""

import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.config import Params
from pipeline.data.manifest import UNLABELLED, Manifest
from pipeline.files import write_text

IMPORTS, LIMIT, STEP = 300.0, 30.0, 25.0
"""Seconds that a process may take after its imports, and that its first step has taken if it does not keep to that."""
PARAMS, MANIFEST = "params.json", "manifest.csv"


class Timed(BaseModel):
    """Measured steps of one network.

    Attributes:
        seconds: Duration of each step, without the first one if there are others.
        steps: Steps of an epoch.
        epoch: Seconds that an epoch takes beside its steps, such as those of saving the state.
        image: Seconds to embed one image; None if it was not measured.
        teacher: Seconds that the teacher of a student takes for one; None if it was not measured.
    """

    model_config = ConfigDict(frozen=True)

    seconds: list[float]
    steps: int
    epoch: float
    image: float | None = None
    teacher: float | None = None


class Measured(BaseModel):
    """What the process of one stage measured.

    Attributes:
        whole: With the network as it starts.
        shrunk: With the student as it ends; None if its end is not known before, or equals its start.
        memory: Peak memory of the process, bytes.
        device_memory: Peak memory on a GPU, bytes.
        threads: Threads of the process.
    """

    model_config = ConfigDict(frozen=True)

    whole: Timed
    shrunk: Timed | None
    memory: int
    device_memory: int | None
    threads: int


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to take.

    Attributes:
        steps: Optimiser steps of the whole training.
        step: Lower and upper quartile of the seconds of a step, or the mean where it is larger than the upper one; the
            lower one is that of the shrunk student.
        seconds: Lower and upper time of the stage; a student that shrinks lies in between.
        measured: What they follow from.
    """

    steps: int
    step: tuple[float, float]
    seconds: tuple[float, float]
    measured: Measured


class EstimateError(RuntimeError):
    """The steps of a stage could not be measured."""


def estimate(stage: str, params: Params, manifest: Manifest) -> Estimate:
    """Measure the steps of stage `teacher` or `student`, and extrapolate them to the whole training.

    Raises:
        EstimateError: If a step takes too long, or the process fails or runs out of memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / PARAMS, params.model_dump_json())
        manifest.write(Path(folder) / MANIFEST)
        command = [sys.executable, "-m", "pipeline.preview.steps", stage, folder, str(manifest.root)]
        messages = Path(folder) / "stderr"
        with (
            messages.open("w") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
        ):
            start = threading.Timer(IMPORTS, process.kill)  # imports take long on a busy machine
            start.start()
            output = process.stdout.readline() if process.stdout else ""
            start.cancel()
            try:
                more, _ = process.communicate(timeout=LIMIT)
                failed = process.returncode
            except subprocess.TimeoutExpired:
                process.kill()
                more, _ = process.communicate()
                failed = 0  # the lines that it wrote before are complete
        errors = messages.read_text(encoding="utf-8", errors="replace")
    lines = (output + more).split()
    if failed:
        why = "it was killed, probably because memory did not suffice" if failed < 0 else _last(errors)
        raise EstimateError(f"a training step failed: {why}")
    if len(lines) < 2:
        steps = _steps(stage, params, manifest)
        raise EstimateError(
            f"one step takes more than {STEP:.0f} s, so all {steps:,} take more than {steps * STEP / 3600:.1f} h; "
            "use a GPU, or make the images, the batch or the network smaller"
        )
    return _extrapolate(stage, params, manifest, Measured.model_validate_json(lines[-1]))


def _last(text: str) -> str:
    """Return the last line of a traceback, without the module of the exception."""
    line = text.strip().splitlines()[-1] if text.strip() else "no message"
    return re.sub(r"^[\w.]+Error: ", "", line)


def _steps(stage: str, params: Params, manifest: Manifest) -> int:
    """Return about how many steps the training has: an epoch shows each image about once."""
    training = getattr(params, stage)
    images = training.batch.labelled
    return training.epochs * -(-len(manifest.indices("train")) // images)


def _extrapolate(stage: str, params: Params, manifest: Manifest, measured: Measured) -> Estimate:
    training = getattr(params, stage)
    validations = -(-training.epochs // training.validate_every)
    embedded = validations * len(manifest.indices("validation-query", "validation-gallery"))
    embedded += len(manifest.indices("query", "gallery"))
    viewed = 0
    if stage == "student":  # the teacher embeds each view once
        splits = ("train", UNLABELLED) if training.batch.unlabelled else ("train",)
        viewed = training.distill.views * len(manifest.indices(*splits))

    def bounds(timed: Timed) -> tuple[float, float]:
        low, high = (float(value) for value in np.quantile(timed.seconds, (0.25, 0.75)))
        return low, max(high, float(np.mean(timed.seconds)))  # on a busy machine a few steps take most of the time

    low, high = bounds(measured.whole)
    if measured.shrunk is not None:
        low = min(low, bounds(measured.shrunk)[0])
    image = measured.whole.image
    if image is None:
        image = high / training.batch.size  # a step takes longer than that
    steps = measured.whole.steps * training.epochs
    teacher = measured.whole.teacher or image
    rest = embedded * image + viewed * teacher + training.epochs * measured.whole.epoch
    return Estimate(steps, (low, high), (steps * low + rest, steps * high + rest), measured)
