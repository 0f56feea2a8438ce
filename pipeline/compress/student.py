"""Stage `student`: distillation from the teacher while a compression method shrinks the student.

Capacity dynamic distillation (Xie et al., CVPR 2023) with compactors on both sides of each 3x3 convolution, a budget,
masks that can be revised and proximal shrinking; or one of the methods that it is compared with.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.compress.budget import WINDOW
from pipeline.compress.compactor import attach, nonzero_channels
from pipeline.compress.compression import Compression
from pipeline.compress.importance import embedding_scores
from pipeline.compress.live_shrinking import cut_zero_channels
from pipeline.compress.methods import build_compression, kept_plan
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.surgery import SurgeryPlan, cut, cut_spec
from pipeline.compress.teacher_cache import TeacherCache
from pipeline.config import Params, Student
from pipeline.data.augment import normalise
from pipeline.data.loader import TrainBatch, TrainLoader
from pipeline.losses import distill
from pipeline.losses.registry import extra_losses
from pipeline.models import cost
from pipeline.models.cost import CostModel
from pipeline.models.feature_hooks import FeatureHooks, average_pool
from pipeline.models.head import freeze_norms
from pipeline.models.resnet import ChannelGate, Output, RetrievalNet, TeacherNet, convert
from pipeline.models.spec import ArchSpec, indicator_name, is_inner
from pipeline.retrieval.evaluate import Indices
from pipeline.training.loop import Forward, Reshaped, Task
from pipeline.training.teacher import Validate, pretrained_weights, retrieval_losses

log = logging.getLogger(__name__)

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Where student and teacher features are compared, unless the method needs others."""

CALIBRATION = 128
"""Training images that the statistics of folded batch norms are measured on."""


@dataclass
class StudentTask(Task):
    """Losses of the student, and the compression method that changes its channels.

    Attributes:
        teacher: Frozen, in evaluation mode.
        image_size: Height and width, pixels.
        calibration: Normalised training images (B, 3, H, W) that the statistics of folded batch norms are measured on.
        validate: Computes mAP on held-out identities; None if none are held out.
        seed: Decides the random projections of importance `embedding`.
        cache: Returns the stored outputs of the teacher for a batch; None if `student.distill.views` is 0.
    """

    fabric: Fabric
    config: Student
    teacher: TeacherNet
    image_size: tuple[int, int]
    compression: Compression
    calibration: Tensor
    validate: Validate | None
    seed: int
    cache: Callable[[TrainBatch], Mapping[str, Tensor]] | None = None

    def losses(self, net: RetrievalNet, forward: Forward, batch: TrainBatch, progress: float) -> dict[str, Tensor]:
        """Compute the weighted retrieval and distillation losses of a batch.

        Retrieval losses use the images with labels, distillation losses all of them. Batch norms are frozen from
        `freeze_norms_at` on, those of the head from `freeze_head_norms_at` on.
        """
        if progress >= self.config.freeze_norms_at:
            freeze_norms(net)
        elif self._starts_as_teacher and progress >= self.config.freeze_head_norms_at:
            freeze_norms(net.head)
        teacher_outputs = self.teacher_outputs(batch.images) if self.cache is None else self.cache(batch)
        observed = {site: observed_module(site) for site in self.compression.observed_sites}
        with FeatureHooks(net, {*self.feature_modules.values(), *observed.values()}, average_pool) as hooks:
            output = forward(batch.images)
            features = hooks.read()
        student = {
            site: _without_gate_gradient(net, site, features[name]) for site, name in self.feature_modules.items()
        }
        teacher = {site: teacher_outputs[name] for site, name in self.feature_modules.items()}
        # The teacher has no compactors, so its features in front of and behind them are the same.
        self.compression.observe({site: features[name] for site, name in observed.items()}, teacher)
        if self.compression.scores_embeddings:
            scores = embedding_scores(net.indicators(), output.embedding, self._generator(progress))
            # Each device has images of its own, and all must select the same channels.
            mean = {site: cast(Tensor, self.fabric.all_reduce(part, reduce_op="mean")) for site, part in scores.items()}
            self.compression.observe_scores(mean)
        losses = retrieval_losses(output.first(len(batch.labels)), batch.labels, self.config)
        losses["kl"] = output.embedding.new_zeros(())
        if self.config.distill.kl:
            losses["kl"] = self.config.distill.kl * distill.soft_targets(
                self._scaled(_logits(output)), self._scaled(teacher_outputs["logits"]), self.config.distill.temperature
            )
        kept, compared = self.compression.kept, self.compression.compared_channels
        distances = [
            distill.features(net.projections[site](student[site]), teacher[site])
            if site in net.spec.projections
            else _feature_distance(student[site], teacher[site], kept.get(site), compared.get(site))
            for site in self.feature_modules
        ]
        total = torch.stack(distances).sum() if distances else output.embedding.new_zeros(())
        losses["feature"] = self.config.distill.feature * total
        embedding = teacher_outputs["embedding"]
        losses["embedding"] = self.config.distill.embedding * distill.embeddings(output.embedding, embedding)
        for name, loss in self.extra_losses.items():
            losses[name] = loss(output.embedding, embedding, batch.labels)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _generator(self, progress: float) -> torch.Generator:
        """Return a random generator for this step and device."""
        key = f"{self.seed}/{progress!r}/{self.fabric.global_rank}"
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
        return torch.Generator().manual_seed(seed)

    @cached_property
    def extra_losses(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Further losses by name, with their weights and settings."""
        requested = self.config.distill.extra_losses
        return {name: loss.bind(requested[name]) for name, loss in extra_losses().items() if name in requested}

    @property
    def _starts_as_teacher(self) -> bool:
        """Whether the student initially computes the teacher's function, so the teacher's head statistics fit it."""
        return self.config.init == "teacher" and self.compression.starts_full

    @cached_property
    def feature_modules(self) -> dict[str, str]:
        """Module names by site or stage where the features of student and teacher are compared."""
        if sites := self.compression.observed_sites:
            return {site: feature_module(site) for site in sites}
        return {stage: stage for stage in STAGES} if self.config.distill.feature else {}

    @torch.no_grad()
    def teacher_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return pooled features (B, C) by module name, ``embedding`` (B, D) and ``logits`` (B, identities)."""
        with self.fabric.autocast(), FeatureHooks(self.teacher, self.feature_modules.values(), average_pool) as hooks:
            output: Output = self.teacher(images)
            features = hooks.read()
        return {**features, "embedding": output.embedding, "logits": _logits(output)}

    def _scaled(self, logits: Tensor) -> Tensor:
        """Return logits as the identity loss uses them: cosines are multiplied by their scale."""
        return logits * (self.config.losses.scale if self.config.recipe == "scratch" else 1.0)

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        self.compression.step(net, optimizer, progress)

    def reshape(self, net: RetrievalNet) -> Reshaped | None:
        """Cut out the channels that became zero in this epoch, if `student.shrink` is live."""
        if not isinstance(self.compression, Shrinker) or self.config.shrink == "off":
            return None
        return cut_zero_channels(net, self.compression, self.calibration)

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        """Return the reductions without the channels selected for removal, and mAP on held-out identities."""
        full = self.compression.full
        small = full.narrowed(self.compression.remaining_widths(net))
        row = {
            "macs_reduction": 1 - cost.macs(small, self.image_size) / cost.macs(full, self.image_size),
            "params_reduction": 1 - cost.params(small) / cost.params(full),
        }
        if self.config.budgeted and self.config.budget.of == "latency":
            row["latency_reduction"] = self.compression.cost.reduction(full.widths, small.widths)
        target = self.compression.target_reduction(progress)
        if target is not None:
            row["target_reduction"] = target
        row |= self.compression.curve(net)
        if validate and self.validate:
            row["validation_map"] = self.validate(net)
        return row

    def state_dict(self) -> dict[str, Tensor]:
        return self.compression.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.compression.load_state_dict(tensors)

    def check(self, net: RetrievalNet) -> None:
        """Check that the nonzero channels of a trained student keep the budget; warn if they save more.

        Raises:
            BudgetMissedError: If they do not, with the reduction that was reached.
        """
        widths, target = remaining_spec(net).widths, self.config.budget.reduction
        self.compression.check(widths)
        reached = self.compression.cost.reduction(self.compression.full.widths, widths)
        if self.config.budgeted and reached > target + WINDOW:
            log.warning("the student saves %.1f %%, more than the requested %.1f %%: channels that were already "
                        "removed saved more than estimated, or no timed network came closer",
                        100 * reached, 100 * target)  # fmt: skip

    def plan(self) -> SurgeryPlan:
        """Return the channels of the uncompressed network that were not cut during training."""
        return kept_plan(self.compression)


def _feature_distance(student: Tensor, teacher: Tensor, kept: Tensor | None, compared: Tensor | None) -> Tensor:
    """Return the distance between pooled features of the student (B, C') and of the teacher (B, C).

    Args:
        student: Features of the channels that the student still has.
        teacher: Features of all channels.
        kept: (C',), indices of the student's channels; None for all.
        compared: (C',) bool, channels to compare; None for all.
    """
    if kept is not None and len(kept) < teacher.shape[1]:
        teacher = teacher[:, kept]
    if compared is not None:
        compared = compared.to(student.device, non_blocking=True)
    return distill.features(student, teacher, compared)


def _logits(output: Output) -> Tensor:
    if output.logits is None:
        raise ValueError("distillation needs a teacher and a student with a classifier")
    return output.logits


def _without_gate_gradient(net: RetrievalNet, site: str, features: Tensor) -> Tensor:
    """Return the same pooled features (B, C), without a gradient to the channel gate that scales them.

    The gate scales the output of its stage. A gradient from the feature loss there would raise the importance of the
    channel, although a removed channel is not compared any more. Its effect on later blocks of the stage still counts.
    """
    gate = net.indicators().get(site)
    if not isinstance(gate, ChannelGate):
        return features
    factor = torch.where(gate.weight == 0, 1.0, gate.weight)
    return features * (factor.detach() / factor)


def feature_module(site: str) -> str:
    """Return the name of the module whose output is compared with the teacher's.

    It is the norm in front of a compactor, as in the public code of the paper (behind the compactor, the comparison
    would work against the lasso), and the end of a stage with a channel gate.
    """
    return indicator_name(site).replace("compactor", "bn") if is_inner(site) else observed_module(site)


def observed_module(site: str) -> str:
    """Return the name of the module that outputs the features of a site, behind its indicator."""
    return indicator_name(site) if is_inner(site) else "maxpool" if site == "conv1" else site


def evenly_spaced(indices: Indices, count: int) -> Indices:
    """Return at most `count` of the indices, evenly spaced."""
    return indices[:: max(1, math.ceil(len(indices) / count))]


def build_student(params: Params, teacher: TeacherNet, compression: Compression) -> RetrievalNet:
    """Build the student before its first epoch: pruned by a static method, or full-width with indicators.

    Raises:
        TypeError: If the student should start as a teacher of another kind of network.
    """
    config = params.student
    if config.method == "static-random":
        return RetrievalNet(cut_spec(compression.full, kept_plan(compression)))
    if config.method == "static-magnitude":
        return cut(copy_of(teacher), kept_plan(compression))
    if config.init == "teacher":
        net = copy_of(teacher)
    else:
        net = RetrievalNet(compression.full)
        if config.init != "random":
            net.load_backbone(pretrained_weights(config.init, compression.full.depth, "student.init"), "`student.init`")
    return attach(net, compression.kept)


def copy_of(teacher: TeacherNet) -> RetrievalNet:
    """Return a copy of a teacher.

    Raises:
        TypeError: If it is not a `RetrievalNet`.
    """
    if not isinstance(teacher, RetrievalNet):
        raise TypeError("a student can only start as a teacher of its own architecture; set `student.init`")
    return convert(teacher, teacher.spec)


def student_task(
    fabric: Fabric,
    params: Params,
    teacher: TeacherNet,
    budget_cost: CostModel,
    steps: int,
    calibration: Tensor,
    validate: Validate | None,
    full: ArchSpec | None = None,
) -> StudentTask:
    """Set up the training of a student; the teacher is moved to the training device and frozen.

    `budget_cost` is the cost that the budget limits, `steps` the length of the whole training, and `full` the spec of
    the uncompressed student, by default that of the teacher.

    Raises:
        BudgetError: If no widths keep the budget.
    """
    config = params.student
    teacher.to(fabric.device).eval().requires_grad_(False)
    size = (params.data.image_size[0], params.data.image_size[1])
    full = full or copy_of(teacher).spec
    compression = build_compression(config, teacher, full, budget_cost, steps, params.seed, fabric.device)
    return StudentTask(fabric, config, teacher, size, compression, calibration, validate, params.seed)


def cache_teacher(task: StudentTask, loader: TrainLoader, inputs: str, folder: Path, params: Params) -> None:
    """Compute the outputs of the teacher for all views, unless they are stored; the training then reads them.

    Args:
        inputs: Digest of teacher, images and code.
        folder: Of stored outputs.

    Raises:
        OSError: If the disk has no room for them.
    """
    fabric, config = task.fabric, params.student
    settings = {
        "inputs": inputs,
        "images": hashlib.sha256(loader.pool.tobytes()).hexdigest(),
        "image_size": params.data.image_size,
        "modules": [*task.feature_modules.values(), *(["logits"] if config.distill.kl else [])],
        "augment": config.augment.model_dump(),
        "seed": params.seed,
        "computed": f"{params.runtime.precision} on {fabric.device.type}",
        # On a CPU, the number of threads decides how sums are rounded.
        "threads": torch.get_num_threads() if fabric.device.type == "cpu" else 0,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def compute(images: Tensor) -> dict[str, Tensor]:
        inputs = normalise(images.to(fabric.device))
        outputs = task.teacher_outputs(inputs.contiguous(memory_format=torch.channels_last))
        if not config.distill.kl:  # no loss needs the logits: as many numbers as there are identities
            del outputs["logits"]
        return outputs | {"embedding": normalize(outputs["embedding"], dim=1)}  # each view counts the same in a mean

    cache = TeacherCache(folder / name, loader.pool, loader.view, compute, config.distill.average_views)
    with fabric.rank_zero_first(local=True):  # it computes, the others read; nodes need not share a disk
        cache.fill(config.distill.views)
    task.cache = cache


def remaining_spec(net: RetrievalNet) -> ArchSpec:
    """Return the spec of a student after folding and cutting its zero channels, without the classifier."""
    plan = SurgeryPlan({site: tuple(channels.tolist()) for site, channels in nonzero_channels(net).items()})
    return cut_spec(net.spec, plan).bare()
