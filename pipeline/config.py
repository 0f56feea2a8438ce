"""Every number of a run, checked before anything heavy is imported.

`Params` mirrors params.yaml section by section. Nothing has a default here: the file that DVC tracks is the
whole truth about a run, and a missing key is as much an error as a mistyped one.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]

PUBLISHED = (18, 34, 50, 101, 152)
"""Depths that torchvision publishes weights of, at width 64."""


class Section(BaseModel):
    """A frozen part of params.yaml that refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=True
    )


# --- data -------------------------------------------------------------------------------------------------------------


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


class Data(Section):
    """Stage `prepare`."""

    source: Literal["vehicles", "veri776"]
    """Layout of the raw data; `vehicles` renders a set of its own in the layout of VeRi-776."""
    root: Annotated[str, Field(min_length=1)]
    """Folder of the raw data, relative to the repository; a dependency of the stage."""
    image_size: Annotated[list[Annotated[int, Field(ge=16, le=2048)]], Field(min_length=2, max_length=2)]
    """Height and width that every image is resized to, pixels."""
    cache: bool
    """Keep the resized images as one uint8 array (h * w * 3 bytes an image); else decode at every use."""
    validation: Annotated[float, Field(ge=0, le=0.5)]
    """Share of the training identities held out to validate on; the test set is never validated on."""
    max_quarantined: Fraction
    """Share of unreadable images above which the stage stops."""
    vehicles: Vehicles


# --- training ---------------------------------------------------------------------------------------------------------


class Batch(Section):
    """A P x K batch."""

    identities: Annotated[int, Field(ge=2, le=4096)]
    """P, identities in a batch (16 in the paper's code)."""
    instances: Annotated[int, Field(ge=2, le=256)]
    """K, images of each of them (6 in the paper's code)."""


class Augment(Section):
    """Random changes to a training image, drawn from (seed, epoch, sample)."""

    flip: Fraction
    """Probability of a horizontal flip."""
    pad: Annotated[int, Field(ge=0, le=256)]
    """Pixels of zero padding on every side before the random crop (10 in the paper)."""
    erase: Fraction
    """Probability of random erasing (0.5 in the paper)."""


class Losses(Section):
    """Retrieval losses; `recipe` says which of the numbers are read."""

    scale: Annotated[float, Field(gt=0, le=128)]
    """Factor on the cosine logits (recipe `scratch`)."""
    margin: Annotated[float, Field(ge=0, lt=1)]
    """Cosine margin of the true identity (recipe `scratch`)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Label smoothing of the cross entropy (recipe `paper`: 0.1)."""
    triplet_weight: Annotated[float, Field(ge=0, le=100)]
    """Weight of the batch-hard triplet loss."""
    triplet_margin: Annotated[float, Field(ge=0, le=10)]
    """Margin of the triplet loss on Euclidean distances (recipe `paper`: 0.35)."""
    triplet_scale: Annotated[float, Field(gt=0, le=128)]
    """Sharpness of the soft triplet loss on cosine distances (recipe `scratch`)."""


class Optimizer(Section):
    """How weights follow gradients."""

    name: Literal["adamw", "sgd"]
    """`adamw` (decoupled decay) or `sgd` (Nesterov off, as in the paper)."""
    lr: Annotated[float, Field(gt=0, le=10)]
    """Learning rate at the plateau."""
    classifier_lr: Annotated[float, Field(gt=0, le=100)]
    """Factor on the learning rate of the identity classifier (1.5 in the paper)."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)]
    """Weight decay; compactors and gates have none."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of `sgd` (0.9 in the paper)."""
    warmup: Fraction
    """Share of the steps over which the learning rate rises linearly from a tenth."""
    hold: Fraction
    """Share of the steps after which the learning rate falls along a cosine."""
    final_lr: Annotated[float, Field(ge=0, le=1)]
    """Learning rate of the last step, as a share of `lr`."""

    @model_validator(mode="after")
    def _warm_before_cold(self) -> Self:
        if self.warmup > self.hold:
            raise ValueError(f"`warmup` ({self.warmup}) must not exceed `hold` ({self.hold})")
        return self


class Training(Section):
    """What teacher and student training have in common."""

    recipe: Literal["scratch", "paper"]
    """`scratch`: cosine softmax with a margin and soft triplet; `paper`: smoothed cross entropy and hard triplet."""
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    """Passes over the training images."""
    validate_every: Annotated[int, Field(ge=1, le=10_000)]
    """Epochs between two validations on the held-out identities; the last epoch is always validated."""
    batch: Batch
    augment: Augment
    optimizer: Optimizer
    losses: Losses


class Teacher(Training):
    """Stage `teacher`."""

    depth: Literal[14, 18, 26, 34, 50, 101, 152]
    """Depth of the ResNet; 18 and 34 have basic blocks, the others bottlenecks."""
    width: Annotated[int, Field(ge=8, le=512, multiple_of=8)]
    """Channels of the stem and planes of the first stage (64 in torchvision)."""
    embedding_dim: Annotated[int, Field(ge=8, le=8192)]
    """Length of the embedding (512 in the paper)."""
    last_stride: Literal[1, 2]
    """Stride of the last stage (1 in re-identification: larger maps, better retrieval)."""
    weights: Annotated[str, Field(min_length=1)]
    """`none`, `imagenet` (torchvision's published weights) or the path of a torchvision-named state dict."""


class Budget(Section):
    """How much the student must give up, and when."""

    of: Literal["macs", "params"]
    """What is counted: multiply-accumulates or parameters of backbone and embedding head."""
    reduction: Annotated[float, Field(ge=0, lt=1)]
    """Share to remove; the result lies in [reduction, reduction + 0.01]."""
    start: Fraction
    """Share of the steps after which channels begin to be masked (end of the warm-up)."""
    end: Fraction
    """Share of the steps after which all of the budget is masked (cubic schedule in between)."""
    fade: Annotated[float, Field(gt=0, le=1)]
    """Share of the steps that a masked row takes to become exactly zero."""
    every: Annotated[int, Field(ge=1, le=10_000)]
    """Steps between two revisions of the masks."""

    @model_validator(mode="after")
    def _room_to_fade(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"`start` ({self.start}) must lie before `end` ({self.end})")
        if self.end + self.fade > 1:
            raise ValueError(
                f"`end` + `fade` must not exceed 1, got {self.end} + {self.fade}: rows masked last could not reach "
                "zero before training ends"
            )
        return self


class Distill(Section):
    """What the student takes over from the teacher."""

    kl: Annotated[float, Field(ge=0, le=100)]
    """Weight of the KL divergence between softened logits (1.0 in the paper)."""
    temperature: Annotated[float, Field(gt=0, le=100)]
    """Temperature of the softened logits (2 in the paper)."""
    feature: Annotated[float, Field(ge=0, le=100)]
    """Weight of the L2 distance between the outputs of the four stages (0.5 in the paper)."""


class Resetting(Section):
    """Retrieval-guided gradient resetting."""

    neighbours: Annotated[int, Field(ge=1, le=1000)]
    """k, nearest neighbours by the teacher's embedding (2 in the paper)."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of the moving average of a channel's contribution to retrieval."""


class Student(Training):
    """Stage `student`."""

    method: Literal["budget", "none"]
    """`budget`: shrink to the budget while learning; `none`: distil only, nothing is removed."""
    init: Literal["teacher", "imagenet"]
    """Where the first weights come from."""
    budget: Budget
    sites: Annotated[list[Literal["conv1", "conv2", "stream"]], Field(min_length=1, max_length=3)]
    """What may become narrower: the outputs of a block's first or second convolution, which get compactors, and the
    residual stream of each stage, which gets gates."""
    channel_multiple: Annotated[int, Field(ge=1, le=64)]
    """Widths stay whole multiples of it (8: the blocks of ONNX Runtime on AVX2), and at least one."""
    shrink: Literal["live", "off"]
    """`live`: rows that died are cut out at the end of each epoch; `off`: only at the end, by stage surgery."""
    distill: Distill
    resetting: Resetting


# --- after training ---------------------------------------------------------------------------------------------------


class Surgery(Section):
    """Stage `surgery`."""

    tolerance: Annotated[float, Field(ge=0, le=1e-2)]
    """Largest norm of a compactor row that counts as zero; the student's are exactly zero."""
    channel_multiple: Annotated[int, Field(ge=1, le=64)]
    """Widths that are not whole multiples of it are refused."""


class Gates(Section):
    """What an exported file must pass, or there is none."""

    min_cosine: Annotated[float, Field(gt=0, le=1)]
    """Smallest cosine between the embeddings of torch and of ONNX Runtime, over all test images."""
    map_difference: Fraction
    """Largest absolute difference of mAP between torch and ONNX Runtime."""


class Export(Section):
    """Stage `export`."""

    opset: Annotated[int, Field(ge=18, le=23)]
    """ONNX operator set."""
    precisions: Annotated[list[Literal["fp32"]], Field(min_length=1)]
    """Files to write."""
    gates: Gates


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


class Tracking(Section):
    """MLflow."""

    experiment: Annotated[str, Field(min_length=1)]
    """Experiment that runs are recorded in."""
    model_name: Annotated[str, Field(min_length=1)]
    """Name in the model registry."""


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
