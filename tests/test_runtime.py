"""How many threads a process uses: its processors, OMP_NUM_THREADS and `runtime.threads`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runtime import THREADS, available_threads, limit_threads

ROOT = Path(__file__).parents[1]


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors in the affinity mask and no variable; the root of a system without control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv(THREADS, raising=False)
    return tmp_path


def tree(root: Path, files: dict[str, str]) -> Path:
    """Create files below a root folder."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GROUPS: dict[str, tuple[dict[str, str], int]] = {
    "none": ({}, 8),
    "version 2, no quota": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
    "version 2, in a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    "version 2, less than one": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "version 2, more than the mask": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "3200000 100000\n"}, 8),
    "version 2, of the group around it": (
        {
            "proc/self/cgroup": "0::/user.slice/job.scope\n",
            "sys/fs/cgroup/user.slice/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
            "sys/fs/cgroup/elsewhere/cpu.max": "100000 100000\n",
        },
        3,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "9:memory:/job\n4:cpu,cpuacct:/job\n1:name=systemd:/\n0::/\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1, in a container with the path on its host": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123abc\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "500000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        5,
    ),
}
"""Files below the root, and the expected threads with eight processors in the affinity mask."""


@pytest.mark.parametrize("name", GROUPS)
def test_the_quotas_of_all_parent_control_groups_limit_the_threads(name: str, eight: Path) -> None:
    files, expected = GROUPS[name]
    assert available_threads(root=tree(eight, files)) == expected


@pytest.mark.parametrize(
    ("variable", "processes", "expected"),
    [
        ("3", 1, 3),
        ("16", 1, 8),  # there are eight processors
        (" 2,4 ", 1, 2),  # the second number is for nested parallel regions
        *((ignored, 1, 8) for ignored in ("", "0", "-1", "all", "1.5", "\u0663")),
        ("3", 2, 3),  # the variable counts for each process
        ("6", 2, 4),
        ("", 16, 1),
    ],
)
def test_the_variable_of_openmp_limits_the_threads(
    variable: str, processes: int, expected: int, eight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(THREADS, variable)
    assert available_threads(processes, root=eight) == expected


@pytest.mark.parametrize(
    ("param", "variable", "expected"), [(0, "", ""), (0, "3", "3"), (2, "", "2"), (2, "3", "2"), (3, "2", "2")]
)
def test_the_smaller_one_of_param_and_variable_counts(
    param: int, variable: str, expected: str, eight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(THREADS, variable)
    monkeypatch.setattr("pipeline.runtime.threadpool_limits", lambda threads: None)
    limit_threads(param)
    assert os.environ[THREADS] == expected  # and child processes inherit it


PROGRAM = """
import json, os, sys
import numpy
from pipeline.runtime import available_threads, launch, limit_threads
from pipeline.stage.presets import load_preset
limit_threads(int(sys.argv[1]))
import faiss, torch
from pathlib import Path
from threadpoolctl import threadpool_info
from pipeline.search.index import Index
runtime = load_preset(Path("."), "smoke").runtime
launch(runtime, 0)
Index(None, Path("."), ["a"], [""], numpy.ones((1, 4), "float32"))
pools = {pool["internal_api"]: pool["num_threads"] for pool in threadpool_info() if "numpy" in pool["filepath"]}
print(json.dumps([available_threads(), torch.get_num_threads(), faiss.omp_get_max_threads(), *pools.values()]))
"""


@pytest.mark.parametrize(("param", "variable"), [("1", None), ("0", "1"), ("1", "2")])
def test_every_library_keeps_the_limit_although_numpy_is_loaded_before(param: str, variable: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != THREADS}
    if variable is not None:
        environment[THREADS] = variable
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, param], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    counts = json.loads(done.stdout)
    assert len(counts) == 4, "numpy has no BLAS that can be limited"
    assert set(counts) == {1}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity masks")
def test_only_processors_in_the_affinity_mask_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(THREADS, raising=False)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)
