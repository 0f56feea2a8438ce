"""Size on disk and memory of ONNX files, and the layers that ONNX Runtime runs in a slow memory layout."""

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
"""Domain of ONNX Runtime's convolutions on blocks of channels (NCHWc), which are faster than the others."""


@dataclass(frozen=True)
class Footprint:
    """Size and memory of one file.

    Attributes:
        bytes: Size on disk.
        memory: Peak memory of loading the file and one call, bytes; None if the system does not report it.
        plain_layers: Float convolutions that do not run in the fast layout.
    """

    bytes: int
    memory: int | None
    plain_layers: tuple[str, ...]


def footprints(files: Mapping[str, Path], image_size: tuple[int, int], batch: int) -> dict[str, Footprint]:
    """Measure ONNX files by name, each with an input of float32 (batch, 3, h, w) and `image_size` (h, w)."""
    return {
        name: Footprint(path.stat().st_size, _memory(path, image_size, batch), plain_layers(path))
        for name, path in files.items()
    }


def plain_layers(path: Path) -> tuple[str, ...]:
    """Return the names of the convolutions that ONNX Runtime does not run in the fast layout on this machine."""
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
    """Measure peak memory in a new process, because memory that was used and freed here would hide it."""
    command = [sys.executable, "-m", "pipeline.inference.footprint", str(path), *map(str, image_size), str(batch)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(process.stdout) or None


def _peak() -> int:
    """Return the peak memory of this process, bytes; 0 if the system is not Linux.

    `getrusage` does not work here: it includes the memory that the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def _reset_peak() -> None:
    """Set the peak to the present memory, because the peak of the imports would hide that of the file."""
    with suppress(OSError):  # not Linux, or not permitted
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Write the peak memory of loading a file and one call, bytes, to standard output."""
    path, height, width, batch = Path(sys.argv[1]), *map(int, sys.argv[2:])
    pixels = np.zeros((batch, 3, height, width), np.float32)
    _reset_peak()
    before = _peak()
    open_session(path).run(None, {INPUT: pixels})
    sys.stdout.write(str(max(_peak() - before, 0)))


if __name__ == "__main__":
    main()
