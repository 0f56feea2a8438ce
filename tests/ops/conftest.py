"""A checkout in which every stage takes milliseconds."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.files import Files, write_json, write_text
from pipeline.records import RECORDS

ROOT = Path(__file__).parents[2]

NUMBERS = {
    "prepare": {"images": 9, "identities": 3, "cameras": 2, "train": 4, "validation": 0, "query": 2, "gallery": 3},
    "teacher": {"params": 1000, "macs": 20000},
    "student": {"params": 500, "macs": 9000, "params_reduction": 0.5, "macs_reduction": 0.55, "target": 0.55},
    "surgery": {"params": 500, "macs": 9000, "params_reduction": 0.5, "macs_reduction": 0.55, "max_abs_diff": 1e-14},
    "export": {"map": 0.59, "map_teacher": 0.61, "min_cosine": 0.999999, "bytes": 2000, "bytes_teacher": 4000},
    "benchmark": {"speedup": 2.0, "ideal_speedup": 2.5, "realised": 0.8},
}
SCORES = {"map": 0.6, "rank1": 0.7, "rank5": 0.8, "rank10": 0.9, "minp": 0.3, "queries": 2, "dropped": 0}
LATENCIES = {
    "speedup_by_setting": {"batch1_threadsall": 2.0},
    "teacher": {"batch1_threadsall": {"p50": 4.0, "p90": 5.0}},
    "student": {"batch1_threadsall": {"p50": 2.0, "p90": 3.0}},
}
NUMBERS["prepare"] |= {"quarantined": 0, "leaked": 0}
for _stage in ("teacher", "student", "surgery"):
    NUMBERS[_stage] |= SCORES | ({"map": 0.61} if _stage == "teacher" else {})
NUMBERS["surgery"] |= {"widths": {"layer1.0.conv1": 8}}
NUMBERS["export"] |= {"params": 500, "macs": 9000, "params_reduction": 0.5, "macs_reduction": 0.55, "int8_published": 0}
NUMBERS["benchmark"] |= LATENCIES

STAGE = """
import json, logging, os, sys, time
from pipeline.files import write_text
from pipeline.ops.stage import Run, run_stage
from pipeline.records import RECORDS

class GateError(RuntimeError):
    exit_code = 4

def {stage}(run: Run):
    print("running")
    for epoch in (1, 2):
        if run.stage in ("teacher", "student"):
            run.curve({{"epoch": epoch, "loss": 1 / epoch}} | ({{"validation_map": 0.5}} if epoch == 2 else {{}}))
    logging.getLogger("pipeline.{stage}").info("naps")
    time.sleep(float(os.environ.get("NAP", "0")))
    if os.environ.get("FAIL") == run.stage:
        raise GateError("the parity is gone; train again")
    write_text(run.out / "result.txt", str(run.params.seed))
    if run.stage == "benchmark":
        write_text(run.files.report / "index.html", "<h1>report</h1>")
    return RECORDS[run.stage].model_validate(json.loads({numbers!r}))

if __name__ == "__main__":
    run_stage({stage})
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Files:
    """Params, and stages that report fixed numbers; the library is the one under test."""
    import json

    (tmp_path / "params.yaml").write_text((ROOT / "presets" / "smoke.yaml").read_text())
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").write_text((ROOT / "stages" / "__init__.py").read_text())
    for stage in RECORDS:
        text = STAGE.format(stage=stage, numbers=json.dumps(NUMBERS[stage]))
        (tmp_path / "stages" / f"{stage}.py").write_text(text)
    return Files(tmp_path, tmp_path)


@pytest.fixture
def pipeline(checkout: Files) -> Files:
    """The checkout with DVC and a pipeline of those stages."""
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
    (checkout.root / ".dvc").mkdir()
    write_text(checkout.root / ".dvc" / "config", "[core]\n    no_scm = true\n    analytics = false\n")
    return checkout


@pytest.fixture
def reported(checkout: Files) -> Files:
    """The checkout after all stages have run somewhere: their files are there, MLflow knows nothing."""
    for stage in RECORDS:
        write_json(checkout.metrics(stage), NUMBERS[stage])
        write_json(checkout.timings(stage), {"seconds": {"total": 1.5}})
    write_text(checkout.plots("teacher"), "epoch,loss,validation_map\n1,2.5,\n2,1.5,0.25\n")
    write_text(checkout.manifest, "path,identity,camera,split\n")
    write_text(checkout.report / "index.html", "<h1>report</h1>")
    write_text(checkout.artifacts("export") / "model.onnx", "onnx")
    return checkout


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python in a checkout; what still runs after the test is killed."""
    started = []

    def begin(files: Files, *words: str, **extra: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "DVC_", "SMALLER_"))}
        environment = {**kept, "PATH": path, "PYTHONPATH": str(ROOT), **extra}
        process = subprocess.Popen(
            [sys.executable, *words], cwd=files.root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


OFF = {"SMALLER_STUDENT_TRACKING": "off"}
