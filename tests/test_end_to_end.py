"""All six stages with `dvc repro` on the smoke preset: the files they write, caching, and resuming after a kill."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pipeline.export.model import load_model
from pipeline.export.release import read_release, write_release
from pipeline.export.sample import EXPECTED, expected
from pipeline.files import write_text
from pipeline.stage.presets import preset_text

ROOT = Path(__file__).parents[1]
STAGES = ("prepare", "teacher", "student", "surgery", "export", "benchmark")

ARTIFACTS = {
    "prepare/images.npy",
    "prepare/manifest.csv",
    "prepare/quarantine.csv",
    "warnings.csv",
    "teacher/spec.json",
    "teacher/weights.safetensors",
    "student/full.json",
    "student/plan.json",
    "student/spec.json",
    "student/weights.safetensors",
    "surgery/plan.json",
    "surgery/spec.json",
    "surgery/weights.safetensors",
    "export/SHA256SUMS",
    "export/card.md",
    "export/model.allinone.onnx",
    "export/model.onnx",
    "export/sample.json",
    "export/sample.png",
    "export/teacher.onnx",
    "benchmark/latency.csv",
    "benchmark/report/index.html",
}
"""All artifacts except the rendered images and the charts of the report."""


def environment() -> dict[str, str]:
    # An empty PYTHONPATH makes the code of the checkout run, not the code under test.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_", "PYTEST_"))}
    return kept | {"PATH": path, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}


def checkout(folder: Path, preset: str = "smoke") -> Path:
    """Copy the working tree into a new Git repository, with a preset in params.yaml."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    write_text(folder / "params.yaml", preset_text(ROOT, preset))
    for produced in ("dvc.lock", "metrics", "plots"):
        path = folder / produced
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    dates = {
        "GIT_AUTHOR_DATE": "2026-01-01T00:00Z",
        "GIT_COMMITTER_DATE": "2026-01-01T00:00Z",
    }  # a fixed commit id: ONNX files contain it
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=folder, check=True, capture_output=True, env={**os.environ, **dates})
    return folder


def repro(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def metrics(folder: Path, stage: str) -> dict[str, float]:
    return json.loads((folder / "metrics" / f"{stage}.json").read_text())


def digests(folder: Path) -> dict[str, str]:
    """Hash all files that must be identical for equal seeds."""
    hashes = {}
    for path in sorted(
        p for top in ("artifacts", "metrics", "plots") for p in (folder / top).rglob("*") if p.is_file()
    ):
        name = path.relative_to(folder).as_posix()
        if "benchmark" not in name:
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkout(tmp_path_factory.mktemp("finished"))
    done = repro(folder)
    assert done.returncode == 0, done.stdout
    return folder


def test_the_pipeline_writes_exactly_these_files(finished: Path) -> None:
    artifacts = finished / "artifacts"
    names = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    charts = {name for name in names if name.startswith("benchmark/report/") and name.endswith(".png")}
    rendered = {name for name in names if name.startswith("prepare/vehicles/")}
    assert names - charts - rendered == ARTIFACTS
    assert len(charts) >= 4
    assert {path.name for path in (finished / "metrics").iterdir()} == {f"{stage}.json" for stage in STAGES}
    assert {path.name for path in (finished / "plots").iterdir()} == {"teacher.csv", "student.csv"}
    assert {path.name for path in (finished / "timings").iterdir()} == {f"{stage}.json" for stage in STAGES}
    leftovers = [path for path in (finished / ".checkpoints").rglob("*") if path.is_file()]
    assert [path.suffix for path in leftovers] == [".lock"]  # of the outputs of the teacher, which are deleted


def test_the_student_meets_its_budget_and_surgery_keeps_its_quality(finished: Path) -> None:
    student, surgery, export = (metrics(finished, stage) for stage in ("student", "surgery", "export"))
    assert student["target"] <= student["macs_reduction"] <= student["target"] + 0.01
    assert surgery["macs_reduction"] == student["macs_reduction"]
    assert surgery["params"] == student["params"]
    assert surgery["max_abs_diff"] <= 1e-10
    assert surgery["map"] == pytest.approx(student["map"], abs=5e-4)
    assert export["map"] == pytest.approx(surgery["map"], abs=1e-4)
    assert export["map_teacher"] == pytest.approx(metrics(finished, "teacher")["map"], abs=1e-4)
    assert export["min_cosine"] >= 0.99999
    assert export["int8_published"] == 0


def test_card_and_report_name_the_images_without_labels(finished: Path) -> None:
    count = metrics(finished, "prepare")["unlabelled"]
    card, report = (
        (finished / "artifacts" / name).read_text() for name in ("export/card.md", "benchmark/report/index.html")
    )
    assert f"the student learned from {count} images without labels" in card
    assert f"and {count}\nimages without labels" in report


def test_metrics_contain_numbers_only(finished: Path) -> None:
    def numbers(value: object) -> bool:
        if isinstance(value, dict):
            return all(numbers(inner) for inner in value.values())
        return isinstance(value, int | float) and not isinstance(value, bool)

    assert all(numbers(metrics(finished, stage)) for stage in STAGES)


def test_the_onnx_file_embeds_any_number_of_images(finished: Path) -> None:
    session = onnxruntime.InferenceSession(finished / "artifacts" / "export" / "model.onnx")
    for images in (1, 3, 8):
        noise = np.random.default_rng(0).normal(size=(images, 3, 32, 32)).astype(np.float32)
        (embedding,) = session.run(None, {"image": noise})
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
        assert embedding.shape == (images, 32)


def test_checksums_match_the_files(finished: Path) -> None:
    export = finished / "artifacts" / "export"
    for line in (export / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((export / name).read_bytes()).hexdigest() == digest


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `smaller-student`."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=folder, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def write_worse_release(release: Path, target: Path) -> None:
    """Write a valid release whose student has noise on its convolution weights."""
    files = read_release(release)
    model = onnx.load_from_string(files["model.onnx"])
    random = np.random.default_rng(0)
    for weights in model.graph.initializer:
        if len(weights.dims) == 4:
            values = onnx.numpy_helper.to_array(weights)
            noisy = values + random.normal(0, 2 * values.std(), values.shape).astype(values.dtype)
            weights.CopyFrom(onnx.numpy_helper.from_array(noisy, weights.name))
    files["model.onnx"] = model.SerializeToString()
    models = {name: content for name, content in files.items() if name.endswith(".onnx")}
    size = load_model("model.onnx", files["model.onnx"]).metadata.image_size
    target.mkdir()
    write_release(target, files | {EXPECTED: expected(models, size)})


def test_a_release_becomes_champion_a_worse_one_does_not_and_the_pulled_model_runs(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(finished, folder, symlinks=True)
    first = command(folder, "publish")
    assert (first.returncode, first.stdout) == (0, "version 1 is champion: there is no earlier version\n"), first.stderr
    write_worse_release(folder / "artifacts" / "export", tmp_path / "worse")
    second = command(folder, "publish", str(tmp_path / "worse"))
    assert second.returncode == 4, second.stderr
    assert "version 2 stays challenger: mAP may be " in second.stderr
    pulled = command(folder, "pull", "--out", str(tmp_path / "model"))
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "model" / "SHA256SUMS").read_text() == (
        folder / "artifacts" / "export" / "SHA256SUMS"
    ).read_text()
    assert command(folder, "verify", str(tmp_path / "model")).returncode == 0
    refused = command(folder, "rollback")
    assert refused.returncode == 3
    assert "no champion before the present one" in refused.stderr
    history = command(folder, "history").stdout
    assert history.count("promote") == 1
    compared = command(folder, "compare", "--last", "3").stdout
    assert f"{metrics(folder, 'export')['map']:.4f}" in compared
    downloaded = subprocess.run(
        [sys.executable, "-m", "mlflow", "artifacts", "download", "-u", "models:/smaller-student@champion",
         "-d", str(tmp_path / "downloaded")],
        cwd=folder, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert downloaded.returncode == 0, downloaded.stderr
    assert command(folder, "verify", str(tmp_path / "downloaded")).returncode == 0


def test_verify_accepts_the_release_and_rejects_a_flipped_bit(finished: Path, tmp_path: Path) -> None:
    done = command(finished, "verify")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "model.onnx", "model.allinone.onnx", "teacher.onnx"
    ]  # fmt: skip
    shutil.copytree(finished / "artifacts" / "export", tmp_path / "export")
    content = bytearray((tmp_path / "export" / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "export" / "model.onnx").write_bytes(content)
    done = command(finished, "verify", str(tmp_path / "export"))
    assert done.returncode == 4
    assert "model.onnx is damaged" in done.stderr


def test_stage_and_command_agree_on_the_student_in_the_teachers_gallery(finished: Path) -> None:
    done = command(finished, "compatible", "artifacts/export/teacher.onnx")
    assert done.returncode == 0, done.stderr
    printed = [float(line.split()[-1]) for line in done.stdout.splitlines()[:3]]
    export = metrics(finished, "export")
    assert printed == pytest.approx([export["map_teacher"], export["map_student_on_teacher"], export["map"]], abs=6e-5)


def test_a_second_repro_does_nothing(finished: Path) -> None:
    before = digests(finished)
    done = repro(finished)
    assert done.returncode == 0
    assert "Data and pipelines are up to date." in done.stdout
    assert digests(finished) == before


def test_a_change_of_the_budget_does_not_rerun_the_teacher(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "changed", symlinks=True)
    folder = tmp_path / "changed"
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("reduction: 0.4", "reduction: 0.3"))
    done = repro(folder, "--dry")
    ran = {stage for stage in STAGES if f"Running stage '{stage}'" in done.stdout}
    assert ran == {"student"}, done.stdout  # a dry run cannot know that later stages will change too


def kill_when_saved(folder: Path, stage: str, epoch: int) -> None:
    """Run `dvc repro` and kill its process group once `stage` has saved its state after `epoch`."""
    command = [sys.executable, "-m", "dvc", "repro"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list((folder / ".checkpoints" / stage).glob(f"*/epoch-{epoch:05d}.safetensors")):
        assert process.poll() is None, f"dvc ended before {stage} had finished epoch {epoch}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_trainings_resume_and_give_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    folder = checkout(tmp_path / "killed")
    kill_when_saved(folder, "teacher", 1)
    kill_when_saved(folder, "student", 2)
    done = repro(folder)
    assert done.returncode == 0, done.stdout
    assert "resuming after epoch 2" in done.stdout
    assert digests(folder) == digests(finished)


def test_all_errors_in_params_are_reported_at_once(finished: Path, tmp_path: Path) -> None:
    text = preset_text(ROOT, "smoke")
    text = text.replace("  epochs: 2 ", "  epochs: 0 ", 1).replace("validation:", "validaton:")
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "params.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "stages.teacher"],
        cwd=folder, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "`data.validaton` is unknown; nearest: `data.validation`" in done.stderr
    assert "`teacher.epochs` must be at least 1, got 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_comparison_of_methods_runs_each_experiment_once(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.copy2(folder / "params.yaml", folder / "presets" / "evidence.yaml")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["add", "-A"], ["commit", "-q", "-m", "ran"]):
        subprocess.run([*git, *command], cwd=folder, check=True, capture_output=True)
    code = """
from pathlib import Path
from benchmarks.evidence.experiments import Experiment, compare_methods
methods = [Experiment("budget", 0.4, 0), Experiment("static-magnitude", 0.45, 0), Experiment("paper", None, 0)]
compare_methods(Path.cwd(), methods)
"""
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment() | {"PYTHONPATH": str(folder)}, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        logs = [path.read_text() for path in (folder / ".dvc" / "tmp" / "exps" / "run").glob("*/*.out")]
        outputs.append("".join(logs))
        assert len(logs) == 3  # one per experiment, none from the second call
        # another machine has the files in Git, but not the refs of DVC's experiments
        listed = ["git", "for-each-ref", "--format=delete %(refname)", "refs/exps"]
        refs = subprocess.run(listed, cwd=folder, check=True, capture_output=True).stdout
        subprocess.run(["git", "update-ref", "--stdin"], cwd=folder, check=True, input=refs)
    assert "Running stage 'student'" in outputs[0]
    assert "Running stage 'teacher'" not in outputs[0]
    lines = (folder / "evidence" / "results.csv").read_text().splitlines()
    budget, paper, magnitude = (dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:])
    assert float(budget["map"]) == pytest.approx(metrics(finished, "surgery")["map"], abs=1e-6)
    assert 0.45 <= float(magnitude["macs_reduction"]) <= 0.46
    assert paper["target"] == ""
    page = (folder / "evidence" / "README.md").read_text()
    assert f"{float(magnitude['map']):.4f}" in page
    assert (folder / "evidence" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "metrics" / "student.json").read_text()) == metrics(finished, "student")


def test_a_latency_budget_is_met_and_its_cost_model_is_written(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(finished, folder, symlinks=True)
    params = (folder / "params.yaml").read_text()
    changed = params.replace("of: macs", "of: latency").replace(
        "reduction: 0.4", "reduction: 0.25"
    )  # far from the smallest possible latency
    (folder / "params.yaml").write_text(changed)
    done = repro(folder, "surgery")
    assert done.returncode == 0, done.stdout
    student = metrics(folder, "student")
    warned = "more than the requested 25.0 %" in done.stdout  # happens if a busy machine gave wrong timings
    assert student["target"] <= student["latency_reduction"]
    assert warned == (student["latency_reduction"] > student["target"] + 0.01)
    assert student["macs_reduction"] == metrics(folder, "surgery")["macs_reduction"]
    terms = json.loads((folder / "artifacts" / "student" / "latency.json").read_text())
    assert {term["right"] for term in terms} >= {"conv1", "layer1", "layer1.0.conv1", "embedding"}
