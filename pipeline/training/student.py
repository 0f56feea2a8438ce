"""What the student learns: the teacher's lessons, and to do with less while it learns them.

Capacity dynamic distillation (Xie et al., CVPR 2023) with compactors on both sides of each 3x3, a budget, masks that
can be revised, and proximal shrinking; or one of the methods that it is compared with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.compress.capacity import Capacity
from pipeline.compress.compactor import alive, attach
from pipeline.compress.live import cut_dead
from pipeline.compress.methods import Compression, compression, plan_of
from pipeline.compress.surgery import SurgeryPlan, cut, cut_spec
from pipeline.config import Params, Student
from pipeline.losses import distill
from pipeline.models import cost
from pipeline.models.cost import CostModel
from pipeline.models.resnet import Output, RetrievalNet, convert
from pipeline.models.spec import ArchSpec, indicator_of, is_inner
from pipeline.models.taps import Taps, pooled
from pipeline.retrieval.embed import Rows
from pipeline.training.loop import Forward, Reshaped
from pipeline.training.teacher import Validate, fresh_teacher, retrieval_losses

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Where student and teacher features are compared."""

CALIBRATION = 128
"""Training images that folded batch norms are measured on."""


@dataclass
class StudentTask:
    """Distillation, and what the method does to the student's channels meanwhile.

    Attributes:
        fabric: Launched Fabric.
        config: Section of params.yaml.
        teacher: Frozen, in evaluation mode.
        image_size: Height and width, pixels.
        compression: The method.
        budgeted: What the budget counts.
        calibration: Normalised training images (B, 3, H, W) that folded batch norms are measured on.
        validate: mAP on held-out identities, None where there are none.
    """

    fabric: Fabric
    config: Student
    teacher: RetrievalNet
    image_size: tuple[int, int]
    compression: Compression
    budgeted: CostModel
    calibration: Tensor
    validate: Validate | None

    def losses(self, net: RetrievalNet, forward: Forward, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Retrieval losses, KL of the logits, distance of the features and of the embeddings."""
        sites = {observed(site): site for site in self.compression.observed}
        with (
            torch.no_grad(),
            self.fabric.autocast(),
            Taps(self.teacher, STAGES) as stages,
            Taps(self.teacher, sites, pooled) as inner,
        ):
            taught: Output = self.teacher(images)
            teacher_stages, teacher_inner = stages.read(), _by_site(inner, sites)
            if self.config.distill.mirror:
                taught = _mean(taught, self.teacher(images.flip(3)))
        with Taps(net, STAGES) as stages, Taps(net, sites, pooled) as inner:
            output = forward(images)
            student_stages, student_inner = stages.read(), _by_site(inner, sites)
        self.compression.observe(student_inner, teacher_inner)
        if self.config.method == "paper":
            pairs = [(student_inner[site], teacher_inner[site]) for site in sites.values()]
        else:
            pairs = [(student_stages[stage], self._kept(stage, teacher_stages[stage])) for stage in STAGES]
        losses = retrieval_losses(output, labels, self.config)
        losses["kl"] = self.config.distill.kl * distill.soft_targets(
            self._sharpened(output), self._sharpened(taught), self.config.distill.temperature
        )
        distances = [distill.features(student, teacher) for student, teacher in pairs]
        losses["feature"] = self.config.distill.feature * torch.stack(distances).sum()
        losses["embedding"] = self.config.distill.embedding * distill.embeddings(output.embedding, taught.embedding)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _kept(self, stage: str, features: Tensor) -> Tensor:
        """The teacher's channels (B, C, H, W) that the student still has."""
        kept = self.compression.kept.get(stage)
        return features if kept is None or len(kept) == features.shape[1] else features[:, kept]

    def _sharpened(self, output: Output) -> Tensor:
        """Logits as the identity loss sees them: cosines times their scale."""
        if output.logits is None:
            raise ValueError("distillation needs a teacher and a student with a classifier")
        return output.logits * (self.config.losses.scale if self.config.recipe == "scratch" else 1.0)

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """The method's."""
        self.compression.step(net, optimizer, progress)

    def reshape(self, net: RetrievalNet) -> Reshaped | None:
        """Cut out what died in this epoch, where that is wanted."""
        if not isinstance(self.compression, Capacity) or self.config.shrink == "off":
            return None
        narrower = cut_dead(net, self.compression, self.calibration)
        return None if narrower is None else Reshaped(*narrower)

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        """Capacity that is left once all that has been given up is gone, and mAP on held-out identities."""
        full = self.teacher.spec
        small = full.model_copy(update={"widths": self.compression.remaining(net)})
        row = {
            "macs_reduction": 1 - cost.macs(small, self.image_size) / cost.macs(full, self.image_size),
            "params_reduction": 1 - cost.params(small) / cost.params(full),
        }
        if self.config.budgeted and self.config.budget.of == "latency":
            row["latency_reduction"] = 1 - self.budgeted(small.widths) / self.budgeted(full.widths)
        due = self.compression.due(progress)
        if due is not None:
            row["target_reduction"] = due
        if validate and self.validate:
            row["validation_map"] = self.validate(net)
        return row

    def state_dict(self) -> dict[str, Tensor]:
        """The method's."""
        return self.compression.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The method's."""
        self.compression.load_state_dict(tensors)

    def check(self, net: RetrievalNet) -> None:
        """Refuse a trained student whose living channels do not keep to the budget.

        Raises:
            BudgetMissedError: With the reduction that was reached.
        """
        self.compression.check(remaining_spec(net).widths)

    def plan(self) -> SurgeryPlan:
        """Channels of the uncompressed network that are still present, cut ones left out."""
        return plan_of(self.compression)


def _mean(one: Output, other: Output) -> Output:
    """What two looks at the same images say together."""
    embedding = normalize(one.embedding, dim=1) + normalize(other.embedding, dim=1)
    if one.logits is None or other.logits is None:
        return Output(embedding, None)
    return Output(embedding, (one.logits + other.logits) / 2)


def observed(site: str) -> str:
    """Module whose output shows what a dimension carries."""
    return indicator_of(site) if is_inner(site) else "maxpool" if site == "conv1" else site


def _by_site(taps: Taps, sites: dict[str, str]) -> dict[str, Tensor]:
    """What was caught, by site instead of module."""
    return {sites[module]: features for module, features in taps.read().items()}


def spread(rows: Rows, count: int) -> Rows:
    """At most `count` of the rows, evenly spaced."""
    return rows[:: max(1, math.ceil(len(rows) / count))]


def fresh_student(params: Params, teacher: RetrievalNet, chosen: Compression) -> RetrievalNet:
    """A student before its first epoch: as heavy as the teacher, with indicators where it may shrink, or cut already.

    Args:
        params: All of params.yaml.
        teacher: What it learns from, and may start from.
        chosen: The method, before the first step.
    """
    config = params.student
    if config.method == "static-random":
        return RetrievalNet(cut_spec(teacher.spec, plan_of(chosen)))
    if config.method == "static-magnitude":
        return cut(convert(teacher, teacher.spec), plan_of(chosen))
    if config.init == "teacher":
        net = convert(teacher, teacher.spec)
    else:
        weights = "imagenet" if config.init == "imagenet" else "none"
        net = fresh_teacher(params.teacher.model_copy(update={"weights": weights}), teacher.spec.identities)
    return attach(net, chosen.kept)


def student_task(
    fabric: Fabric,
    params: Params,
    teacher: RetrievalNet,
    budgeted: CostModel,
    steps: int,
    calibration: Tensor,
    validate: Validate | None,
) -> StudentTask:
    """What the student is trained for.

    Args:
        fabric: Launched Fabric.
        params: All of params.yaml.
        teacher: It is moved to the training device, put in evaluation mode and frozen.
        budgeted: What the budget counts.
        steps: Steps of the whole training.
        calibration: Normalised training images that folded batch norms are measured on.
        validate: mAP on held-out identities.

    Raises:
        BudgetError: If no widths keep to the budget.
    """
    config = params.student
    teacher.to(fabric.device).eval().requires_grad_(False)
    size = (params.data.image_size[0], params.data.image_size[1])
    chosen = compression(config, teacher, budgeted, steps, params.seed, fabric.device)
    return StudentTask(fabric, config, teacher, size, chosen, budgeted, calibration, validate)


def remaining_spec(net: RetrievalNet) -> ArchSpec:
    """What is left of a student after folding its compactors and cutting dead channels, without the classifier."""
    plan = SurgeryPlan({site: tuple(rows.tolist()) for site, rows in alive(net).items()})
    return cut_spec(net.spec, plan).model_copy(update={"indicators": (), "identities": 0})
