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

INSIDE = ("state_dict", "model", "net", "model_state_dict", "ema", "ema_state_dict")
"""Keys under which toolkits store the state dict beside that of the optimiser, in the order of preference."""

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


UNREADABLE = (
    *(SafetensorError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, AssertionError, TypeError),
    RecursionError,
)
"""What is raised for a damaged file."""


class WeightsError(ValueError):
    """A file holds no state dict that can be read without running code from it."""

    exit_code = 2


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """Read the state dict of a .safetensors, .pth, .pt or .pth.tar file to the CPU.

    Args:
        key: Name in params.yaml, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsError: If it holds no state dict, or more than tensors and numbers.
    """
    name = f"`{key}` is {path}, which"
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not a file; set it to the path of a state dict")
    with path.open("rb") as file:
        first = file.read(16)
    of_torch = first.startswith(MARKS)
    safe = path.suffix == ".safetensors" or (not of_torch and first[8:9] == b"{")  # behind the length of the header
    if not safe and not of_torch:
        raise WeightsError(f"{name} is no file of torch, since it begins with {first!r}; download or write it again")
    try:
        content = load_file(path) if safe else _unpickled(path)
        tensors = _state_dict(content)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{name} holds more than tensors, and loading it could run code; if you trust it, load it yourself, and "
            "write its state dict with `safetensors.torch.save_file`"
        ) from error
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0][:100]
        raise WeightsError(
            f"{name} is not a file of tensors ({reason}); copy it again, or write one with `torch.save`"
        ) from error
    if not tensors:
        raise WeightsError(f"{name} holds no state dict; write one with `torch.save(net.state_dict(), PATH)`")
    return tensors


def _unpickled(path: Path) -> Any:
    with torch.serialization.safe_globals(SCALARS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _state_dict(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, which may be inside of a dictionary; empty if there is none."""
    if not isinstance(content, dict):
        return {}
    inside = (_state_dict(content.get(key)) for key in INSIDE)
    own = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return next((tensors for tensors in inside if tensors), own)
