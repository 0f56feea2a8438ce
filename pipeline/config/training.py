"""Sections `teacher` and `student`: losses, optimiser, distillation and compression.

"The paper" is Xie et al., "Towards a Smaller Student", CVPR 2023.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config.section import Fraction, Section


class Batch(Section):
    """Composition of a P x K batch."""

    identities: Annotated[int, Field(ge=2, le=4096)]
    """P, the number of identities in a batch (16 in the paper's code)."""
    instances: Annotated[int, Field(ge=2, le=256)]
    """K, the number of images of each identity (6 in the paper's code)."""

    @property
    def labelled(self) -> int:
        """Images with labels in a batch."""
        return self.identities * self.instances

    @property
    def size(self) -> int:
        """Images in a batch."""
        return self.labelled


class StudentBatch(Batch):
    """Composition of a batch of the student: P x K images with labels, and further images behind them."""

    unlabelled: Annotated[int, Field(ge=0, le=65_536)]
    """Images beside the P x K ones that only the distillation losses use. They are drawn at random from all training
    images and those of `data.unlabelled`. With them, the student is compared with its teacher at more points (Beyer et
    al., "A good teacher is patient and consistent", CVPR 2022)."""

    @property
    def size(self) -> int:
        """Images in a batch."""
        return self.labelled + self.unlabelled


class Augment(Section):
    """Random augmentation of training images, drawn from (seed, view, image)."""

    flip: Fraction
    """Probability of a horizontal flip."""
    pad: Annotated[int, Field(ge=0, le=256)]
    """Zero padding on each side before the random crop, pixels (10 in the paper)."""
    erase: Fraction
    """Probability of random erasing (0.5 in the paper)."""
    erase_area: Annotated[float, Field(ge=0.02, le=1)]
    """Largest share of an image that is erased (0.4 in the paper, too much for small images); the smallest is 0.02."""


class Losses(Section):
    """Settings of the retrieval losses; `recipe` determines which of them are used."""

    scale: Annotated[float, Field(gt=0, le=128)]
    """Recipe `scratch`: factor on the cosine logits."""
    margin: Annotated[float, Field(ge=0, lt=1)]
    """Recipe `scratch`: margin on the cosine of the true identity."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Recipe `paper`: label smoothing of the cross entropy (0.1 in the paper)."""
    triplet_weight: Annotated[float, Field(ge=0, le=100)]
    """Both recipes: weight of the batch-hard triplet loss."""
    triplet_margin: Annotated[float, Field(ge=0, le=10)]
    """Recipe `paper`: margin of the triplet loss on Euclidean distances (0.35 in the paper)."""
    triplet_scale: Annotated[float, Field(gt=0, le=128)]
    """Recipe `scratch`: sharpness of the soft triplet loss on cosine distances."""


class Optimizer(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "sgd"]
    """`adamw` (decoupled weight decay) or `sgd` (without Nesterov, as in the paper)."""
    lr: Annotated[float, Field(gt=0, le=10)]
    """Largest learning rate, between warm-up and decay."""
    classifier_lr: Annotated[float, Field(gt=0, le=100)]
    """Factor on the learning rate of the identity classifier (1.5 in the paper)."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)]
    """Weight decay; compactors, channel gates and scales, and the exponent of a pooling have none."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of `sgd` (0.9 in the paper)."""
    warmup: Fraction
    """Share of the steps in which the learning rate rises linearly from a tenth of `lr`."""
    hold: Fraction
    """Share of the steps after which the learning rate decays along a cosine; at least `warmup`."""
    final_lr: Annotated[float, Field(ge=0, le=1)]
    """Learning rate at the end, as a share of `lr`."""

    @model_validator(mode="after")
    def _warmup_before_decay(self) -> Self:
        if self.warmup > self.hold:
            raise ValueError(f"`warmup` ({self.warmup}) must not exceed `hold` ({self.hold})")
        return self


class Training(Section):
    """Settings that teacher and student share."""

    recipe: Literal["scratch", "paper"]
    """The retrieval losses. `scratch`: cosine softmax with a margin and soft triplet loss; `paper`: smoothed cross
    entropy and hard triplet loss."""
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    """Passes over the training images."""
    validate_every: Annotated[int, Field(ge=1, le=10_000)]
    """Epochs between two validations on the held-out identities; the last epoch is always validated."""
    batch: Batch
    augment: Augment
    optimizer: Optimizer
    losses: Losses


class TeacherInput(Section):
    """The images that a teacher from elsewhere expects."""

    mean: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(max_length=3)]
    """Subtracted from pixels in [0, 1], in the order red, green, blue; [] for that of the file (`pixel_mean` of
    fast-reid, metadata of ONNX files that were exported here), or ImageNet's if it has none. Divide statistics of
    pixels in [0, 255] by 255."""
    std: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=3)]
    """The difference is divided by it; [] as for `mean`. 0.00392157 (1/255) for pixels in [0, 255]."""
    bgr: bool
    """Whether the channels stand in the order blue, green, red, as OpenCV reads them."""
    size: Annotated[list[Annotated[int, Field(ge=16, le=2048)]], Field(max_length=2)]
    """Source `onnx`: height and width, pixels; [] for those of the file, or `data.image_size` if it takes any."""

    layout: Literal["auto", "channels-first", "channels-last"]
    """Source `onnx`: the order of the dimensions; `auto`: that in which the file's input has 3 channels."""

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _is_of_unit_pixels(cls, values: object) -> object:
        # Checked before the entries, so that there is one problem, with its remedy.
        if isinstance(values, list) and any(isinstance(value, int | float) and value > 1 for value in values):
            raise ValueError(f"must be at most 1, got {values}: divide statistics of pixels in [0, 255] by 255")
        return values

    @field_validator("mean", "std", "size")
    @classmethod
    def _is_empty_or_complete(cls, values: list[float], info: ValidationInfo) -> list[float]:
        count = 2 if info.field_name == "size" else 3
        if len(values) not in (0, count):
            raise ValueError(f"must be [] or {count} numbers, got {values}")
        return values


class Architecture(Section):
    """The network that a student starts as."""

    depth: Literal[0, 14, 18, 26, 34, 50, 101, 152]
    """Depth of the ResNet, layers; 0 for the teacher's architecture, unless the teacher is an ONNX file."""
    width: Annotated[int, Field(ge=8, le=512, multiple_of=8)]
    """Planes of the first stage (64 in torchvision)."""
    stem: Annotated[int, Field(ge=0, le=512, multiple_of=8)]
    """Channels of the stem; 0 for as many as `width`, which depths 18 and 34 require."""
    last_stride: Literal[1, 2]
    """Stride of the last stage."""


class Teacher(Training):
    """Stage `teacher`: the large network."""

    source: Literal["train", "checkpoint", "onnx"]
    """`train`: the network is trained here, from `weights`; `checkpoint`: `weights` is a trained ResNet, and its
    architecture is read from the file: a folder with spec.json and weights.safetensors, or a state dict of torchvision,
    torchreid, fast-reid or reid-strong-baseline; `onnx`: `weights` is an ONNX file of any architecture that turns
    images into embeddings."""
    input: TeacherInput
    """Sources `checkpoint` and `onnx`: the images that the network expects."""
    max_pool: Literal["auto", "padded", "unpadded"]
    """Source `checkpoint`: how the max pooling behind the stem treats the border; `auto`: unpadded for fast-reid,
    which has pooled without padding since version 1.0, padded for the others."""
    pool: Literal["auto", "average", "gem"]
    """Source `checkpoint`: how the last features are pooled; `auto`: by a generalised mean (`gem`) if the file has its
    exponent, else by the average. A `gem` without one in the file has 3, as `GeneralizedMeanPooling` of fast-reid."""
    depth: Literal[14, 18, 26, 34, 50, 101, 152]
    """Depth of the ResNet, layers; 18 and 34 have basic blocks, the others bottlenecks."""
    width: Annotated[int, Field(ge=8, le=512, multiple_of=8)]
    """Planes of the first stage (64 in torchvision)."""
    stem: Annotated[int, Field(ge=0, le=512, multiple_of=8)]
    """Channels of the stem; 0 for as many as `width`, which depths 18 and 34 require."""
    embedding_dim: Annotated[int, Field(ge=8, le=8192)]
    """Length of the embedding (512 in the paper)."""
    last_stride: Literal[1, 2]
    """Stride of the last stage; 1, the usual choice in re-identification, keeps larger maps and retrieves better. State
    dicts of source `checkpoint` need it too, since no tensor shows it."""
    weights: Annotated[str, Field(min_length=1)]
    """First weights of the backbone: `none` (random), `imagenet` (published by torchvision) or the path of a state dict
    with torchvision's names (.safetensors, .pth). Sources `checkpoint` and `onnx`: path of the trained network."""


class Budget(Section):
    """How much is removed from the student, and when (all methods but `paper` and `none`)."""

    of: Literal["macs", "params", "latency"]
    """Unit of the budget: multiply-accumulates or parameters of backbone and embedding head, or the latency of one
    image in ONNX Runtime on this machine."""
    reduction: Annotated[float, Field(ge=0, lt=1)]
    """Share to remove; the result lies in [reduction, reduction + 0.01]."""
    allow_block_removal: bool
    """Whether a block may be removed as a whole; possible only if its shortcut is the identity."""
    start: Fraction
    """Share of the steps after which channels begin to be masked (the warm-up of the paper)."""
    end: Fraction
    """Share of the steps after which the whole budget is masked, by the cubic schedule of Zhu and Gupta (2017)."""
    fade: Annotated[float, Field(gt=0, le=1)]
    """Share of the steps that a masked channel takes to become exactly zero."""
    every: Annotated[int, Field(ge=1, le=10_000)]
    """Steps between two revisions of the masks."""

    @model_validator(mode="after")
    def _fades_before_the_end(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"`start` ({self.start}) must lie before `end` ({self.end})")
        if self.end + self.fade > 1:
            raise ValueError(
                f"`end` + `fade` must not exceed 1, got {self.end} + {self.fade}: the last masked channels would not "
                "reach zero before the end of training"
            )
        return self


class Distill(Section):
    """Distillation: the losses between student and teacher."""

    kl: Annotated[float, Field(ge=0, le=100)]
    """Weight of the KL divergence between softened logits (1.0 in the paper)."""
    temperature: Annotated[float, Field(gt=0, le=100)]
    """Temperature of the softened logits (2 in the paper)."""
    feature: Annotated[float, Field(ge=0, le=100)]
    """Weight of the L2 distance between pooled features (0.5 in the paper). Method `paper` compares them before the
    compactors; the others at the ends of the four stages, where channels correspond although inner widths change."""
    embedding: Annotated[float, Field(ge=0, le=1000)]
    """Weight of the cosine distance between embeddings (Budnik and Avrithis, CVPR 2021); 0 in the paper. Use it with
    teachers that are trained to convergence."""
    extra_losses: dict[str, dict[str, Any]]
    """Further losses on the embeddings by name, each with its `weight` and settings, such as
    `asymmetric_triplet: {weight: 1.0, margin: 0.1}`; the files in pipeline/losses/ register them."""
    views: Annotated[int, Field(ge=0, le=1000)]
    """Number of augmented views of each image, used in rotation. The outputs of the teacher for them are computed once,
    before the training, and need 4 bytes of disk for each value (10 kB for an image and view of the default network,
    2 kB if `feature` is 0; without `kl`, the logits, one for each identity, are not stored); 0 draws a new view each
    time an image is used, and computes the teacher's outputs in each step, as method `paper` requires."""
    average_views: bool
    """Whether the student learns, for each view of an image, the mean of the teacher's outputs for all of its views: a
    better embedding than that of one view, at no further cost (Radosavovic et al., "Data Distillation", CVPR 2018)."""

    @model_validator(mode="after")
    def _has_views_to_average(self) -> Self:
        if self.average_views and self.views < 2:
            raise ValueError(f"`average_views` needs at least 2 `views`, got {self.views}")
        return self


class Resetting(Section):
    """Method `budget`: the importance of channels; the gradients of the least important ones are reset."""

    importance: Literal["embedding", "taylor", "magnitude", "random"]
    """Importance of a channel: `embedding`, the mean squared change of the embeddings without it, to first order;
    `taylor`, the squared change of the training loss without it, to first order (Molchanov et al., CVPR 2019, equation
    8); `magnitude`, the scale of its batch norm (Liu et al., ICCV 2017); `random`, a control."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of the moving average of `embedding` and `taylor`."""


class Paper(Section):
    """Method `paper`: retrieval-guided gradient resetting as published."""

    memory: Annotated[int, Field(ge=1, le=10_000_000)]
    """Number of teacher features stored per site (24,000 in the paper's code)."""
    neighbours: Annotated[int, Field(ge=1, le=1000)]
    """k, the number of nearest stored features by cosine for each image (2 in the paper)."""
    ratio: Annotated[float, Field(gt=0, lt=1)]
    """Share of the channels that counts as unimportant for a match (0.5 in the paper's code)."""
    lasso: Annotated[float, Field(ge=0, le=100)]
    """Weight of the group lasso, the sum of the L2 norms of all rows, from the first step on (0.004 in the paper)."""
    start: Fraction
    """Share of the steps after which masks grow (20 of 120 epochs in the paper)."""
    threshold: Annotated[float, Field(ge=0, lt=1)]
    """Largest L2 norm of a row that counts as zero at the end of training (1e-5 in ResRep, ICCV 2021)."""


class Student(Training):
    """Stage `student`: the network that shrinks while it learns from the teacher."""

    method: Literal["budget", "paper", "static-magnitude", "static-random", "none"]
    """The compression method. `budget`: shrink to the budget while learning; `paper`: capacity dynamic distillation as
    published, where the reduction follows from the lasso; `static-magnitude`: prune the teacher once by the scales of
    its batch norms, then distil; `static-random`: multiply all widths by one factor, distil from random weights;
    `none`: distil only."""
    init: Annotated[str, Field(min_length=1)]
    """First weights of the student: `teacher`, `imagenet` (published by torchvision), `random`, or the path of a state
    dict with torchvision's names (put it into weights/student/); the static methods ignore it."""
    architecture: Architecture
    budget: Budget
    sites: Annotated[list[Literal["conv1", "conv2", "stream"]], Field(min_length=1, max_length=3)]
    """What may become narrower: the outputs of a block's first and second convolution, which get compactors (behind
    an instance norm, a scale of each channel), and the residual stream of each stage, which gets a channel gate; that
    of the last stage keeps its width if it is the embedding."""
    channel_multiple: Annotated[int, Field(ge=1, le=64)]
    """Number that every reduced width is a multiple of (ONNX Runtime computes blocks of 8 channels with AVX2)."""
    batch: StudentBatch
    shrink: Literal["live", "off"]
    """When zero channels are cut out: `live`, after each epoch (method `budget`); `off`, in stage surgery."""
    distill: Distill
    freeze_norms_at: Fraction
    """Share of the steps after which the statistics of all batch norms are frozen, so that the last steps train the
    function that is exported; 1 never freezes them (as published)."""
    freeze_head_norms_at: Fraction
    """The same for the batch norms of the embedding head, with `init: teacher`; 0 keeps the statistics of the teacher,
    because those of batches with few identities are noisy; 1 never freezes them (as published). Methods that start with
    a pruned network ignore it."""
    resetting: Resetting
    paper: Paper

    @field_validator("init")
    @classmethod
    def _is_known_or_a_path(cls, init: str) -> str:
        if init not in ("teacher", "imagenet", "random") and not any(mark in init for mark in "/\\."):
            raise ValueError(f"must be teacher, imagenet, random or a path, got {init}")
        return init

    @model_validator(mode="after")
    def _unlabelled_images_have_a_loss(self) -> Self:
        losses = self.distill
        if self.batch.unlabelled and not (losses.kl or losses.feature or losses.embedding):
            raise ValueError(
                f"`batch.unlabelled` ({self.batch.unlabelled}) must be 0 if `distill.kl`, `distill.feature` and "
                "`distill.embedding` are 0: raise one of them"
            )
        return self

    @property
    def budgeted(self) -> bool:
        """Whether the method keeps a budget."""
        return self.method not in ("paper", "none")
