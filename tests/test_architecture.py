"""Who may import whom: the borders along which DVC decides what must run again."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import ROOT, files_of, imported, rooms_of, sources

BASE = {"config", "records", "files", "progress", "runtime"}
"""Rooms that everyone may use."""
ALLOWED = {
    "config": set(),
    "records": set(),
    "files": set(),
    "progress": set(),
    "runtime": {"config"},
    "checkpoint": {"files", "models"},
    "data": BASE,
    "models": BASE,
    "losses": BASE,
    "retrieval": BASE,
    "compress": BASE | {"models", "checkpoint"},
    "inference": BASE | {"models"},
    "export": BASE | {"models", "checkpoint", "inference"},
    "training": BASE | {"data", "models", "losses", "compress", "retrieval", "checkpoint"},
    "search": BASE | {"data", "export", "inference"},
    "benchmark": BASE | {"export", "inference", "retrieval", "data", "models"},
    "report": BASE | {"export", "inference", "retrieval", "data", "models", "benchmark"},
    "cli": BASE | {"ops", "retrieval", "export", "report", "search"},
    "__main__": {"cli"},
}
SERVICES = {"mlflow", "prefect", "dvc"}
LIGHT = {"config", "records", "files"}
"""Rooms of the standard library and pydantic only."""
NO_TORCH = ("vehicles", "sources", "manifest", "images", "inspect")
"""Modules of `data` that stage prepare uses."""


def names() -> list[str]:
    return sorted({path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py") for path in sources("pipeline")})


@pytest.mark.parametrize("name", [name for name in names() if name not in ("__init__", "ops")])
def test_a_room_imports_only_from_the_rooms_it_may(name: str) -> None:
    for path in files_of(name):
        strange = rooms_of(path) - ALLOWED[name] - {name}
        assert not strange, f"{path.relative_to(ROOT)} imports {sorted(strange)}"


@pytest.mark.parametrize("path", sources("stages"), ids=lambda path: path.stem)
def test_no_stage_imports_another_or_more_of_ops_than_the_way_to_run(path: Path) -> None:
    found = set(imported(path))
    assert not {module for module in found if module.startswith("stages")}
    ways = ("pipeline.ops.params.",) if path.stem == "__init__" else ("pipeline.ops.stage.",)
    assert all(module.startswith(ways) for module in found if module.startswith("pipeline.ops"))


@pytest.mark.parametrize("path", sources("pipeline") + sources("stages"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_ops_knows_the_services(path: Path) -> None:
    if "ops" not in path.parts:
        assert not {module.partition(".")[0] for module in imported(path)} & SERVICES


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_the_lightest_rooms_need_no_library_but_pydantic(name: str) -> None:
    tops = {module.partition(".")[0] for path in files_of(name) for module in imported(path)}
    assert tops <= sys.stdlib_module_names | {"pydantic", "pipeline"}


def test_stage_prepare_and_the_params_need_no_torch() -> None:
    modules = ", ".join([*(f"pipeline.data.{name}" for name in NO_TORCH), "pipeline.ops.stage", "pipeline.cli"])
    heavy = "{'torch', 'mlflow', 'prefect', 'dvc'}"
    code = f"import sys, {modules}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("module", ["pipeline.export.sample", "pipeline.search.page", "pipeline.ops.flow"])
def test_who_runs_releases_or_waits_for_stages_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", sources("pipeline") + sources("stages"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_runtime_says_cuda_and_nobody_prints_but_the_edge(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name != "runtime.py":
        assert "cuda" not in text.lower()
    if "ops" not in path.parts and path.parent.name != "stages" and "cli" not in path.parts:
        assert not re.search(r"(?<!console\.)\bprint\(", text)
