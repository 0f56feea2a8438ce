"""The exported files in the oldest ONNX Runtime, ONNX Runtime Web, OpenVINO and OpenCV, each in its own environment."""

import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.augment import MEAN, STD
from pipeline.export import files as exporter
from pipeline.export.embed import embed_pixels, normalise_pixels
from pipeline.export.parity import cosines
from pipeline.export.release import ALL_IN_ONE, INT8, STUDENT, TEACHER
from pipeline.export.runtimes import LEAST_ONNX_RUNTIME, OPENCV, OPENVINO, WEB
from pipeline.files import Files
from pipeline.inference.session import open_session
from pipeline.inference.timing import Gain
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.stage.presets import load_preset
from pipeline.stage.run import Run
from stages.export import export
from stages.prepare import prepare
from tests.imports import ROOT

pytestmark = pytest.mark.stack

FILES = (STUDENT, ALL_IN_ONE, INT8, TEACHER)
CALL = 4
"""Images in a call, and in the files with a fixed batch."""

PYTHON = """
import json, sys
import numpy as np

def onnxruntime(path):
    from onnxruntime import InferenceSession
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(["embedding"], {"image": batch})[0]

def openvino(path):
    from openvino import Core
    model = Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: model(batch)["embedding"]

def opencv(path):
    from cv2 import dnn
    net = dnn.readNetFromONNX(path)
    def run(batch):
        net.setInput(batch, "image")
        return net.forward("embedding")
    return run

runtime, call, *names = sys.argv[1:]
results, call = {}, int(call)
for name in names:
    pixels = np.load("originals.npy" if "allinone" in name else "normalised.npy")
    try:
        run = globals()[runtime](name)
        parts = [run(pixels[start:start + call]).copy() for start in range(0, len(pixels), call)]
        results[name] = np.concatenate(parts).tolist()
    except Exception as error:
        results[name] = str(error)
print(json.dumps(results))
"""
JAVASCRIPT = """
import fs from "fs";
import * as ort from "onnxruntime-web";
ort.env.wasm.numThreads = 1;
const [folder, call, ...names] = process.argv.slice(2), results = {};
for (const name of names) {
  const uint8 = name.includes("allinone");
  const bytes = fs.readFileSync(`${folder}/${uint8 ? "originals" : "normalised"}.bin`);
  const data = uint8 ? new Uint8Array(bytes) : new Float32Array(new Uint8Array(bytes).buffer);
  const shape = uint8 ? [+call, 96, 96, 3] : [+call, 3, 64, 64], size = shape.reduce((a, b) => a * b);
  try {
    const session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(`${folder}/${name}`)));
    results[name] = [];
    for (let start = 0; start < data.length; start += size) {
      const image = new ort.Tensor(uint8 ? "uint8" : "float32", data.slice(start, start + size), shape);
      const { data: values, dims: [rows, width] } = (await session.run({ image })).embedding;
      for (let row = 0; row < rows; row++)
        results[name].push(Array.from(values.slice(row * width, (row + 1) * width)));
    }
  } catch (error) {
    results[name] = String(error);
  }
}
console.log(JSON.stringify(results));
"""


def net(seed: int) -> RetrievalNet:
    """Build a network with random weights and batch norms."""
    generator = torch.Generator().manual_seed(seed)
    made = RetrievalNet(ArchSpec.full(depth=14, width=16, embedding_dim=64, identities=4))
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif tensor.ndim > 1:
                tensor.normal_(0.0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return made


@pytest.fixture(scope="module", params=["dynamic", CALL], ids=["dynamic", "fixed batch"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All files of an export from rendered pictures, beside eight of the pictures as arrays."""
    root = tmp_path_factory.mktemp("checkout")
    params = load_preset(ROOT, "vehicles").model_dump()
    params["data"]["vehicles"] |= {"train_identities": 16, "test_identities": 6, "views": 1, "size": 96}
    params["export"] |= {"batch": request.param, "precisions": ["fp32", "int8"]}
    params["export"]["limits"]["int8_map_loss"] = 1.0
    params["benchmark"]["batches"] = [1 if request.param == "dynamic" else request.param]
    checked, paths = Params.model_validate(params), Files(root, root)
    prepare(Run("prepare", checked, paths, paths.artifacts("prepare")))
    for seed, name in enumerate(("surgery", "teacher")):
        checkpoint.save(paths.artifacts(name), net(seed))
    checkpoint.save_spec(paths.artifacts("student") / checkpoint.FULL, net(0).spec)
    out = paths.artifacts("export")
    with pytest.MonkeyPatch.context() as patch:  # an int8 file is wanted, whether it is faster here or not
        patch.setattr(exporter, "gains", lambda files, *_: dict.fromkeys(files, Gain(2.0, 2.0, 2.0, 8)))
        export(Run("export", checked, paths, out))
    pictures = sorted((paths.vehicles / "image_test").glob("*.jpg"))[: 2 * CALL]
    originals = [Image.open(path).convert("RGB") for path in pictures]
    small = np.stack([np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR)) for picture in originals])
    large, normalised = np.stack([np.asarray(picture) for picture in originals]), normalise_pixels(small, MEAN, STD)
    for name, array in (("originals", large), ("small", small), ("normalised", normalised)):
        np.save(out / f"{name}.npy", array)
        array.tofile(out / f"{name}.bin")
    yield out


def environment(folder: Path, *packages: str) -> Path:
    """Make a virtual environment with packages from PyPI, and return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def version_in(name: str, number: int = 0) -> str:
    """Return a version that the card names, so that it names only what is tried here."""
    return re.findall(r"\d+\.\d+", name)[number]


@pytest.fixture(scope="session")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    least = f"onnxruntime=={LEAST_ONNX_RUNTIME[18]}.0"
    return environment(tmp_path_factory.mktemp("onnxruntime"), least, "numpy<2")


@pytest.fixture(scope="session")
def openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("openvino"), f"openvino=={version_in(OPENVINO.name)}.*")


@pytest.fixture(scope="session")
def opencv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("opencv"), f"opencv-python-headless=={version_in(OPENCV.name, 1)}.*")


@pytest.fixture(scope="session")
def opencv4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("opencv4"), f"opencv-python-headless=={version_in(OPENCV.name)}.*")


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script beside ONNX Runtime Web."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "run.mjs").write_text(JAVASCRIPT)
    command = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(folder),
        f"onnxruntime-web@{version_in(WEB.name)}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run.mjs"


def run(release: Path, *command: object) -> tuple[dict[str, float], dict[str, str]]:
    """Run all files; return the smallest cosine with our embeddings of those that run, and the errors of the others."""
    done = subprocess.run([*map(str, command), f"{CALL}", *FILES], cwd=release, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cosine, problems = {}, {}
    for name, result in json.loads(done.stdout.splitlines()[-1]).items():
        if isinstance(result, str):
            problems[name] = result
            continue
        pixels = np.load(release / ("originals.npy" if name == ALL_IN_ONE else "small.npy"))
        ours = embed_pixels(open_session(release / name), pixels, MEAN, STD)
        cosine[name] = float(cosines(np.array(result, np.float32), ours).min())
    return cosine, problems


def suitable(cosine: dict[str, float]) -> set[str]:
    return {name for name, value in cosine.items() if value >= 0.9999}


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="PyPI has ONNX Runtime 1.15 up to Python 3.11")
def test_the_oldest_onnx_runtime_runs_every_file(oldest: Path, release: Path) -> None:
    cosine, problems = run(release, oldest, "-c", PYTHON, "onnxruntime")
    assert not problems
    assert suitable(cosine) == set(FILES)


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm installs ONNX Runtime Web")
def test_onnx_runtime_web_runs_the_files_that_the_card_names(web: Path, release: Path) -> None:
    cosine, problems = run(release, "node", web, release)
    assert not problems
    assert suitable(cosine) == set(WEB.files)


def test_openvino_runs_the_files_that_the_card_names(openvino: Path, release: Path) -> None:
    cosine, problems = run(release, openvino, "-c", PYTHON, "openvino")
    assert not problems
    assert suitable(cosine) == set(OPENVINO.files)
    assert set(cosine) == set(FILES) and min(cosine.values()) >= 0.995  # the others run, less exactly


def test_opencv_runs_the_files_that_the_card_names(opencv: Path, opencv4: Path, release: Path) -> None:
    for python in (opencv, opencv4):
        cosine, problems = run(release, python, "-c", PYTHON, "opencv")
        assert suitable(cosine) - {INT8} == set(OPENCV.files)  # OpenCV 4 computes some int8 files as we do
        assert "Resize" in problems[ALL_IN_ONE]
