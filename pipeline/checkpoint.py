"""A network on disk: spec.json and weights.safetensors; weights only, loaded strictly, written atomically."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.files import write_atomically, write_text
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec

SPEC, WEIGHTS = "spec.json", "weights.safetensors"


def save(folder: Path, net: RetrievalNet) -> None:
    """Write a network.

    Args:
        folder: Where spec.json and weights.safetensors go.
        net: Network to write.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary))
    write_text(folder / SPEC, json.dumps(net.spec.model_dump(), indent=2) + "\n")


def load_spec(folder: Path) -> ArchSpec:
    """Read the architecture alone.

    Raises:
        FileNotFoundError: If there is no network in the folder.
    """
    path = folder / SPEC
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `dvc repro` or `dvc pull` first")
    return ArchSpec.model_validate_json(path.read_text(encoding="utf-8"))


def load(folder: Path) -> RetrievalNet:
    """Rebuild a network on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no network in the folder.
        RuntimeError: If a weight is missing, unknown or of another shape than the spec says.
    """
    net = RetrievalNet(load_spec(folder))
    net.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return net.to(memory_format=torch.channels_last).eval()
