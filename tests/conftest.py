"""Fixtures: a checkout with fake stages that take milliseconds."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from pipeline.files import Files, write_json, write_text
from pipeline.records import RECORDS
from pipeline.stage.presets import preset_text
from tests.fake_stages import NUMBERS, Start, source

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Files:
    """A checkout with params.yaml and stages that return fixed metrics; it uses the library under test."""
    smoke = preset_text(ROOT, "smoke")
    assert "  publish: true " in smoke
    # Fake stages export no model that could be published.
    (tmp_path / "params.yaml").write_text(smoke.replace("  publish: true ", "  publish: false "))
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").write_text((ROOT / "stages" / "__init__.py").read_text())
    for stage in RECORDS:
        (tmp_path / "stages" / f"{stage}.py").write_text(source(stage))
    return Files(tmp_path, tmp_path)


@pytest.fixture
def pipeline(checkout: Files) -> Files:
    """The checkout with DVC and a pipeline of the fake stages."""
    previous: list[str] = ["params.yaml"]
    stages = {}
    for stage in RECORDS:
        stages[stage] = {
            "cmd": f"python -m stages.{stage}",
            "deps": [*previous, f"stages/{stage}.py"],
            "params": ["seed"],
            "outs": [f"artifacts/{stage}"],
            "metrics": [{f"metrics/{stage}.json": {"cache": False}}],
        }
        previous = [f"artifacts/{stage}"]
    stages["prepare"]["deps"] = ["stages/prepare.py"]
    with (checkout.root / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": stages}, file)
    (checkout.root / "data").mkdir()
    (checkout.root / ".dvc").mkdir()
    write_text(checkout.root / ".dvc" / "config", "[core]\n    no_scm = true\n    analytics = false\n")
    return checkout


@pytest.fixture
def reported(checkout: Files) -> Files:
    """The checkout with the files of all stages, none of which is tracked in MLflow."""
    for stage in RECORDS:
        write_json(checkout.metrics(stage), NUMBERS[stage])
        write_json(checkout.timings(stage), {"seconds": {"total": 1.5}})
    write_text(checkout.plots("teacher"), "epoch,loss,validation_map\n1,2.5,\n2,1.5,0.25\n")
    write_text(checkout.manifest, "path,identity,camera,split\n")
    write_text(checkout.report / "index.html", "<h1>report</h1>")
    write_text(checkout.artifacts("export") / "model.onnx", "onnx")
    return checkout


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python in a checkout; processes that still run after the test are killed."""
    started = []

    def begin(files: Files, *words: str, **extra: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_", "SMALLER_"))
        }
        library = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**kept, "PATH": path, "PYTHONPATH": library, **extra}
        process = subprocess.Popen(
            [sys.executable, *words], cwd=files.root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # Background jobs of a shell ignore Ctrl-C, and child processes would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            for running in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    running.kill()
        process.communicate()
