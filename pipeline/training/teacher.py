"""What the teacher learns: to tell identities apart, and to bring images of one close together."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import Teacher, Training
from pipeline.data.images import Images
from pipeline.data.manifest import Manifest
from pipeline.losses import identity, triplet
from pipeline.models.resnet import Output, RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.retrieval.embed import evaluate
from pipeline.training.loop import Forward, Task

log = logging.getLogger(__name__)

Validate = Callable[[RetrievalNet], float]
"""mAP of a network on the held-out training identities."""


def retrieval_losses(output: Output, labels: Tensor, config: Training) -> dict[str, Tensor]:
    """Weighted identity and triplet loss of a batch, by name.

    Args:
        output: Embeddings (B, D) and logits (B, identities).
        labels: (B,), identities.
        config: Section of params.yaml; `recipe` chooses the pair of losses.
    """
    numbers = config.losses
    if output.logits is None:
        raise ValueError("a network without a classifier cannot be trained")
    if config.recipe == "scratch":
        of_identity = identity.cosine_margin(output.logits, labels, numbers.scale, numbers.margin)
        of_triplets = triplet.soft(output.embedding, labels, numbers.triplet_scale)
    else:
        of_identity = identity.smoothed(output.logits, labels, numbers.label_smoothing)
        of_triplets = triplet.hard(output.embedding, labels, numbers.triplet_margin)
    return {"identity": of_identity, "triplet": numbers.triplet_weight * of_triplets}


@dataclass(frozen=True)
class TeacherTask(Task):
    """Plain retrieval training.

    Attributes:
        config: Section of params.yaml.
        validate: mAP on held-out identities, None where there are none.
    """

    config: Teacher
    validate: Validate | None

    def losses(
        self, net: RetrievalNet, forward: Forward, images: Tensor, labels: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """Identity and triplet loss."""
        losses = retrieval_losses(forward(images), labels, self.config)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        """MAP on held-out identities, now and then."""
        return {"validation_map": self.validate(net)} if validate and self.validate else {}


def validation(
    manifest: Manifest, images: Images, protocol: str, preprocess: Callable[[Tensor], Tensor], device: torch.device
) -> Validate | None:
    """Scores networks on the held-out training identities, never on the test set; None where none are held out."""
    if not len(manifest.indices("validation-query")):
        return None

    def validate(net: RetrievalNet) -> float:
        splits = ("validation-query", "validation-gallery")
        return evaluate(net, manifest, images, *splits, protocol, preprocess, device).map

    return validate


def build_teacher(config: Teacher, identities: int) -> RetrievalNet:
    """Build a teacher before its first epoch.

    Raises:
        ValueError: If weights are asked for that do not fit.
        FileNotFoundError: If there is no such file of weights.
        ConnectionError: If torchvision's weights are asked for and cannot be had.
    """
    cosine = config.recipe == "scratch"
    spec = ArchSpec.full(config.depth, config.width, config.embedding_dim, config.last_stride, identities, cosine)
    net = RetrievalNet(spec)
    if config.weights != "none":
        net.load_backbone(pretrained(config.weights, config.depth), config.weights)
    return net


def pretrained(weights: str, depth: int) -> dict[str, Tensor]:
    """Load a torchvision-named state dict: torchvision's published weights (``imagenet``) or a .safetensors file.

    Raises:
        ValueError: If torchvision publishes no weights of this depth, or the file is no safetensors file.
        FileNotFoundError: If there is no such file.
        ConnectionError: If the download fails.
    """
    if weights == "imagenet":
        name = f"resnet{depth}"
        if name not in torchvision.models.list_models():
            raise ValueError(
                f"torchvision publishes no {name}; set `depth` to 18, 34, 50, 101 or 152, or `weights` to none"
            )
        try:
            return dict(torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True))
        except (URLError, OSError) as error:
            raise ConnectionError(
                f"the published weights of {name} cannot be had ({error}); set `weights` to none or a file's path"
            ) from error
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"`weights` names {weights}, which is no file; set it to none, imagenet or a path")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"`weights` names {weights}, which is no safetensors file ({error}); write a state dict that you trust "
            "with `safetensors.torch.save_file`"
        ) from error
