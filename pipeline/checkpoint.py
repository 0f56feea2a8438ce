"""Networks on disk as spec.json and weights.safetensors, written atomically and loaded strictly."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.files import write_atomically, write_text
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec

SPEC, WEIGHTS = "spec.json", "weights.safetensors"
FULL = "full.json"
"""Spec of the network that a student was before it shrank."""


def save(folder: Path, net: RetrievalNet) -> None:
    """Write spec.json and weights.safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary))
    save_spec(folder / SPEC, net.spec)


def save_spec(path: Path, spec: ArchSpec) -> None:
    """Write an architecture; attributes that have their defaults are left out."""
    write_text(path, json.dumps(spec.model_dump(exclude_defaults=True), indent=2) + "\n")


def load_spec(folder: Path, name: str = SPEC) -> ArchSpec:
    """Load the architecture only.

    Raises:
        FileNotFoundError: If the folder holds no network.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `dvc repro` or `dvc pull` first")
    return ArchSpec.model_validate_json(path.read_text(encoding="utf-8"))


def load(folder: Path) -> RetrievalNet:
    """Load a network to the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: If the folder holds no network.
        RuntimeError: If a weight is missing, unknown or of another shape than in the spec.
    """
    net = RetrievalNet(load_spec(folder))
    net.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return net.to(memory_format=torch.channels_last).eval()
