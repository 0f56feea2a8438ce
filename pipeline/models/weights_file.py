"""State dicts in files of other toolkits, read without running code from the file."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

INSIDE = ("state_dict", "model", "net", "model_state_dict")
"""Keys under which toolkits store the state dict beside that of the optimiser."""

MARKS = (b"PK\x03\x04", b"\x80")
"""First bytes of files that `torch.save` writes: zip archives, before version 1.6 pickles."""

CORES = ("core", "_core")
"""The name of a package of NumPy, before version 2 and since then."""

SCALARS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    np.dtype,
    *(type(np.dtype(name)) for name in ("f4", "f8", "i4", "i8")),
    *((cast(Callable[..., Any], np.float64(0).__reduce__()[0]), f"numpy.{core}.multiarray.scalar") for core in CORES),
]
"""What NumPy's scalars consist of, which training loops store as best scores; reading them runs no other code."""


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """Read the state dict of a .safetensors, .pth, .pt or .pth.tar file to the CPU.

    Args:
        key: Name in params.yaml, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no state dict, or more than tensors and numbers.
    """
    name = f"`{key}` is {path}, which"
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not a file; set it to the path of a state dict")
    with path.open("rb") as file:
        first = file.read(16)
    if path.suffix != ".safetensors" and not first.startswith(MARKS):
        raise ValueError(f"{name} is no file of torch, since it begins with {first!r}; download or write it again")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name} holds more than tensors, and loading it could run code; if you trust it, load it yourself, and "
            "write its state dict with `safetensors.torch.save_file`"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} is not a file of tensors ({reason}); write one with `torch.save`") from error
    tensors = _state_dict(content)
    if not tensors:
        raise ValueError(f"{name} holds no state dict; write one with `torch.save(net.state_dict(), PATH)`")
    return tensors


def _unpickled(path: Path) -> Any:
    with torch.serialization.safe_globals(SCALARS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, which may be inside of a dictionary; empty if there is none."""
    if not isinstance(content, dict):
        return {}
    for key in INSIDE:
        if isinstance(content.get(key), dict):
            return _state_dict(content[key])
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
