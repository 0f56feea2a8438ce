"""Every number of a run, checked before anything heavy is imported.

`Params` mirrors params.yaml section by section. Nothing has a default here: the file that DVC tracks is the
whole truth about a run, and a missing key is as much an error as a mistyped one.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Count, Fraction, Section
from pipeline.config.training import Augment, Batch, Budget, Optimizer, Student, Teacher, Training

__all__ = ["Augment", "Batch", "Budget", "Optimizer", "Params", "Student", "Teacher", "Training"]

PUBLISHED = (18, 34, 50, 101, 152)
"""Depths that torchvision publishes weights of, at width 64."""


class Vehicles(Section):
    """Size of the rendered default data set (source `vehicles`)."""

    train_identities: Annotated[int, Field(ge=2, le=20_000)]
    """Vehicles in image_train."""
    test_identities: Annotated[int, Field(ge=1, le=20_000)]
    """Vehicles in image_query and image_test, none of them in image_train."""
    views: Annotated[int, Field(ge=1, le=20)]
    """Images of a vehicle in each of the six cameras."""
    size: Annotated[int, Field(ge=16, le=1024)]
    """Height and width of a rendered image, pixels."""


class VehicleId(Section):
    """Which test set of VehicleID (source `vehicleid`)."""

    test_identities: Literal[800, 1600, 2400]
    """Vehicles in the small, the medium and the large one."""


class Custom(Section):
    """Data of one's own (sources `folder` and `csv`)."""

    table: Annotated[str, Field(min_length=1)]
    """Source `csv`: the table, in `data.root`: path, identity and, if known, camera and split."""
    pattern: str
    """Source `folder`: regular expression that finds the camera in a file's name, as group `camera`, such as
    `_(?P<camera>c\\d+)_`; empty where folders say it or nobody knows."""
    test: Annotated[float, Field(gt=0, lt=1)]
    """Share of the identities that become the test set, where no split is given; each by itself, so that none changes
    sides when others come."""

    @field_validator("pattern")
    @classmethod
    def _finds_a_camera(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        if pattern and "camera" not in groups:
            raise ValueError("must have a group (?P<camera>...)")
        return pattern


class Data(Section):
    """Stage `prepare`."""

    source: Annotated[str, Field(min_length=1)]
    """Layout of the raw data; `vehicles` renders a set of its own in the layout of VeRi-776, `folder` and `csv` are for
    data of one's own."""
    root: Annotated[str, Field(min_length=1)]
    """Folder of the raw data, relative to the repository; a dependency of the stage."""
    protocol: Annotated[str, Field(min_length=1)]
    """How every mAP is computed: `market` leaves out images of the query's identity from its own camera;
    `query-gallery` leaves out nothing; under `loo` every test image is asked of all others; `vehicleid` draws one image
    of each identity as gallery, ten times."""
    image_size: Annotated[list[Annotated[int, Field(ge=16, le=2048)]], Field(min_length=2, max_length=2)]
    """Height and width that every image is resized to, pixels."""
    cache: bool
    """Keep the resized images as one uint8 array (h * w * 3 bytes an image); else decode at every use."""
    validation: Annotated[float, Field(ge=0, le=0.5)]
    """Share of the training identities held out to validate on; the test set is never validated on."""
    max_quarantined: Fraction
    """Share of unreadable images above which the stage stops."""
    max_leaked: Fraction
    """Share of test images above which the stage stops when their pixels are in the training set too."""
    near_duplicate_bits: Annotated[int, Field(ge=-1, le=16)]
    """Bits of a 64-bit perceptual hash in which near duplicates may differ (reported, never refused); -1 looks for
    none."""
    vehicles: Vehicles
    vehicleid: VehicleId
    custom: Custom


class Surgery(Section):
    """Stage `surgery`."""

    tolerance: Annotated[float, Field(ge=0, le=1e-2)]
    """Largest norm of a compactor row that counts as zero; the student's are exactly zero."""
    channel_multiple: Annotated[int, Field(ge=1, le=64)]
    """Widths that are not whole multiples of it are refused."""


class Limits(Section):
    """What an exported file must pass, or there is none."""

    min_cosine: Annotated[float, Field(gt=0, le=1)]
    """Smallest cosine between the embeddings of torch and of ONNX Runtime, over all test images."""
    map_difference: Fraction
    """Largest absolute difference of mAP between torch and ONNX Runtime."""
    int8_map_loss: Fraction
    """Largest mAP that the int8 file may lose; if it loses more, or is not faster here, there is none."""


class Export(Section):
    """Stage `export`."""

    opset: Annotated[int, Field(ge=18, le=23)]
    """ONNX operator set."""
    precisions: Annotated[list[Literal["fp32", "int8"]], Field(min_length=1)]
    """Files to write; fp32 must be among them, int8 is tried where it is asked for."""
    licence: Annotated[str, Field(min_length=1)]
    """What the files may be used for, as card and metadata say it; the data that they learnt from have a word in it."""
    limits: Limits

    @model_validator(mode="after")
    def _has_floats(self) -> Self:
        if "fp32" not in self.precisions:
            raise ValueError(f"`precisions` must contain fp32, got {self.precisions}")
        return self


class Benchmark(Section):
    """Stage `benchmark`."""

    batches: Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1)]
    """Batch sizes to time; must contain 1, the size that `speedup` is told for."""
    threads: Annotated[list[Annotated[int, Field(ge=0, le=1024)]], Field(min_length=1)]
    """Intra-op threads to time; 0 stands for all that this process may use."""
    repeats: Annotated[int, Field(ge=3, le=100_000)]
    """Timed runs of each file at each setting, interleaved."""
    panels: Annotated[int, Field(ge=1, le=100)]
    """Queries shown in the report."""

    @model_validator(mode="after")
    def _has_headline(self) -> Self:
        if 1 not in self.batches:
            raise ValueError(f"`batches` must contain 1, got {self.batches}")
        if 0 not in self.threads:
            raise ValueError(f"`threads` must contain 0 (all), got {self.threads}")
        return self


class Runtime(Section):
    """Where it runs."""

    def alone(self) -> "Runtime":
        """The same on one device, for all that is not training."""
        return self.model_copy(update={"devices": 1, "nodes": 1, "strategy": "auto"})

    accelerator: Literal["auto", "cpu", "gpu"]
    """`auto` takes a GPU where there is one."""
    devices: Count
    """Devices a node."""
    nodes: Count
    """Machines."""
    strategy: Literal["auto", "ddp"]
    """How Lightning Fabric spreads training over devices."""
    precision: Literal["auto", "32-true", "bf16-mixed"]
    """`auto`: bf16-mixed on a GPU that has it, else 32-true."""
    workers: Annotated[int, Field(ge=0, le=256)]
    """Processes that load images; 0 loads in the training process."""
    teacher_cache_gib: Annotated[float, Field(ge=0, le=100_000)]
    """Disk for the teacher's answers, GiB, so that students that see the same images (another method, budget or
    schedule) need not ask again; 0 keeps none. The default network's take 10 kB an image and epoch."""


class Promotion(Section):
    """What a new model may cost, to take the place of the one in use."""

    margin: Annotated[float, Field(ge=0, le=1)]
    """mAP that may be lost: the lower end of the 95 % interval of the difference must lie above minus this."""
    max_size_ratio: Annotated[float, Field(gt=0)]
    """Size of model.onnx that is allowed, as a multiple of the champion's."""
    max_latency_ratio: Annotated[float, Field(gt=0)]
    """Time for one image that is allowed, as a multiple of the champion's."""


class Tracking(Section):
    """MLflow."""

    experiment: Annotated[str, Field(min_length=1)]
    """Experiment that runs are recorded in."""
    model_name: Annotated[str, Field(min_length=1)]
    """Name in the model registry."""
    promotion: Promotion
    """When `publish` makes a challenger the champion."""


class Retrain(Section):
    """What `smaller-student retrain` and its schedules do beside `dvc repro`."""

    refresh: str
    """Command that brings new data into `data.root`, run in the checkout before anything else; none where empty."""
    incoming: str
    """Folder whose files are moved into `data.root`, under the same relative paths; none where empty."""
    limit_hours: Annotated[float, Field(gt=0, le=1000)]
    """Time that the command of `refresh` has, and each stage; a training that is ended goes on at the next run."""
    publish: bool
    """Whether the release is registered, and promoted if the gate lets it pass."""
    branch: str
    """Branch that params.yaml, dvc.lock, metrics and plots are committed to, never the one that is checked out; none
    where empty."""

    @field_validator("branch")
    @classmethod
    def _is_a_branch(cls, value: str) -> str:
        if value and not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", value):
            raise ValueError(f"is no name of a branch, got {value!r}")
        return value


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    """Every random choice derives from it."""
    data: Data
    teacher: Teacher
    student: Student
    surgery: Surgery
    export: Export
    benchmark: Benchmark
    runtime: Runtime
    tracking: Tracking
    retrain: Retrain

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        complaints = []
        if self.data.source == "vehicles":
            training = self.data.vehicles.train_identities * (1 - self.data.validation)
            for stage, section in (("teacher", self.teacher), ("student", self.student)):
                if section.batch.identities > training:
                    complaints.append(
                        f"`{stage}.batch.identities` ({section.batch.identities}) exceeds the {int(training)} "
                        "identities that are left for training"
                    )
        if self.student.channel_multiple % self.surgery.channel_multiple:
            complaints.append(
                f"`surgery.channel_multiple` ({self.surgery.channel_multiple}) must divide `student.channel_multiple` "
                f"({self.student.channel_multiple})"
            )
        if self.student.method == "paper" and self.runtime.devices * self.runtime.nodes > 1:
            complaints.append(
                "`student.method` paper needs one device: its memory is not shared; set `runtime.devices` and "
                "`runtime.nodes` to 1"
            )
        if self.student.method == "paper" and self.surgery.tolerance > self.student.paper.threshold:
            complaints.append(
                f"`surgery.tolerance` ({self.surgery.tolerance:g}) must not exceed `student.paper.threshold` "
                f"({self.student.paper.threshold:g}): surgery would cut rows that fill up whole multiples"
            )
        if self.student.recipe != self.teacher.recipe:
            complaints.append(
                f"`student.recipe` ({self.student.recipe}) must equal `teacher.recipe` ({self.teacher.recipe}): their "
                "logits are compared"
            )
        published = self.teacher.depth in PUBLISHED and self.teacher.width == 64
        for name, asked in (("teacher.weights", self.teacher.weights), ("student.init", self.student.init)):
            if asked == "imagenet" and not published:
                complaints.append(
                    f"`{name}` is imagenet, but torchvision publishes no ResNet-{self.teacher.depth} of width "
                    f"{self.teacher.width}: set `teacher.depth` to one of {', '.join(map(str, PUBLISHED))} and "
                    "`teacher.width` to 64, or use other weights"
                )
        if complaints:
            raise ValueError("; ".join(complaints))
        return self
