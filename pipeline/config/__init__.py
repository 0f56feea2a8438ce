"""The schema of params.yaml, which is validated before anything heavy is imported.

There are no defaults: the file that DVC tracks determines a run completely, so a missing key is an error.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.agreement import problems
from pipeline.config.section import Count, Fraction, Section
from pipeline.config.training import (
    Architecture,
    Augment,
    Batch,
    Budget,
    Optimizer,
    Student,
    Teacher,
    TeacherInput,
    Training,
)

__all__ = [
    "Architecture",
    "Augment",
    "Batch",
    "Budget",
    "Optimizer",
    "Params",
    "Student",
    "Teacher",
    "TeacherInput",
    "Training",
]


class Vehicles(Section):
    """Size of the rendered data set (source `vehicles`)."""

    train_identities: Annotated[int, Field(ge=2, le=20_000)]
    """Number of vehicles in the training set (folder image_train)."""
    test_identities: Annotated[int, Field(ge=2, le=20_000)]
    """Number of vehicles in the test set (folders image_query and image_test); none of them is in the training set."""
    unlabelled_identities: Annotated[int, Field(ge=0, le=20_000)]
    """Number of further vehicles without labels, for distillation only (folder image_unlabelled). All other images are
    the same for any number."""
    views: Annotated[int, Field(ge=1, le=20)]
    """Images of each vehicle in each of the six cameras."""
    size: Annotated[int, Field(ge=16, le=1024)]
    """Height and width of a rendered image, pixels."""


class VehicleId(Section):
    """The test set of VehicleID (source `vehicleid`)."""

    test_identities: Literal[800, 1600, 2400]
    """Number of vehicles in the test set: small, medium or large."""


class Custom(Section):
    """Your own images (sources `folder` and `csv`)."""

    table: Annotated[str, Field(min_length=1)]
    """Source `csv`: name of the table in `data.root`, with columns path, identity and, if known, camera, split and a
    box in pixels: x, y, width, height, or x1, y1, x2, y2."""
    pattern: str
    """Source `folder`: regular expression that finds the camera in a file name, as group `camera`, such as
    `_(?P<camera>c\\d+)_`. Leave it empty if folders name the camera or if it is unknown."""
    test: Annotated[float, Field(gt=0, lt=1)]
    """Share of the identities that become the test set if no split is given. Each identity is assigned independently,
    so new identities do not move the others."""

    @field_validator("pattern")
    @classmethod
    def _has_camera_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        if pattern and "camera" not in groups:
            raise ValueError("must have a group (?P<camera>...)")
        return pattern


class Data(Section):
    """Stage `prepare`: the images, their split, and the evaluation protocol."""

    source: Annotated[str, Field(min_length=1)]
    """Layout of the raw images. `vehicles` renders a data set in the layout of VeRi-776; `folder` and `csv` are for
    your own images."""
    root: Annotated[str, Field(min_length=1)]
    """Folder of the raw images, relative to the repository. It is a DVC dependency of the stage."""
    protocol: Annotated[str, Field(min_length=1)]
    """How every mAP is computed. `market` ignores images of the query's identity from the query's camera;
    `market-trapezoid` does the same with the interpolation of Market-1501's script; `query-gallery` ignores nothing;
    `loo` compares every test image with all others; `vehicleid` draws one image per identity as the gallery, ten
    times."""
    image_size: Annotated[list[Annotated[int, Field(ge=16, le=2048)]], Field(min_length=2, max_length=2)]
    """Height and width that every image is resized to, pixels."""
    cache: bool
    """Whether the resized images are stored in one uint8 array (3 bytes per pixel), or decoded at every use."""
    validation: Annotated[float, Field(ge=0, le=0.5)]
    """Share of the training identities held out for validation; the test set is never used for it."""
    max_quarantined: Fraction
    """Largest share of unreadable images, among those with labels and among those without; the stage fails if there are
    more."""
    max_leaked: Fraction
    """Largest share of test images with the same pixels as a training image; the stage fails if there are more."""
    closed_set: bool
    """Whether identities of the test set may be in training too, as for products that are known in advance. Every
    figure then names it, since it does not measure unseen identities."""
    near_duplicate_bits: Annotated[int, Field(ge=-1, le=16)]
    """Bits of a 64-bit perceptual hash in which near duplicates may differ: of training and test images, which are
    reported, and of unlabelled and test or validation images, of which the unlabelled ones are removed. -1 turns the
    search off; then only equal pixels count."""
    unlabelled: list[str]
    """Folders in `root`, relative to it, of images without labels, for distillation only. With source `folder` they are
    no identities; with other sources an image that the data set lists keeps its labels. Images that are in the test or
    the validation set too, or look like an image there, are removed. Empty for none, and for source `vehicles`."""
    vehicles: Vehicles
    vehicleid: VehicleId
    custom: Custom

    @field_validator("unlabelled")
    @classmethod
    def _are_separate_folders_in_root(cls, folders: list[str]) -> list[str]:
        paths = [PurePosixPath(folder) for folder in folders]
        for folder, path in zip(folders, paths, strict=True):
            if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in folder or "\0" in folder:
                raise ValueError(
                    "must list folders inside of `data.root`, relative to it, with forward slashes and without `..`, "
                    f"got {folder!r}"
                )
        for number, path in enumerate(paths):
            for other in paths[:number]:
                if path == other:
                    raise ValueError(f"lists {str(path)!r} twice, remove one")
                outer, inner = sorted((path, other), key=lambda one: len(one.parts))
                if inner.is_relative_to(outer):
                    raise ValueError(f"lists {str(outer)!r} and a folder in it, {str(inner)!r}, remove the inner one")
        return list(map(str, paths))


class Surgery(Section):
    """Stage `surgery`: cutting the zero channels out."""

    tolerance: Annotated[float, Field(ge=0, le=1e-2)]
    """Largest L2 norm of a compactor row that counts as zero. Method `budget` leaves exact zeros."""
    channel_multiple: Annotated[int, Field(ge=1, le=64)]
    """Number that every reduced width must be a multiple of; it must divide `student.channel_multiple`."""


class Limits(Section):
    """The checks that an exported file must pass to be written."""

    min_cosine: Annotated[float, Field(gt=0, le=1)]
    """Smallest allowed cosine between the embeddings of PyTorch and of ONNX Runtime, over all test images."""
    map_difference: Fraction
    """Largest allowed absolute difference of mAP between PyTorch and ONNX Runtime."""
    int8_map_loss: Fraction
    """Largest allowed loss of mAP by the int8 file. It must also be faster on this machine."""


class Export(Section):
    """Stage `export`: the ONNX files."""

    opset: Annotated[int, Field(ge=18, le=23)]
    """Version of the ONNX operator set; older runtimes support the lower ones only."""
    batch: Literal["dynamic"] | Annotated[int, Field(ge=1, le=1024)]
    """Images in each call of a file: `dynamic` for any number, or a fixed number, for runtimes that want one;
    `benchmark.batches` must then be that number alone."""
    precisions: Annotated[list[Literal["fp32", "int8"]], Field(min_length=1)]
    """Files to write: fp32 is required, int8 is written if it passes its checks."""
    licence: Annotated[str, Field(min_length=1)]
    """Terms of use in the model card and the file's metadata; the licence of the training data may restrict them."""
    limits: Limits

    @property
    def fixed_batch(self) -> int | None:
        """Images in each call, or None for any number."""
        return None if self.batch == "dynamic" else self.batch

    @field_validator("batch", mode="before")
    @classmethod
    def _is_dynamic_or_a_number(cls, batch: object) -> object:
        # Checked before the types: pydantic reports a problem for each member of a union.
        if batch != "dynamic" and not (type(batch) is int and 1 <= batch <= 1024):
            raise ValueError(f"must be dynamic or a whole number in [1, 1024], got {batch!r}")
        return batch

    @model_validator(mode="after")
    def _has_fp32(self) -> Self:
        if "fp32" not in self.precisions:
            raise ValueError(f"`precisions` must contain fp32, got {self.precisions}")
        return self


class Benchmark(Section):
    """Stage `benchmark`: latency and the report."""

    batches: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1)]
    """Batch sizes to time, images. `speedup` is reported for the smallest: 1, which is required, or `export.batch`."""
    threads: Annotated[list[Annotated[int, Field(ge=0, le=1024)]], Field(min_length=1)]
    """Numbers of intra-op threads to time. 0 stands for all that the process may use (`runtime.threads`), and is
    required; the report and metrics/benchmark.json name the number."""
    repeats: Annotated[int, Field(ge=3, le=100_000)]
    """Timed calls of each file at each setting; the files are timed in turns."""
    panels: Annotated[int, Field(ge=1, le=100)]
    """Number of queries shown in the report with their nearest images."""

    @model_validator(mode="after")
    def _has_reported_setting(self) -> Self:
        if 0 not in self.threads:
            raise ValueError(f"`threads` must contain 0 (all), got {self.threads}")
        return self


class Runtime(Section):
    """Hardware, and how training uses it."""

    def alone(self) -> "Runtime":
        """Return the section for one device, for work other than training."""
        return self.model_copy(update={"devices": 1, "nodes": 1, "strategy": "auto"})

    accelerator: Literal["auto", "cpu", "gpu"]
    """Kind of device; `auto` uses a GPU if there is one."""
    devices: Count
    """Devices per node."""
    nodes: Count
    """Number of machines."""
    strategy: Literal["auto", "ddp"]
    """How Lightning Fabric distributes training over devices."""
    precision: Literal["auto", "32-true", "bf16-mixed"]
    """Number format of training; `auto` is bf16-mixed on a GPU that supports it, else 32-true."""
    threads: Annotated[int, Field(ge=0, le=1024)]
    """Largest number of threads of a process, for training, decoding and ONNX Runtime; 0 for one on each available
    core. OMP_NUM_THREADS and the available cores limit it too: the smallest of the three counts. Another number rounds
    sums differently, so on a CPU the weights have other last digits."""
    workers: Annotated[int, Field(ge=0, le=256)]
    """Processes that load images; 0 loads them in the training process."""
    teacher_cache_gib: Annotated[float, Field(ge=0, le=100_000)]
    """Disk space for outputs of teachers that are kept after a training (`student.distill.views`), GiB, so that further
    students of the same teacher, with another method, budget or schedule, need not compute them; 0 keeps none."""


class Promotion(Section):
    """The promotion rule: how much worse than the champion a new model may be and still replace it."""

    margin: Annotated[float, Field(ge=0, le=1)]
    """Largest allowed loss of mAP, measured by the lower end of the 95 % confidence interval of the difference."""
    max_size_ratio: Annotated[float, Field(gt=0)]
    """Largest allowed size of model.onnx, as a multiple of the champion's."""
    max_latency_ratio: Annotated[float, Field(gt=0)]
    """Largest allowed latency of one image, as a multiple of the champion's."""


class Tracking(Section):
    """MLflow."""

    experiment: Annotated[str, Field(min_length=1)]
    """MLflow experiment that runs are logged to."""
    model_name: Annotated[str, Field(min_length=1)]
    """Name of the model in MLflow's registry."""
    promotion: Promotion
    """The rule by which `publish` promotes a challenger to champion."""


class Retrain(Section):
    """What `smaller-student retrain` and its schedules do in addition to `dvc repro`."""

    refresh: str
    """Command that fetches new data into `data.root`, run in the repository before the stages. Empty for none."""
    incoming: str
    """Folder whose files are moved into `data.root`, with the same relative paths. Empty for none."""
    limit_hours: Annotated[float, Field(gt=0, le=1000)]
    """Time limit of the command `refresh` and of each stage, hours. An interrupted training is resumed by the next
    run."""
    publish: bool
    """Whether the release is registered, and promoted if the promotion rule permits."""
    branch: str
    """Branch to commit params.yaml, dvc.lock, metrics and plots to; it must not be checked out. Empty for none."""

    @field_validator("branch")
    @classmethod
    def _is_a_branch(cls, value: str) -> str:
        if value and not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", value):
            raise ValueError(f"is not a valid branch name, got {value!r}")
        return value


class Params(Section):
    """The content of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    """Seed that every random choice derives from."""
    data: Data
    teacher: Teacher
    student: Student
    surgery: Surgery
    export: Export
    benchmark: Benchmark
    runtime: Runtime
    tracking: Tracking
    retrain: Retrain

    @property
    def trainings(self) -> tuple[tuple[str, Training], ...]:
        """The stages that train a network, and their sections."""
        student = ("student", self.student)
        return (("teacher", self.teacher), student) if self.teacher.source == "train" else (student,)

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if found := "; ".join(problems(self)):
            raise ValueError(found)
        return self
