"""What the student learns: the teacher's lessons, and to do with less while it learns them.

Shrinker dynamic distillation (Xie et al., CVPR 2023) with compactors on both sides of each 3x3, a budget, masks that
can be revised, and proximal shrinking; or one of the methods that it is compared with.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.compress.budget import WINDOW
from pipeline.compress.compactor import attach, living_channels
from pipeline.compress.compression import Compression
from pipeline.compress.live_shrinking import cut_dead
from pipeline.compress.methods import compression, plan_of
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.surgery import SurgeryPlan, cut, cut_spec
from pipeline.compress.teacher_cache import GIB, TeacherCache
from pipeline.config import Params, Student
from pipeline.losses import distill
from pipeline.losses.registry import extra_losses
from pipeline.models import cost
from pipeline.models.cost import CostModel
from pipeline.models.feature_hooks import FeatureHooks, pooled
from pipeline.models.head import freeze_norms
from pipeline.models.resnet import ChannelGate, Output, RetrievalNet, convert
from pipeline.models.spec import ArchSpec, indicator_of, is_inner
from pipeline.retrieval.evaluate import Indices
from pipeline.training.loop import Forward, Reshaped, Task
from pipeline.training.teacher import Validate, build_teacher, retrieval_losses

log = logging.getLogger(__name__)

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Where student and teacher features are compared."""

CALIBRATION = 128
"""Training images that folded batch norms are measured on."""


@dataclass
class StudentTask(Task):
    """Distillation, and what the method does to the student's channels meanwhile.

    Attributes:
        teacher: Frozen, in evaluation mode.
        image_size: Height and width, pixels.
        calibration: Normalised training images (B, 3, H, W) that folded batch norms are measured on.
        validate: mAP on held-out identities, None where there are none.
        answers: The teacher's, where they are kept for other students.
    """

    fabric: Fabric
    config: Student
    teacher: RetrievalNet
    image_size: tuple[int, int]
    compression: Compression
    calibration: Tensor
    validate: Validate | None
    answers: TeacherCache | None = None

    def losses(
        self, net: RetrievalNet, forward: Forward, images: Tensor, labels: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """Retrieval losses, KL of the logits, distance of the features and of the embeddings.

        Batch norms use fixed statistics from `freeze_norms_at` on, those of the head from `freeze_head_norms_at` on.
        """
        if progress >= self.config.freeze_norms_at:
            freeze_norms(net)
        elif self._starts_as_teacher and progress >= self.config.freeze_head_norms_at:
            freeze_norms(net.head)
        taught = self._ask(images) if self.answers is None else self.answers(images, partial(self._ask, images))
        with FeatureHooks(net, self.compared.values(), pooled) as taps:
            output = forward(images)
            features = taps.read()
        student = {place: _unscaled(net, place, features[module]) for place, module in self.compared.items()}
        teacher = {place: taught[module] for place, module in self.compared.items()}
        self.compression.observe(student, teacher)
        losses = retrieval_losses(output, labels, self.config)
        losses["kl"] = self.config.distill.kl * distill.soft_targets(
            self._sharpened(_logits(output)), self._sharpened(taught["logits"]), self.config.distill.temperature
        )
        kept, compared = self.compression.kept, self.compression.compared
        distances = [
            _distance(student[place], teacher[place], kept.get(place), compared.get(place)) for place in self.compared
        ]
        losses["feature"] = self.config.distill.feature * torch.stack(distances).sum()
        losses["embedding"] = self.config.distill.embedding * distill.embeddings(output.embedding, taught["embedding"])
        for name, settings in self.config.distill.extra_losses.items():
            losses[name] = extra_losses()[name](output.embedding, taught["embedding"], labels, settings)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @property
    def _starts_as_teacher(self) -> bool:
        """Whether the student's first function is the teacher's, so that its head may rest on that."""
        return self.config.init == "teacher" and self.compression.whole

    @cached_property
    def compared(self) -> dict[str, str]:
        """Where student and teacher are compared: module by site or stage."""
        return {site: observed(site) for site in self.compression.observed} or {stage: stage for stage in STAGES}

    @torch.no_grad()
    def _ask(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's pooled features (B, C) by module, its ``embedding`` (B, D) and ``logits`` (B, identities)."""
        with self.fabric.autocast(), FeatureHooks(self.teacher, self.compared.values(), pooled) as taps:
            said: Output = self.teacher(images)
            features = taps.read()
            if self.config.distill.flip_average:
                said = _mean(said, self.teacher(images.flip(3)))
        return {**features, "embedding": said.embedding, "logits": _logits(said)}

    def _sharpened(self, logits: Tensor) -> Tensor:
        """Logits as the identity loss sees them: cosines times their scale."""
        return logits * (self.config.losses.scale if self.config.recipe == "scratch" else 1.0)

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """The method's."""
        self.compression.step(net, optimizer, progress)

    def reshape(self, net: RetrievalNet) -> Reshaped | None:
        """Cut out what died in this epoch, where that is wanted."""
        if not isinstance(self.compression, Shrinker) or self.config.shrink == "off":
            return None
        narrower = cut_dead(net, self.compression, self.calibration)
        return None if narrower is None else Reshaped(*narrower)

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        """Shrinker that is left once all that has been given up is gone, and mAP on held-out identities."""
        full = self.teacher.spec
        small = full.model_copy(update={"widths": self.compression.remaining(net)})
        row = {
            "macs_reduction": 1 - cost.macs(small, self.image_size) / cost.macs(full, self.image_size),
            "params_reduction": 1 - cost.params(small) / cost.params(full),
        }
        if self.config.budgeted and self.config.budget.of == "latency":
            row["latency_reduction"] = self.compression.cost.reduction(full.widths, small.widths)
        due = self.compression.due(progress)
        if due is not None:
            row["target_reduction"] = due
        if validate and self.validate:
            row["validation_map"] = self.validate(net)
        return row

    def state_dict(self) -> dict[str, Tensor]:
        """The method's."""
        return self.compression.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The method's."""
        self.compression.load_state_dict(tensors)

    def check(self, net: RetrievalNet) -> None:
        """Refuse a trained student whose living channels do not keep to the budget; warn where it saves more.

        Raises:
            BudgetMissedError: With the reduction that was reached.
        """
        widths, asked = remaining_spec(net).widths, self.config.budget.reduction
        self.compression.check(widths)
        reached = self.compression.cost.reduction(self.teacher.spec.widths, widths)
        if self.config.budgeted and reached > asked + WINDOW:
            log.warning("the student saves %.1f %%, more than the %.1f %% asked: channels that were already removed "
                        "saved more than estimated, or no timed network came closer",
                        100 * reached, 100 * asked)  # fmt: skip

    def plan(self) -> SurgeryPlan:
        """Channels of the uncompressed network that are still present, cut ones left out."""
        return plan_of(self.compression)


def _distance(student: Tensor, teacher: Tensor, kept: Tensor | None, compared: Tensor | None) -> Tensor:
    """Return the distance between the student's features (B, C') and the teacher's (B, C).

    Args:
        student: Of the channels that it still has.
        teacher: Of all channels.
        kept: (C',), indices of the student's channels; None for all.
        compared: (C',) bool, which of them stay; None for all.
    """
    if kept is not None and len(kept) < teacher.shape[1]:
        teacher = teacher[:, kept]
    if compared is not None:
        compared = compared.to(student.device, non_blocking=True)
    return distill.features(student, teacher, compared)


def _mean(one: Output, other: Output) -> Output:
    """What two looks at the same images say together."""
    embedding = normalize(one.embedding, dim=1) + normalize(other.embedding, dim=1)
    return Output(embedding, (_logits(one) + _logits(other)) / 2)


def _logits(output: Output) -> Tensor:
    if output.logits is None:
        raise ValueError("distillation needs a teacher and a student with a classifier")
    return output.logits


def _unscaled(net: RetrievalNet, place: str, features: Tensor) -> Tensor:
    """The same pooled features (B, C), with no gradient to the gate that scales them.

    A gate is a factor on a stage's outputs. What they lack of the teacher's would be read as importance of the channel,
    though a channel that is gone is not compared any more; what the stage's later blocks make of it still counts.
    """
    gate = net.indicators().get(place)
    if not isinstance(gate, ChannelGate):
        return features
    factor = torch.where(gate.weight == 0, 1.0, gate.weight)
    return features * (factor.detach() / factor)


def observed(site: str) -> str:
    """Module whose output shows what a dimension carries."""
    return indicator_of(site) if is_inner(site) else "maxpool" if site == "conv1" else site


def spread(rows: Indices, count: int) -> Indices:
    """At most `count` of the rows, evenly spaced."""
    return rows[:: max(1, math.ceil(len(rows) / count))]


def build_student(params: Params, teacher: RetrievalNet, chosen: Compression) -> RetrievalNet:
    """Build a student before its first epoch: as heavy as the teacher, with indicators, or cut already."""
    config = params.student
    if config.method == "static-random":
        return RetrievalNet(cut_spec(teacher.spec, plan_of(chosen)))
    if config.method == "static-magnitude":
        return cut(convert(teacher, teacher.spec), plan_of(chosen))
    if config.init == "teacher":
        net = convert(teacher, teacher.spec)
    else:
        weights = "imagenet" if config.init == "imagenet" else "none"
        net = build_teacher(params.teacher.model_copy(update={"weights": weights}), teacher.spec.identities)
    return attach(net, chosen.kept)


def student_task(
    fabric: Fabric,
    params: Params,
    teacher: RetrievalNet,
    budgeted: CostModel,
    steps: int,
    calibration: Tensor,
    validate: Validate | None,
    answers: Path | None = None,
) -> StudentTask:
    """Set a student's training up; the teacher is moved to the training device and frozen.

    `budgeted` is what the budget counts, `steps` the steps of the whole training, `answers` the folder where the
    teacher's answers are kept for other students, if `runtime.teacher_cache_gib` asks for it.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    config = params.student
    teacher.to(fabric.device).eval().requires_grad_(False)
    size = (params.data.image_size[0], params.data.image_size[1])
    chosen = compression(config, teacher, budgeted, steps, params.seed, fabric.device)
    task = StudentTask(fabric, config, teacher, size, chosen, calibration, validate)
    kept = params.runtime.teacher_cache_gib and not chosen.observed  # nobody else asks about such sites
    if answers is not None and kept:
        computed = f"{params.runtime.precision} on {fabric.device.type}, torch {torch.__version__}"
        asked = f"{sorted(task.compared.values())}, flip average {config.distill.flip_average}, {computed}"
        task.answers = TeacherCache(answers, params.runtime.teacher_cache_gib * GIB, teacher, asked)
    return task


def remaining_spec(net: RetrievalNet) -> ArchSpec:
    """What is left of a student after folding its compactors and cutting dead channels, without the classifier."""
    plan = SurgeryPlan({site: tuple(rows.tolist()) for site, rows in living_channels(net).items()})
    return cut_spec(net.spec, plan).model_copy(update={"indicators": (), "identities": 0})
