"""Experiments: which ones run, which results are reused, and which are compared."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.evidence import experiments
from benchmarks.evidence.experiments import EvidenceError, Experiment, read_results, revision_of, run, tracked_sources
from pipeline.config import Params
from pipeline.stage.presets import preset_text
from tests.benchmarks.conftest import git

OURS = Experiment("budget", 0.65, 0)


@pytest.fixture
def params(checkout: Path) -> Params:
    return experiments.preset_params(checkout)


def digest(checkout: Path, params: Params, experiment: Experiment = OURS) -> str:
    return experiments.digest(params, experiment, tracked_sources(checkout))


def test_the_digest_depends_on_settings_params_and_sources(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {digest(checkout, params)}
    for experiment in (
        Experiment("static-random", 0.65, 0),
        Experiment("budget", 0.8, 0),
        Experiment("budget", 0.65, 1),
    ):
        digests.add(digest(checkout, params, experiment))
    monkeypatch.setitem(experiments.LEARNING_RATES, "static-random", 0.5)
    digests.add(digest(checkout, params, Experiment("static-random", 0.65, 0)))
    teacher = params.teacher.model_copy(update={"epochs": 7})
    digests.add(digest(checkout, params.model_copy(update={"teacher": teacher})))
    with (checkout / "pipeline" / "losses" / "triplet.py").open("a") as file:
        file.write("# another\n")
    git(checkout, "commit", "-q", "-a", "-m", "a source")
    digests.add(digest(checkout, params))
    assert len(digests) == 7


def test_the_digest_does_not_depend_on_other_files_and_runtime_settings(checkout: Path, params: Params) -> None:
    before = digest(checkout, params)
    for name in ("README.md", "pipeline/report/render.py", "tests/imports.py"):
        with (checkout / name).open("a") as file:
            file.write("# another\n")
    git(checkout, "commit", "-q", "-a", "-m", "no source")
    runtime = params.runtime.model_copy(update={"teacher_cache_gib": 77.0, "workers": 3})
    assert digest(checkout, params.model_copy(update={"runtime": runtime})) == before


def test_uncommitted_sources_are_an_error(checkout: Path, params: Params) -> None:
    (checkout / "pipeline" / "losses" / "new.py").write_text("")
    with pytest.raises(EvidenceError, match=r"commit first(?s:.*)pipeline/losses/new\.py"):
        digest(checkout, params)


def store(checkout: Path, experiment: Experiment, sources: str, teacher_map: float) -> None:
    content = {
        "sources": sources,
        "method": experiment.method,
        "target": experiment.target,
        "seed": experiment.seed,
        "map": 0.8,
        "rank1": 0.9,
        "teacher_map": teacher_map,
        "macs_reduction": 0.65,
        "params_reduction": 0.7,
        "widths": {},
    }
    path = experiments._path(checkout, experiment)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_results_of_other_sources_are_ignored_with_a_warning(
    checkout: Path, params: Params, caplog: pytest.LogCaptureFixture
) -> None:
    other = Experiment("none", None, 0)
    store(checkout, OURS, digest(checkout, params), 0.9)
    store(checkout, other, "0123", 0.9)
    (known,) = read_results(checkout, params, tracked_sources(checkout))
    assert (known.method, known.map) == ("budget", 0.8)
    assert "none-seed0.json was made with other sources" in caplog.text


def test_students_of_different_teachers_of_one_seed_are_an_error(checkout: Path, params: Params) -> None:
    other = Experiment("static-random", 0.65, 0)
    store(checkout, OURS, digest(checkout, params), 0.9)
    store(checkout, other, digest(checkout, params, other), 0.91)
    with pytest.raises(
        EvidenceError, match=r"static-random-65-seed0\.json has another teacher than the other results of seed 0"
    ):
        read_results(checkout, params, tracked_sources(checkout))


def test_params_other_than_the_preset_are_an_error(checkout: Path) -> None:
    text = preset_text(checkout, "evidence")
    (checkout / "params.yaml").write_text("# the same values\n" + text)
    with pytest.raises(EvidenceError, match="commit first"):  # the next check: equal values pass the first one
        (checkout / "pipeline" / "losses" / "new.py").write_text("")
        experiments.compare_methods(checkout, [OURS])
    assert "\nseed: 0" in text
    (checkout / "params.yaml").write_text(text.replace("\nseed: 0", "\nseed: 1"))
    with pytest.raises(EvidenceError, match=r"params\.yaml is not the preset `evidence`"):
        experiments.compare_methods(checkout, [OURS])


PIPELINE = """
stages:
  surgery:
    cmd: python surgery.py
    deps: [surgery.py]
    params: [seed, student]
    metrics:
      - metrics.json:
          cache: false
"""
SURGERY = """
import json, os, pathlib, time
from ruamel.yaml import YAML
params = YAML(typ="safe").load(pathlib.Path("params.yaml"))
state = pathlib.Path(os.environ["DVC_ROOT"]) / "state"
with (state / "started").open("a") as file:
    print(params["seed"], file=file)
while (state / "wait").exists():
    time.sleep(0.05)
if (state / f"broken{params['seed']}").exists():
    raise SystemExit("broken")
json.dump(params, open("metrics.json", "w"))
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create a repository with one fast stage that writes its params to metrics.json."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    root = tmp_path / "tiny"
    (root / "state").mkdir(parents=True)
    (root / "params.yaml").write_text("seed: 0\nstudent:\n  method: budget\n  sites: [conv1]\n")
    (root / "dvc.yaml").write_text(PIPELINE)
    (root / "surgery.py").write_text(SURGERY)
    (root / ".gitignore").write_text("/state\n")
    git(root, "init", "-q")
    dvc(root, "init", "-q")
    dvc(root, "config", "core.analytics", "false")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "tiny")
    yield root
    for process in processes(root):  # an idle worker of DVC's queue exits only after some seconds
        process.kill()


def dvc(root: Path, *arguments: str) -> None:
    """Run `dvc` without pipes, which the worker of the queue would keep open."""
    command = [sys.executable, "-m", "dvc", *arguments]
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def started(root: Path) -> list[str]:
    path = root / "state" / "started"
    return path.read_text().split() if path.exists() else []


def processes(root: Path) -> list[psutil.Process]:
    """Return the processes of the queue: their working directory is in the repository."""
    workers = []
    for process in psutil.process_iter(["cwd", "pid"]):
        cwd = process.info["cwd"]
        if cwd and Path(cwd).is_relative_to(root) and process.pid != os.getpid():
            workers.append(process)
    return workers


def test_only_missing_experiments_run_in_the_queue(tiny: Path) -> None:
    requested = {"evidence-a": {"seed": "1", "student.sites": "[conv2]"}, "evidence-b": {"seed": "2"}}
    (tiny / "state" / "broken2").touch()
    run(requested, tiny)
    assert (started(tiny), revision_of("evidence-b", tiny)) == (["1", "2"], "")
    metrics = experiments._git(tiny, "show", f"{revision_of('evidence-a', tiny)}:metrics.json")
    assert json.loads(metrics) == {"seed": 1, "student": {"method": "budget", "sites": ["conv2"]}}
    (tiny / "state" / "broken2").unlink()
    (tiny / "notes.txt").write_text("a commit in between")
    git(tiny, "add", "-A")
    git(tiny, "commit", "-q", "-m", "notes")
    run(requested, tiny)
    assert started(tiny) == ["1", "2", "2"]
    assert revision_of("evidence-b", tiny)
    assert "seed: 0\n" in (tiny / "params.yaml").read_text()


def test_an_experiment_whose_processes_were_killed_runs_again(tiny: Path) -> None:
    (tiny / "state" / "wait").touch()
    for seed in ("1", "2"):
        dvc(tiny, "exp", "run", "--queue", "--name", f"evidence-{seed}", "-S", f"seed={seed}", "surgery")
    dvc(tiny, "queue", "start")
    deadline = time.monotonic() + 60
    while started(tiny) != ["1"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for process in processes(tiny):
        process.kill()
    (tiny / "state" / "wait").unlink()
    run({f"evidence-{seed}": {"seed": seed} for seed in ("1", "2")}, tiny)
    assert sorted(started(tiny)) == ["1", "1", "2"]
    assert all(revision_of(f"evidence-{seed}", tiny) for seed in ("1", "2"))
