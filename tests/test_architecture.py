"""Who may import whom: the borders along which DVC decides what must run again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import DEFAULTS
from tests.imports import ROOT, files_of, imported, rooms_of, sources

BASE = {"config", "records", "files", "labels", "progress", "protocols", "runtime"}
"""Rooms that every room may use."""
LIBRARY = {
    "config": set(),
    "records": set(),
    "files": set(),
    "labels": set(),
    "progress": set(),
    "protocols": set(),
    "runtime": {"config"},
    "checkpoint": {"files", "models"},
    "data": BASE,
    "models": BASE,
    "losses": BASE,
    "retrieval": BASE,
    "inference": BASE | {"models"},
    "training": BASE | {"data", "models", "losses", "retrieval", "checkpoint"},
    "compress": BASE | {"data", "models", "losses", "retrieval", "checkpoint", "training"},
    "teachers": BASE | {"data", "models", "retrieval", "checkpoint", "inference", "training"},
    "export": BASE | {"models", "checkpoint", "inference"},
    "search": BASE | {"data", "export", "inference", "retrieval"},
    "report": BASE | {"export", "inference", "retrieval", "data", "models"},
    "preview": BASE | {"data", "models", "retrieval", "training", "teachers", "compress", "report", "system"},
}
"""Rooms that compute, and the rooms that each may import."""
EDGES = {
    "system": BASE,
    "tracking": BASE | {"system"},
    "registry": BASE | {"system", "tracking", "data", "export", "inference", "retrieval"},
    "stage": BASE | {"system", "tracking", "data", "models", "losses", "compress", "training"},
    "flow": BASE | {"system", "tracking", "registry", "stage", "data", "export"},
}
"""Rooms that each connect the library to one tool."""
ALLOWED = LIBRARY | EDGES | {"cli": {*LIBRARY, *EDGES}, "__main__": {"cli"}}
SERVICES = {"mlflow": {"tracking", "registry"}, "prefect": {"flow"}, "dvc": {"flow"}}
"""Which rooms import which service."""
TOY_LIBRARIES = {"trimesh", "embreex"}
"""Libraries of the default data set alone."""
LIGHT = {"config", "records", "files", "labels", "protocols"}
"""Rooms of the standard library and pydantic only."""
NO_TORCH = ("toy_vehicles.render", "sources", "manifest", "images", "inspection")
"""Modules of `data` that stage prepare uses."""


def names() -> list[str]:
    return sorted({path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py") for path in sources("pipeline")})


@pytest.mark.parametrize("name", [name for name in names() if name != "__init__"])
def test_a_room_imports_only_from_the_rooms_it_may(name: str) -> None:
    for path in files_of(name):
        strange = rooms_of(path) - ALLOWED[name] - {name}
        assert not strange, f"{path.relative_to(ROOT)} imports {sorted(strange)}"


@pytest.mark.parametrize("path", sources("stages"), ids=lambda path: path.stem)
def test_no_stage_imports_another_and_only_the_way_to_run_of_the_edges(path: Path) -> None:
    found = set(imported(path))
    assert not {module for module in found if module.startswith("stages")}
    way = "pipeline.stage.params_file." if path.stem == "__init__" else "pipeline.stage.run."
    edges = {module for module in found if module.startswith(tuple(f"pipeline.{edge}." for edge in EDGES))}
    assert all(module.startswith(way) for module in edges)


@pytest.mark.parametrize("path", sources("pipeline") + sources("stages"), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_service_has_its_rooms(path: Path) -> None:
    tops = {module.partition(".")[0] for module in imported(path)}
    for service, rooms in SERVICES.items():
        assert service not in tops or rooms & set(path.parts), f"only {rooms} import {service}"


@pytest.mark.parametrize("path", sources("pipeline") + sources("stages"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_default_data_set_needs_its_libraries(path: Path) -> None:
    if "toy_vehicles" not in path.parts:
        assert not {module.partition(".")[0] for module in imported(path)} & TOY_LIBRARIES


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_the_lightest_rooms_need_no_library_but_pydantic(name: str) -> None:
    tops = {module.partition(".")[0] for path in files_of(name) for module in imported(path)}
    assert tops <= sys.stdlib_module_names | {"pydantic", "pipeline"}


def test_stage_prepare_and_the_params_need_no_torch() -> None:
    modules = ", ".join([*(f"pipeline.data.{name}" for name in NO_TORCH), "pipeline.stage.run", "pipeline.cli"])
    heavy = "{'torch', 'mlflow', 'prefect', 'dvc'}"
    code = f"import sys, {modules}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("module", ["pipeline.export.sample", "pipeline.search.page", "pipeline.flow.retrain"])
def test_who_runs_releases_or_waits_for_stages_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", sources("pipeline") + sources("stages"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_runtime_says_cuda_and_nobody_prints_but_the_edge(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name != "runtime.py":
        assert "cuda" not in text.lower()
    if not {"stages", "stage", "cli"} & set(path.parts):
        assert not re.search(r"(?<!console\.)\bprint\(", text)


@pytest.mark.parametrize(
    "module", ["flow.deploy", "flow.retrain", "tracking.background", "tracking.sync", "registry.publish", "stage.run"]
)
def test_telemetry_is_off_before_a_tool_is_imported(module: str) -> None:
    code = f"import os, pipeline; print(os.environ['DO_NOT_TRACK']); import pipeline.{module}"
    kept = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == "true"
