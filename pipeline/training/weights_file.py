"""State dicts in files of other toolkits, read without running code from the file."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

INSIDE = ("state_dict", "model", "net", "model_state_dict")
"""Keys under which toolkits store the state dict beside that of the optimiser."""

SCALARS = [
    np.dtype, *(type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]  # fmt: skip
"""NumPy's scalars, which training loops store as best scores; reading them runs no other code."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a .safetensors, .pth, .pt or .pth.tar file to the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no state dict, or more than tensors and numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`teacher.weights` is {path}, which is not a file; set it to none, imagenet or a path")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`teacher.weights` is {path}, which holds more than tensors, and loading it could run code; if you trust it, load "
            "it yourself and write its state dict with `safetensors.torch.save_file`"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`teacher.weights` is {path}, which is not a file of tensors ({reason}); write a state dict with "
            "`safetensors.torch.save_file` or `torch.save`"
        ) from error
    while isinstance(content, dict) and (
        inner := next((key for key in INSIDE if isinstance(content.get(key), dict)), "")
    ):
        content = content[inner]
    tensors = (
        {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise ValueError(
            f"`teacher.weights` is {path}, which holds no state dict; write one with `torch.save(net.state_dict())`"
        )
    return tensors


def _unpickled(path: Path) -> Any:
    with torch.serialization.safe_globals(SCALARS):
        return torch.load(path, map_location="cpu", weights_only=True)
