"""What the student learns: the teacher's lessons, and to do with less while it learns them.

Capacity dynamic distillation (Xie et al., CVPR 2023) with compactors on both sides of each 3x3, a budget, masks that
can be revised, and proximal shrinking.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pipeline.compress.budget import WINDOW, BudgetMissedError, cost_model, shrinking_sites
from pipeline.compress.capacity import Capacity
from pipeline.compress.compactor import alive, attach, scale_rows
from pipeline.compress.fold import fold, recentre
from pipeline.compress.resetting import nearest
from pipeline.compress.surgery import SurgeryPlan, cut, cut_spec, slices, take
from pipeline.config import Params, Student
from pipeline.losses import distill
from pipeline.models import cost
from pipeline.models.resnet import Output, RetrievalNet, convert
from pipeline.models.spec import ArchSpec, indicator_of, is_inner
from pipeline.models.taps import Taps, pooled
from pipeline.retrieval.embed import Rows
from pipeline.training.loop import Forward, Reshaped
from pipeline.training.teacher import Validate, fresh_teacher, retrieval_losses

log = logging.getLogger(__name__)

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Where student and teacher features are compared."""

CALIBRATION = 128
"""Training images that folded batch norms are measured on."""


@dataclass
class StudentTask:
    """Distillation, with shrinking where there is a capacity.

    Attributes:
        fabric: Launched Fabric.
        config: Section of params.yaml.
        teacher: Frozen, in evaluation mode.
        image_size: Height and width, pixels.
        total_steps: Steps of the whole training.
        capacity: What shrinks, None for plain distillation.
        calibration: Normalised training images (B, 3, H, W) that folded batch norms are measured on.
        validate: mAP on held-out identities, None where there are none.
    """

    fabric: Fabric
    config: Student
    teacher: RetrievalNet
    image_size: tuple[int, int]
    total_steps: int
    capacity: Capacity | None
    calibration: Tensor
    validate: Validate | None

    def losses(self, net: RetrievalNet, forward: Forward, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Retrieval losses, KL of the logits, distance of the stages' features; scores the channels on the way."""
        scoring = self.capacity is not None and not self.capacity.settled
        sites = {observed(site): site for site in self.capacity.sites} if self.capacity and scoring else {}
        with (
            torch.no_grad(),
            self.fabric.autocast(),
            Taps(self.teacher, STAGES) as stages,
            Taps(self.teacher, sites, pooled) as inner,
        ):
            taught: Output = self.teacher(images)
            teacher_stages, teacher_inner = stages.read(), inner.read()
        with Taps(net, STAGES) as stages, Taps(net, sites, pooled) as inner:
            output = forward(images)
            student_stages, student_inner = stages.read(), inner.read()
        if self.capacity and scoring:
            self.capacity.observe(
                {site: student_inner[module] for module, site in sites.items()},
                {site: teacher_inner[module] for module, site in sites.items()},
                nearest(taught.embedding, self.config.resetting.neighbours),
            )
        losses = retrieval_losses(output, labels, self.config)
        losses["kl"] = self.config.distill.kl * distill.soft_targets(
            self._sharpened(output), self._sharpened(taught), self.config.distill.temperature
        )
        losses["feature"] = (
            self.config.distill.feature
            * torch.stack(
                [distill.features(student_stages[stage], self._kept(stage, teacher_stages[stage])) for stage in STAGES]
            ).sum()
        )
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _kept(self, stage: str, features: Tensor) -> Tensor:
        """The teacher's channels (B, C, H, W) that the student still has."""
        site = None if self.capacity is None else self.capacity.sites.get(stage)
        return features if site is None or len(site.kept) == features.shape[1] else features[:, site.kept]

    def _sharpened(self, output: Output) -> Tensor:
        """Logits as the identity loss sees them: cosines times their scale."""
        if output.logits is None:
            raise ValueError("distillation needs a teacher and a student with a classifier")
        return output.logits * (self.config.losses.scale if self.config.recipe == "scratch" else 1.0)

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Revise the masks now and then, keep retrieval off the masked rows, step, shrink them."""
        if self.capacity is None:
            optimizer()
            return
        number, indicators = round(progress * self.total_steps), net.indicators()
        last_choice = min(math.ceil(self.config.budget.end * self.total_steps - 1e-6), self.total_steps - 1)
        if number % self.config.budget.every == 0 or number == last_choice:
            self._share_scores()
            self.capacity.revise(1.0 if number >= last_choice else progress)
        self.capacity.reset(indicators)
        before = self.capacity.before_step(indicators)
        optimizer()
        self.capacity.after_step(indicators, before)

    def _share_scores(self) -> None:
        """Average the scores over devices, so that all choose alike and any of them can be saved."""
        if self.capacity is None or self.capacity.settled:
            return
        for site in self.capacity.sites.values():
            site.score = cast(Tensor, self.fabric.all_reduce(site.score, reduce_op="mean"))

    def reshape(self, net: RetrievalNet) -> Reshaped | None:
        """Cut out what died in this epoch, and carry on with fresh compactors there; gates are only shortened.

        Rows on their way out are folded at full length and go on fading in the fresh compactor.
        """
        if self.capacity is None:
            return None
        self._share_scores()
        if self.config.shrink == "off":
            return None
        plan = SurgeryPlan(
            {site: tuple(rows.tolist()) for site, rows in alive(net).items() if len(rows) < net.spec.widths[site]}
        )
        if not plan.kept:
            return None
        folding = [site for site in plan.kept if is_inner(site)]
        levels = {site: level for site, level in self.capacity.levels(net.indicators()).items() if site in folding}
        unfaded = scale_rows(net, {site: 1 / level for site, level in levels.items()})
        shrunk = attach(cut(fold(unfaded, folding), plan), folding)
        for site, rows in plan.kept.items():
            index = torch.tensor(rows, device=self.fabric.device)
            self.capacity.sites[site] = self.capacity.sites[site].select(index)
            if site in levels:
                levels[site] = levels[site][index]
        shrunk = scale_rows(shrunk, levels)
        recentre(shrunk, folding, self.calibration)
        taken = slices(net.spec, plan)
        folded = {f"{indicator_of(site)}.weight" for site in folding}
        for layer in net.spec.layers():
            if layer.target in folding:
                folded |= {f"{layer.name}.weight", f"{layer.norm}.weight", f"{layer.norm}.bias"}

        def carry(name: str, state: Tensor) -> Tensor | None:
            return None if name in folded else take(state, taken.get(name, ()))

        log.info("cut %d channels out of %d sites", _removed(net.spec, shrunk.spec), len(plan.kept))
        return Reshaped(shrunk, carry)

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        """Capacity that is left once masked rows are gone, and mAP on held-out identities."""
        row = {}
        if self.capacity is not None:
            full = self.capacity.spec
            small = full.model_copy(update={"widths": self.capacity.masked_widths})
            row["macs_reduction"] = 1 - cost.macs(small, self.image_size) / cost.macs(full, self.image_size)
            row["params_reduction"] = 1 - cost.params(small) / cost.params(full)
            row["target_reduction"] = self.capacity.due(progress)
        if validate and self.validate:
            row["validation_map"] = self.validate(net)
        return row

    def state_dict(self) -> dict[str, Tensor]:
        """The capacity's."""
        return {} if self.capacity is None else self.capacity.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The capacity's."""
        if self.capacity is not None:
            self.capacity.load_state_dict(tensors)

    def check(self, net: RetrievalNet) -> None:
        """Refuse a trained student whose living channels do not keep to the budget.

        Raises:
            BudgetMissedError: With the reduction that was reached.
        """
        if self.capacity is None:
            return
        asked, cost_of = self.config.budget.reduction, self.capacity.cost
        reached = 1 - cost_of(remaining_spec(net).widths) / cost_of(self.capacity.spec.widths)
        if not asked <= reached <= asked + WINDOW:
            raise BudgetMissedError(
                f"the student ended at a reduction of {reached:.4f}, not in [{asked:g}, {asked + WINDOW:g}]: rows that "
                "were not chosen are zero, or chosen ones are not; lower `student.optimizer.lr`, and report it"
            )

    def plan(self) -> SurgeryPlan:
        """Channels of the uncompressed network that are still present, cut ones left out."""
        sites = {} if self.capacity is None else self.capacity.sites
        return SurgeryPlan({name: tuple(site.kept.tolist()) for name, site in sites.items()})


def observed(site: str) -> str:
    """Module whose output shows what a dimension carries."""
    return indicator_of(site) if is_inner(site) else "maxpool" if site == "conv1" else site


def spread(rows: Rows, count: int) -> Rows:
    """At most `count` of the rows, evenly spaced."""
    return rows[:: max(1, math.ceil(len(rows) / count))]


def fresh_student(params: Params, teacher: RetrievalNet) -> RetrievalNet:
    """A student before its first epoch: as heavy as the teacher, with indicators where it may shrink."""
    if params.student.init == "teacher":
        net = convert(teacher, teacher.spec)
    else:
        net = fresh_teacher(params.teacher.model_copy(update={"weights": "imagenet"}), teacher.spec.identities)
    return net if params.student.method == "none" else attach(net, shrinking_sites(teacher.spec, params.student))


def student_task(
    fabric: Fabric, params: Params, teacher: RetrievalNet, steps: int, calibration: Tensor, validate: Validate | None
) -> StudentTask:
    """What the student is trained for.

    Args:
        fabric: Launched Fabric.
        params: All of params.yaml.
        teacher: It is moved to the training device, put in evaluation mode and frozen.
        steps: Steps of the whole training.
        calibration: Normalised training images that folded batch norms are measured on.
        validate: mAP on held-out identities.
    """
    config, spec = params.student, teacher.spec.model_copy(update={"indicators": ()})
    teacher.to(fabric.device).eval().requires_grad_(False)
    size = (params.data.image_size[0], params.data.image_size[1])
    capacity = None
    if config.method == "budget":
        capacity = Capacity.start(
            spec,
            shrinking_sites(spec, config),
            cost_model(spec, config.budget, size),
            config.budget,
            config.channel_multiple,
            config.resetting.momentum,
            fade=max(1, math.floor(config.budget.fade * steps)),
            device=fabric.device,
        )
    return StudentTask(fabric, config, teacher, size, steps, capacity, calibration, validate)


def _removed(before: ArchSpec, after: ArchSpec) -> int:
    """Channels that one spec has more than another."""
    return sum(before.widths.values()) - sum(after.widths.values())


def remaining_spec(net: RetrievalNet) -> ArchSpec:
    """What is left of a student after folding its compactors and cutting dead channels, without the classifier."""
    plan = SurgeryPlan({site: tuple(rows.tolist()) for site, rows in alive(net).items()})
    return cut_spec(net.spec, plan).model_copy(update={"indicators": (), "identities": 0})
