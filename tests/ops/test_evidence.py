"""Which results belong together: those of the same sources, settings and teacher."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.config import Params
from pipeline.ops import evidence
from pipeline.ops.evidence import Cell, EvidenceError
from pipeline.ops.params import load
from tests.imports import ROOT

OURS = Cell("budget", 0.65, 0)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project as it stands, committed, without results."""
    folder = tmp_path / "checkout"
    git(tmp_path, "clone", "-q", str(ROOT), str(folder))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in tracked:
        if (ROOT / name).is_file():
            (folder / name).write_bytes((ROOT / name).read_bytes())
    shutil.rmtree(folder / "evidence", ignore_errors=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "as it stands")
    return folder


@pytest.fixture
def params(checkout: Path) -> Params:
    return load(checkout / "presets" / "evidence.yaml")


def digest(checkout: Path, params: Params, cell: Cell = OURS) -> str:
    return evidence._digest(params, cell, evidence._sources(checkout))


def test_what_decides_about_the_figures_makes_another_digest(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {digest(checkout, params)}
    for cell in (Cell("static-random", 0.65, 0), Cell("budget", 0.8, 0), Cell("budget", 0.65, 1)):
        found.add(digest(checkout, params, cell))
    monkeypatch.setitem(evidence.LEARNING_RATES, "static-random", 0.5)
    found.add(digest(checkout, params, Cell("static-random", 0.65, 0)))
    teacher = params.teacher.model_copy(update={"epochs": 7})
    found.add(digest(checkout, params.model_copy(update={"teacher": teacher})))
    with (checkout / "pipeline" / "losses" / "triplet.py").open("a") as file:
        file.write("# another\n")
    git(checkout, "commit", "-q", "-a", "-m", "a source")
    found.add(digest(checkout, params))
    assert len(found) == 7


def test_what_does_not_decide_leaves_the_digest_alone(checkout: Path, params: Params) -> None:
    before = digest(checkout, params)
    for name in ("README.md", "pipeline/report/render.py", "tests/imports.py"):
        with (checkout / name).open("a") as file:
            file.write("# another\n")
    git(checkout, "commit", "-q", "-a", "-m", "no source")
    runtime = params.runtime.model_copy(update={"answers_gib": 77.0, "workers": 3})
    assert digest(checkout, params.model_copy(update={"runtime": runtime})) == before


def test_sources_that_are_not_committed_are_refused(checkout: Path, params: Params) -> None:
    (checkout / "pipeline" / "losses" / "new.py").write_text("")
    with pytest.raises(EvidenceError, match=r"commit first(?s:.*)pipeline/losses/new\.py"):
        digest(checkout, params)


def store(checkout: Path, cell: Cell, sources: str, teacher_map: float) -> None:
    content = {
        "sources": sources,
        "method": cell.method,
        "target": cell.target,
        "seed": cell.seed,
        "map": 0.8,
        "rank1": 0.9,
        "teacher_map": teacher_map,
        "macs_reduction": 0.65,
        "params_reduction": 0.7,
        "widths": {},
    }
    path = evidence._path(checkout, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_results_of_other_sources_are_left_out_and_named(
    checkout: Path, params: Params, caplog: pytest.LogCaptureFixture
) -> None:
    other = Cell("none", None, 0)
    store(checkout, OURS, digest(checkout, params), 0.9)
    store(checkout, other, "0123", 0.9)
    (known,) = evidence._known(checkout, params)
    assert (known.method, known.map) == ("budget", 0.8)
    assert "none-seed0.json comes from other sources" in caplog.text


def test_students_of_different_teachers_are_not_compared(checkout: Path, params: Params) -> None:
    other = Cell("static-random", 0.65, 0)
    store(checkout, OURS, digest(checkout, params), 0.9)
    store(checkout, other, digest(checkout, params, other), 0.91)
    with pytest.raises(EvidenceError, match=r"static-random-65-seed0\.json had another teacher than others of seed 0"):
        evidence._known(checkout, params)
