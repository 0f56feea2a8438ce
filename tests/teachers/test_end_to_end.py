"""`dvc repro` with a teacher from elsewhere, through all six stages."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from ruamel.yaml import YAML
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import Params
from pipeline.data.augment import MEAN, STD
from pipeline.data.images import open_images
from pipeline.files import Files
from pipeline.stage.params_file import load
from tests.models.other_toolkits import FastReid
from tests.test_end_to_end import checkout, command, environment, metrics, repro

EMBEDDING_DIM = 32
MORE_VEHICLES = {"data.vehicles.train_identities": 40, "data.vehicles.test_identities": 30}
UPRIGHT = MORE_VEHICLES | {"data.image_size": [64, 48]}


def with_params(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change values of params.yaml by dotted name."""
    yaml, path = YAML(), folder / "params.yaml"
    content = yaml.load(path)
    for name, value in changes.items():
        *sections, key = name.split(".")
        section = content
        for part in sections:
            section = section[part]
        section[key] = value
    with path.open("w") as file:
        yaml.dump(content, file)


def stages_that_ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


def train(net: nn.Module, folder: Path, channels: int, normalise: Callable[[Tensor], Tensor]) -> None:
    """Train a network for some seconds on the images that stage `prepare` has rendered."""
    params = load(folder / "params.yaml")
    manifest, images = open_images(Files(folder, folder), params)
    train = manifest.indices("train")
    pixels = normalise(torch.from_numpy(images.batch(train)).permute(0, 3, 1, 2).float())
    labels = torch.from_numpy(np.searchsorted(np.array(manifest.train_identities), manifest.identities(train)))
    directions = nn.Parameter(torch.randn(len(manifest.train_identities), channels))
    optimizer = torch.optim.AdamW([*net.train().parameters(), directions], lr=2e-3)
    for _ in range(60):
        chosen = torch.randperm(len(labels))[:64]
        cosines = functional.normalize(net(pixels[chosen])) @ functional.normalize(directions).T
        optimizer.zero_grad()
        functional.cross_entropy(16 * cosines, labels[chosen]).backward()
        optimizer.step()


def write_fast_reid(folder: Path, seed: int) -> None:
    """Write a network with the names of fast-reid, which normalises its images itself."""
    torch.manual_seed(seed)
    net = FastReid((1, 1, 1, 1), 16, ibn=True)
    train(net, folder, net.backbone.channels, lambda pixels: pixels)
    torch.save({"model": net.state_dict(), "iteration": 60}, folder / "weights" / "teacher" / "model_best.pth")


@pytest.fixture(scope="module")
def from_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkout(tmp_path_factory.mktemp("checkpoint"))
    with_params(folder, UPRIGHT)
    assert repro(folder, "prepare").returncode == 0
    write_fast_reid(folder, 0)
    with_params(folder, {"teacher.source": "checkpoint", "teacher.weights": "weights/teacher/model_best.pth"})
    done = repro(folder)
    assert done.returncode == 0, done.stdout
    assert stages_that_ran(done.stdout) == ["teacher", "student", "surgery", "export", "benchmark"]
    assert "tensors that are not used: heads.weight" in done.stdout
    return folder


def test_a_checkpoint_of_fast_reid_is_compressed(from_checkpoint: Path) -> None:
    teacher, student, surgery, export = (
        metrics(from_checkpoint, stage) for stage in ("teacher", "student", "surgery", "export")
    )
    assert 0.4 <= student["macs_reduction"] <= 0.41
    assert surgery["max_abs_diff"] <= 1e-10
    assert export["map_teacher"] == pytest.approx(teacher["map"], abs=1e-4)


def test_only_what_depends_on_a_change_runs_again(from_checkpoint: Path) -> None:
    assert stages_that_ran(repro(from_checkpoint).stdout) == []
    with_params(from_checkpoint, {"student.epochs": 3})
    ran = stages_that_ran(repro(from_checkpoint, "--dry").stdout)
    assert ran == ["student"]
    with_params(from_checkpoint, {"student.epochs": 4})
    write_fast_reid(from_checkpoint, 1)
    ran = stages_that_ran(repro(from_checkpoint, "--dry").stdout)
    assert ran == ["teacher"]


@pytest.mark.parametrize(
    "wrong",
    [{"teacher.input.bgr": True}, {"teacher.input.mean": [0.0] * 3, "teacher.input.std": [1 / 255] * 3}],
    ids=["OpenCV's order", "bytes"],
)
def test_the_right_preprocessing_is_found_if_params_have_another(
    from_checkpoint: Path, tmp_path: Path, wrong: Mapping[str, Any]
) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(from_checkpoint, folder, symlinks=True)
    with_params(folder, wrong)
    done = repro(folder, "teacher")
    right = "`teacher.input.mean` [0.485, 0.456, 0.406], `std` [0.229, 0.224, 0.225] and `bgr` false"
    assert f"with {right}" in done.stdout, done.stdout


def write_squeezenet(folder: Path) -> None:
    """Write a SqueezeNet as an ONNX file."""
    torch.manual_seed(0)
    pooling = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, EMBEDDING_DIM), nn.BatchNorm1d(EMBEDDING_DIM))
    net = nn.Sequential(torchvision.models.squeezenet1_1().features, *pooling)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    train(net, folder, EMBEDDING_DIM, lambda pixels: (pixels / 255 - mean) / std)
    torch.onnx.export(
        net.eval(), (torch.zeros(2, 3, 64, 64),), folder / "weights" / "teacher" / "net.onnx", verbose=False,
        dynamo=True, external_data=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )  # fmt: skip


@pytest.fixture(scope="module")
def from_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkout(tmp_path_factory.mktemp("onnx"))
    with_params(folder, MORE_VEHICLES)
    assert repro(folder, "prepare").returncode == 0
    write_squeezenet(folder)
    changes = {
        "teacher.source": "onnx",
        "teacher.weights": "weights/teacher/net.onnx",
        "student.init": "random",
        "student.architecture.depth": 14,
        "student.architecture.width": 16,
        "student.distill.feature": 0.0,
        "student.distill.embedding": 20.0,
    }
    with_params(folder, changes)
    done = repro(folder)
    assert done.returncode == 0, done.stdout
    return folder


def test_a_student_learns_from_an_onnx_file_alone(from_onnx: Path) -> None:
    teacher, student, export, benchmark = (
        metrics(from_onnx, stage) for stage in ("teacher", "student", "export", "benchmark")
    )
    assert export["map_teacher"] == pytest.approx(teacher["map"], abs=1e-4)
    assert 0.4 <= student["macs_reduction"] <= 0.41
    assert export["macs_reduction_to_teacher"] == pytest.approx(1 - student["macs"] / teacher["macs"], abs=1e-9)
    assert export["macs_reduction"] == student["macs_reduction"]
    medians = [benchmark[name]["batch1_threadsall"]["p50"] for name in ("uncompressed", "student")]
    assert benchmark["speedup_over_uncompressed"] == pytest.approx(medians[0] / medians[1])
    params, macs = (f"{export[f'{name}_reduction_to_teacher']:.1%}" for name in ("params", "macs"))
    compared = " ".join(command(from_onnx, "compare").stdout.split())
    assert f"compared with the teacher: {params} of the params, {macs} of the MACs" in compared
    report = (from_onnx / "artifacts" / "benchmark" / "report" / "index.html").read_text()
    assert "unknown" not in report
    assert "Before it shrank, the student was another network than its teacher." in report
    card = (from_onnx / "artifacts" / "export" / "card.md").read_text()
    assert "`net.onnx`, which was trained elsewhere" in card
    for network, to in (("the teacher", "_to_teacher"), ("its own network before compression", "")):
        params, macs = (100 * export[f"{name}_reduction{to}"] for name in ("params", "macs"))
        saved = f"{params:.1f} % fewer parameters and {macs:.1f} % fewer MACs"
        assert f"compared with {network}, it has {saved}" in card


def with_a_branch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same network behind an `If`, whose operations are not counted."""
    graph, (output,) = model.graph, model.graph.output
    inner = f"{output.name}/inner"
    for node in graph.node:
        node.output[:] = [inner if name == output.name else name for name in node.output]
    branches = {}
    for side in ("then", "else"):
        result = onnx.ValueInfoProto()
        result.CopyFrom(output)
        result.name = f"{side}/{output.name}"
        copy = onnx.helper.make_node("Identity", [inner], [result.name])
        branches[f"{side}_branch"] = onnx.helper.make_graph([copy], side, [], [result])
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "condition"))
    graph.node.append(onnx.helper.make_node("If", ["condition"], [output.name], **branches))
    return model


def test_a_teacher_whose_operations_cannot_be_counted(from_onnx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(from_onnx, folder, symlinks=True)
    path = folder / "weights" / "teacher" / "net.onnx"
    onnx.save(with_a_branch(onnx.load(path)), path)
    done = repro(folder)
    assert done.returncode == 0, done.stdout
    teacher, before = metrics(folder, "teacher"), metrics(from_onnx, "teacher")
    assert "macs" not in teacher and teacher["map"] == pytest.approx(before["map"], abs=1e-6)
    assert "macs_reduction_to_teacher" not in metrics(folder, "export") and "realised" not in metrics(
        folder, "benchmark"
    )
    assert "unknown" in (folder / "artifacts" / "benchmark" / "report" / "index.html").read_text()
    assert "an unknown share of the MACs" in (folder / "artifacts" / "export" / "card.md").read_text()
    for words in (["compare"], ["publish"], ["compare", "--last", "1"]):
        assert command(folder, *words).returncode == 0


def test_a_network_of_this_project_is_compressed_further(from_checkpoint: Path, tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    shutil.copytree(from_checkpoint / "artifacts" / "surgery", folder / "weights" / "teacher" / "first")
    with_params(folder, UPRIGHT | {"teacher.source": "checkpoint", "teacher.weights": "weights/teacher/first"})
    done = repro(folder, "export")
    assert done.returncode == 0, done.stdout
    first, teacher, student = (
        metrics(from_checkpoint, "surgery"),
        metrics(folder, "teacher"),
        metrics(folder, "student"),
    )
    assert teacher["map"] == pytest.approx(first["map"], abs=1e-4)
    assert (teacher["params"], teacher["macs"]) == (first["params"], first["macs"])
    assert 0.4 <= 1 - student["macs"] / teacher["macs"] <= 0.41


def test_the_student_of_an_onnx_file_is_retrained_published_pulled_and_searched(
    from_onnx: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(from_onnx, folder, symlinks=True)
    with_params(folder, {"student.epochs": 3})
    retrained = subprocess.run(
        [sys.executable, "-m", "pipeline", "retrain"],
        cwd=folder, env=environment() | {"PREFECT_HOME": str(tmp_path / "prefect")}, capture_output=True, text=True,
    )  # fmt: skip
    assert retrained.returncode == 0, retrained.stderr
    assert "champion" in retrained.stdout + retrained.stderr
    pulled = command(folder, "pull", "--out", str(tmp_path / "model"))
    assert pulled.returncode == 0, pulled.stderr
    gallery = folder / "artifacts" / "prepare" / "vehicles"
    picture = next(path for path in sorted(gallery.rglob("*")) if path.suffix == ".jpg")
    for embedder in ("model.onnx", "teacher.onnx"):
        index, model = str(tmp_path / f"index of {embedder}"), str(tmp_path / "model" / embedder)
        indexed = command(folder, "index", "--gallery", str(gallery), "--out", index, "--model", model)
        assert indexed.returncode == 0, indexed.stderr
        found = command(folder, "search", "--index", index, "--query", str(picture), "--top", "3", "--json")
        assert found.returncode == 0, found.stderr
        assert picture.name in json.dumps(json.loads(found.stdout)[0])
    together = command(folder, "compatible", str(tmp_path / "model" / "teacher.onnx"))
    assert together.returncode == 0, together.stderr
    expected = metrics(folder, "export")["map_student_on_teacher"]
    assert float(together.stdout.splitlines()[1].split()[-1]) == pytest.approx(expected, abs=6e-5)


def test_params_that_do_not_fit_an_onnx_teacher_are_refused_at_once(from_onnx: Path) -> None:
    content = YAML(typ="safe").load((from_onnx / "params.yaml").read_text())
    content["student"] |= {"init": "teacher", "method": "paper"}
    content["student"]["distill"]["feature"] = 0.5
    with pytest.raises(ValueError, match="validation error") as error:
        Params.model_validate(content)
    for name in (
        "`student.init` must be",
        "`student.method` must be budget, static-random or none for source onnx, not paper",
        "`student.distill.feature` must be 0",
    ):
        assert name in str(error.value)
