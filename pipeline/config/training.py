"""Stages `teacher` and `student`: recipes, losses, schedules, and how the student becomes smaller."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Fraction, Section


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
    erase_area: Annotated[float, Field(ge=0.02, le=1)]
    """Largest share of an image that is erased (0.4 in the paper, too much of what few pixels show); the smallest is
    0.02."""


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
    """`none`, `imagenet` (torchvision's published weights) or the path of a torchvision-named state dict
    (.safetensors)."""


class Budget(Section):
    """How much the student must give up, and when."""

    of: Literal["macs", "params", "latency"]
    """What is counted: multiply-accumulates or parameters of backbone and embedding head, or the time that ONNX Runtime
    takes for one image on this machine."""
    reduction: Annotated[float, Field(ge=0, lt=1)]
    """Share to remove; the result lies in [reduction, reduction + 0.01]."""
    allow_block_removal: bool
    """Whether the inner width of a block may reach zero, which drops the block; only where its shortcut is the
    identity."""
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
    """Weight of the L2 distance between pooled features (0.5 in the paper): at the compactors with method `paper`; else
    at the ends of the four stages, whose channels stay comparable when inner widths change."""
    embedding: Annotated[float, Field(ge=0, le=1000)]
    """Weight of the cosine distance between embeddings (Budnik and Avrithis, CVPR 2021); 0 in the paper. A teacher that
    has much left to learn is better not followed that closely."""
    extra_losses: dict[str, dict[str, float]]
    """Further losses on the embeddings by name, each with its `weight` and settings, such as
    `asymmetric_triplet: {weight: 1.0, margin: 0.1}`; the files in pipeline/losses/ register them."""
    flip_average: bool
    """Whether the teacher looks at each image's mirror image too and the student learns the mean of both answers. It is
    better than one of them; the price is one more forward pass of the teacher."""


class Resetting(Section):
    """Whose gradients method `budget` resets: those of the least important channels, by the saved cost."""

    importance: Literal["taylor", "magnitude", "random"]
    """What a channel is worth: `taylor`, what its loss would do to the training loss (Molchanov et al., CVPR 2019,
    equation 8); `magnitude`, its batch norm's scale (Liu et al., ICCV 2017); `random`, a control."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of the moving average of `taylor`."""


class Paper(Section):
    """Retrieval-guided gradient resetting of method `paper`, as published."""

    memory: Annotated[int, Field(ge=1, le=10_000_000)]
    """Teacher features that are remembered at each site, rows (24,000 in the paper's code)."""
    neighbours: Annotated[int, Field(ge=1, le=1000)]
    """k, nearest of them by cosine for each image (2 in the paper)."""
    ratio: Annotated[float, Field(gt=0, lt=1)]
    """Share of the channels that is unimportant to a match (0.5 in the paper's code)."""
    lasso: Annotated[float, Field(ge=0, le=100)]
    """Weight of the sum of the rows' norms (0.004 in the paper)."""
    start: Fraction
    """Share of the steps after which the lasso pulls and masks grow (20 of 120 epochs in the paper)."""
    threshold: Annotated[float, Field(ge=0, lt=1)]
    """Largest norm of a row that counts as dead when training ends (1e-5 in ResRep, ICCV 2021)."""


class Student(Training):
    """Stage `student`."""

    method: Literal["budget", "paper", "static-magnitude", "static-random", "none"]
    """`budget`: shrink to the budget while learning; `paper`: capacity dynamic distillation as published, which ends
    where its lasso leads; `static-magnitude`: cut the teacher once by its batch norms' scales, then distil;
    `static-random`: the same budget by a uniform factor on all widths, distilled from scratch; `none`: distil only."""
    init: Literal["teacher", "imagenet", "random"]
    """Where the first weights come from; `static-magnitude` and `static-random` have their own."""
    budget: Budget
    sites: Annotated[list[Literal["conv1", "conv2", "stream"]], Field(min_length=1, max_length=3)]
    """What may become narrower: the outputs of a block's first or second convolution, which get compactors, and the
    residual stream of each stage, which gets gates."""
    channel_multiple: Annotated[int, Field(ge=1, le=64)]
    """Widths stay whole multiples of it (8: the blocks of ONNX Runtime on AVX2), and at least one."""
    shrink: Literal["live", "off"]
    """`live`: rows that died are cut out at the end of each epoch (method `budget`); `off`: only at the end, by stage
    surgery."""
    distill: Distill
    freeze_norms_at: Fraction
    """Share of the steps after which all batch norms keep the statistics that they have by then, so that the last steps
    train the function that will be used; 1 never (as published)."""
    freeze_head_norms_at: Fraction
    """The same for the norms of the embedding head, with `init: teacher`: at 0 they keep the teacher's statistics. A
    batch of few identities tells them badly, and a student would chase that noise. 1 never (as published). Methods that
    do not start with all of the teacher's channels have no use for it: `static-magnitude` became worse."""
    resetting: Resetting
    paper: Paper

    @property
    def budgeted(self) -> bool:
        """Whether the method keeps to a budget."""
        return self.method not in ("paper", "none")
