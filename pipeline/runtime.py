"""Device, precision, threads and seed: the only module that detects hardware."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from pipeline.config import Runtime

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

THREADS = "OMP_NUM_THREADS"
"""Environment variable by which OpenMP, and libraries that do not use it, limit the threads of a process."""


def available_threads(processes: int = 1, root: Path = Path("/")) -> int:
    """Count the threads that this process may use: one for each core, and no more than OMP_NUM_THREADS.

    Cores are those of the affinity mask, limited by the CPU quotas of the control groups, which are read below `root`.

    Args:
        processes: Processes that share the cores; OMP_NUM_THREADS counts for each of them.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = math.floor(min([count, *_cpu_quotas(root)]))
    first = os.environ.get(THREADS, "").partition(",")[0].strip()  # a list is for nested parallel regions
    limit = int(first) if first.isascii() and first.isdigit() else 0  # OpenMP ignores other values, and so does this
    return max(1, min(cores // processes, limit or cores))


def limit_threads(threads: int) -> None:
    """Limit the threads of this process and of those that it starts from now on, through OMP_NUM_THREADS.

    A variable that is smaller stays. Set before a library is loaded, the variable suffices; numpy is loaded already.

    Args:
        threads: `runtime.threads`; 0 sets no limit.
    """
    if threads:
        os.environ[THREADS] = str(min(threads, available_threads()))
        threadpool_limits(available_threads())


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quota, in processors, of this process's control group and each parent group (versions 1 and 2)."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in groups:  # hierarchy:controllers:path; version 2 has no controllers
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")  # in a container this may be the path on the host; then only the mount exists
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                with suppress(OSError, ValueError):  # no quota, or `max`
                    if controllers:
                        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                    else:
                        quota, period = (folder / "cpu.max").read_text().split()
                    if int(quota) > 0:  # -1: none
                        yield int(quota) / int(period)


def launch(runtime: Runtime, seed: int) -> "Fabric":
    """Start Lightning Fabric with seeded global generators and deterministic algorithms.

    Raises:
        ValueError: If a GPU is required and there is none, or 16-bit precision is required on a CPU.
    """
    import torch  # takes seconds, and `available_threads` does not need it
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.seed import seed_everything

    gpu = torch.cuda.is_available()
    if runtime.accelerator == "gpu" and not gpu:
        raise ValueError("`runtime.accelerator` is gpu, but torch finds none; set it to auto or cpu")
    accelerator = "cuda" if gpu and runtime.accelerator != "cpu" else "cpu"
    precision = runtime.precision
    if precision == "auto":
        native = accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16-mixed" if native else "32-true"
    if accelerator == "cpu" and precision != "32-true":
        # Without AMX or AVX-512, bf16 is emulated and many times slower.
        raise ValueError(f"`runtime.precision` is {precision}, which a CPU emulates slowly; set it to auto or 32-true")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this setting
    torch.use_deterministic_algorithms(True, warn_only=accelerator != "cpu")
    seed_everything(seed, workers=True, verbose=False)
    fabric = Fabric(
        accelerator=accelerator,
        devices=runtime.devices,
        num_nodes=runtime.nodes,
        strategy=runtime.strategy,
        precision=precision,
    )
    fabric.launch()
    # After the launch of several processes, in which Fabric sets another number.
    torch.set_num_threads(available_threads(runtime.devices if accelerator == "cpu" else 1))
    log.info("%s on %s, %d threads, %s", accelerator, fabric.device, torch.get_num_threads(), precision)
    return fabric


def device_memory(device: "torch.device") -> int | None:
    """Wait for the queued work of a device; return the most memory that torch has used on it, bytes (None: a CPU)."""
    import torch

    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device)
