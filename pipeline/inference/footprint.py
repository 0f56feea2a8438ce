"""What a file costs besides time: bytes on disk, memory, and layers that run in a slow layout."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from pipeline.inference.session import INPUT, open_session

BLOCKED = "com.microsoft.nchwc"
"""Domain of ONNX Runtime's convolutions on blocks of channels, faster than its others."""


@dataclass(frozen=True)
class Footprint:
    """What one file costs.

    Attributes:
        bytes: Its size.
        memory: Bytes of memory that loading it and one call took at their peak; None where the system does not tell.
        plain_layers: Convolutions in floats that run outside of the fast layout.
    """

    bytes: int
    memory: int | None
    plain_layers: tuple[str, ...]


def footprints(files: Mapping[str, Path], image_size: tuple[int, int], batch: int) -> dict[str, Footprint]:
    """Look at some files.

    Args:
        files: ONNX files by name; each takes one float32 (B, 3, h, w).
        image_size: Height and width, pixels.
        batch: Images in the call whose memory is told.
    """
    return {
        name: Footprint(path.stat().st_size, _memory(path, image_size, batch), plain_layers(path))
        for name, path in files.items()
    }


def plain_layers(path: Path) -> tuple[str, ...]:
    """Convolutions of a file that ONNX Runtime does not run on blocks of channels on this machine, by their weights."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        open_session(path, 1, optimised=optimised)
        graph = onnx.load(optimised).graph
    return tuple(
        node.input[1].removesuffix(".weight")
        for node in graph.node
        if node.op_type in ("Conv", "FusedConv") and node.domain != BLOCKED
    )


def _memory(path: Path, image_size: tuple[int, int], batch: int) -> int | None:
    """Measured in a process of its own: memory that was used before would hide it."""
    command = [sys.executable, "-m", "pipeline.inference.footprint", str(path), *map(str, image_size), str(batch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout) or None


def _peak() -> int:
    """Largest memory of this process so far, bytes; 0 where the system is not Linux and does not tell.

    `getrusage` would not do: it counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _forget_peak() -> None:
    """Let the peak be what is held now: what importing took for a moment would hide what the file takes."""
    with suppress(OSError):  # where the system has no such thing, or does not allow it
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Write the memory that a file takes to standard output."""
    path, height, width, batch = Path(sys.argv[1]), *map(int, sys.argv[2:])
    pixels = np.zeros((batch, 3, height, width), np.float32)
    _forget_peak()
    before = _peak()
    open_session(path).run(None, {INPUT: pixels})
    sys.stdout.write(str(max(_peak() - before, 0)))


if __name__ == "__main__":
    main()
