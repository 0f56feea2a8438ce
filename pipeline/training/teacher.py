"""Training of the teacher: identity classification and a triplet loss, with validation on held-out identities."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor

from pipeline.config import Teacher, Training
from pipeline.data.images import Images
from pipeline.data.loader import TrainBatch
from pipeline.data.manifest import Manifest
from pipeline.losses import identity, triplet
from pipeline.models.resnet import Output, RetrievalNet, TeacherNet
from pipeline.models.spec import ArchSpec
from pipeline.models.weights_file import read_tensors
from pipeline.retrieval.embed import evaluate
from pipeline.training.loop import Forward, Task

log = logging.getLogger(__name__)

Validate = Callable[[TeacherNet], float]
"""Computes mAP of a network on the held-out training identities."""


def retrieval_losses(output: Output, labels: Tensor, config: Training) -> dict[str, Tensor]:
    """Return the weighted identity and triplet loss of a batch; `config.recipe` selects the pair of losses.

    Args:
        output: Embeddings (B, D) and logits (B, identities).
        labels: Identities (B,).
        config: Section `teacher` or `student` of params.yaml.

    Raises:
        ValueError: If the network has no classifier.
    """
    settings = config.losses
    if output.logits is None:
        raise ValueError("training needs a network with a classifier")
    if config.recipe == "scratch":
        identity_loss = identity.cosine_margin(output.logits, labels, settings.scale, settings.margin)
        triplet_loss = triplet.soft(output.embedding, labels, settings.triplet_scale)
    else:
        identity_loss = identity.smoothed(output.logits, labels, settings.label_smoothing)
        triplet_loss = triplet.hard(output.embedding, labels, settings.triplet_margin)
    return {"identity": identity_loss, "triplet": settings.triplet_weight * triplet_loss}


@dataclass(frozen=True)
class TeacherTask(Task):
    """Retrieval training without compression.

    Attributes:
        validate: Computes mAP on held-out identities; None if none are held out.
    """

    config: Teacher
    validate: Validate | None

    def losses(self, net: RetrievalNet, forward: Forward, batch: TrainBatch, progress: float) -> dict[str, Tensor]:
        losses = retrieval_losses(forward(batch.images), batch.labels, self.config)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        return {"validation_map": self.validate(net)} if validate and self.validate else {}


def validator(
    manifest: Manifest, images: Images, protocol: str, preprocess: Callable[[Tensor], Tensor], device: torch.device
) -> Validate | None:
    """Return a function that computes mAP on the held-out training identities; None if none are held out."""
    if not len(manifest.indices("validation-query")):
        return None

    def validate(net: TeacherNet) -> float:
        splits = ("validation-query", "validation-gallery")
        return evaluate(net, manifest, images, *splits, protocol, preprocess, device).map

    return validate


def build_teacher(config: Teacher, identities: int) -> RetrievalNet:
    """Build the teacher before its first epoch, with pretrained weights if `config.weights` names any.

    Raises:
        ValueError: If the weights do not fit the network.
        FileNotFoundError: If the file of weights does not exist.
        ConnectionError: If torchvision's weights cannot be downloaded.
    """
    net = RetrievalNet(ArchSpec.of(config, identities))
    if config.weights != "none":
        net.load_backbone(pretrained_weights(config.weights, config.depth, "teacher.weights"), "`teacher.weights`")
    return net


def pretrained_weights(weights: str, depth: int, key: str) -> dict[str, Tensor]:
    """Load a torchvision-named state dict: torchvision's published weights (``imagenet``), or those of a file.

    Args:
        key: Name in params.yaml, for messages.

    Raises:
        ValueError: If torchvision publishes no weights of this depth, or the file holds no state dict.
        FileNotFoundError: If the file does not exist.
        ConnectionError: If the download fails.
    """
    if weights == "imagenet":
        name = f"resnet{depth}"
        if name not in torchvision.models.list_models():
            raise ValueError(
                f"`{key}` is imagenet, but torchvision publishes no {name}; take the path of a file, or no weights"
            )
        try:
            return dict(torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True))
        except (URLError, OSError) as error:
            raise ConnectionError(
                f"torchvision's weights of {name} cannot be downloaded ({error}); set `{key}` to the path of a file, "
                "or take no weights"
            ) from error
    return read_tensors(Path(weights), key)
