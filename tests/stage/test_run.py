import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.files import Files, read_json, write_text
from pipeline.records import Record, TeacherRecord
from pipeline.stage.params_file import load
from pipeline.stage.run import Run, curves_csv, exit_code, run_guarded
from tests.fake_stages import NUMBERS, OFF, Start

TEACHER = ("-m", "stages.teacher")


@pytest.fixture
def run(checkout: Files) -> Run:
    return Run("teacher", load(checkout.params), checkout, checkout.artifacts("teacher"))


def wait_for_nap(process: "subprocess.Popen[str]") -> None:
    assert process.stderr is not None
    while "naps" not in (line := process.stderr.readline()):
        assert line, "the stage ended before its nap"


def test_a_stage_writes_metrics_curves_timings_and_artifacts(checkout: Files, start: Start) -> None:
    out, err = start(checkout, *TEACHER, **OFF).communicate()
    assert json.loads(checkout.metrics("teacher").read_text()) == NUMBERS["teacher"]
    assert checkout.plots("teacher").read_text() == "epoch,loss,validation_map\n1,1.0,\n2,0.5,0.5\n"
    timings = json.loads(checkout.timings("teacher").read_text())
    assert timings["seconds"]["total"] >= 0
    assert timings["peak_memory_bytes"] > 10_000_000
    assert timings["versions"]["torch"]
    assert (checkout.artifacts("teacher") / "result.txt").is_file()
    assert err.strip().endswith("teacher: naps")
    assert out == "running\n"


def test_invalid_params_are_rejected_before_the_stage_is_imported(checkout: Files, start: Start) -> None:
    write_text(checkout.root / "stages" / "teacher.py", "raise SystemExit('imported')\n")
    text = checkout.params.read_text()
    write_text(checkout.params, text.replace("seed: 0", "sed: 0").replace("opset: 1", "opset: 2"))
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        process = start(checkout, *TEACHER)
        _, err = process.communicate()
        seconds.append(time.monotonic() - began)
        assert process.returncode == 2
    assert err.splitlines()[0] == "params.yaml: `seed` is missing; `smaller-student preset --upgrade` adds it"
    assert "`sed` is unknown; nearest: `seed`" in err and "`export.opset` must be at most 23" in err
    assert "Traceback" not in err
    assert min(seconds) < 2


def test_importing_the_stages_package_does_not_validate_params(checkout: Files, start: Start) -> None:
    checkout.params.unlink()
    process = start(checkout, "-c", "import stages")
    process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize(("param", "variable"), [("1", ""), ("0", "1")])
def test_the_timings_name_the_threads_of_the_stage(checkout: Files, start: Start, param: str, variable: str) -> None:
    checkout.params.write_text(checkout.params.read_text().replace("threads: 0 ", f"threads: {param} "))
    assert start(checkout, "-m", "stages.prepare", OMP_NUM_THREADS=variable).wait() == 0
    assert read_json(checkout.timings("prepare"))["threads"] == 1


def test_an_error_is_one_line_with_its_own_exit_code(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER, FAIL="teacher", **OFF)
    _, err = process.communicate()
    assert process.returncode == 4
    assert err.splitlines()[-1] == "teacher: the parity is gone; train again"
    assert "Traceback" not in err
    assert not checkout.metrics("teacher").exists()


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_debug_option_and_variable_print_a_traceback(checkout: Files, start: Start, how: str) -> None:
    words = [*TEACHER, *(["--debug"] if how == "option" else [])]
    extra = {"SMALLER_STUDENT_DEBUG": "1"} if how == "variable" else {}
    _, err = start(checkout, *words, FAIL="teacher", **OFF, **extra).communicate()
    assert "Traceback" in err and err.splitlines()[-1] == "teacher: the parity is gone; train again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_stage_with_exit_code_128_plus_its_number(
    checkout: Files, start: Start, number: signal.Signals
) -> None:
    process = start(checkout, *TEACHER, NAP="60", **OFF)
    wait_for_nap(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("teacher: stopped by ")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a process when its parent ends")
def test_a_stage_ends_when_its_dvc_process_is_killed(checkout: Files, start: Start) -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, {', '.join(map(repr, TEACHER))}])"
    dvc = start(checkout, "-c", code, NAP="60", **OFF)
    wait_for_nap(dvc)
    (stage,) = psutil.Process(dvc.pid).children()
    dvc.kill()
    stage.wait(timeout=5)
    assert not stage.is_running()


def test_only_rank_0_writes_files_and_run_records(checkout: Files, start: Start) -> None:
    process = start(checkout, *TEACHER, LOCAL_RANK="1")
    out, _ = process.communicate()
    assert process.returncode == 0 and out == "running\n"
    assert not checkout.metrics("teacher").exists()
    assert not (checkout.root / "mlflow.db").exists()


def test_the_curves_file_has_the_columns_of_all_rows_and_exact_numbers() -> None:
    rows = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1.0, "map": 0.5}]
    text = curves_csv(rows)
    assert text == "epoch,loss,map\n1,0.30000000000000004,\n2,1.0,0.5\n"
    read = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(text.splitlines())]
    assert read == rows


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_an_error_and_nothing_is_written(run: Run, value: float) -> None:
    record = TeacherRecord.model_validate({**NUMBERS["teacher"], "map": value})
    with pytest.raises(ValueError, match="stage teacher computed NaN or infinity for map"):
        run.write(record, 1.0)
    assert not run.files.metrics("teacher").exists()


def test_a_metric_that_was_not_measured_is_omitted(run: Run) -> None:
    class Half(Record):
        map: float
        rank1: float | None

    run.write(Half(map=0.5, rank1=None), 1.0)
    assert json.loads(run.files.metrics("teacher").read_text()) == {"map": 0.5}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("too small; enlarge it"), 1, "too small; enlarge it"),
        (FileNotFoundError("x is missing; run it"), 3, "x is missing; run it"),
        (KeyError("layer3"), 1, "KeyError: 'layer3'"),
        (RuntimeError(), 1, "RuntimeError: "),
    ],
)
def test_errors_become_one_line(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert run_guarded("here", work) == code == exit_code(error)
    assert capsys.readouterr().err.splitlines()[0] == f"here: {line}".rstrip() or line.endswith(": ")


# --- training states --------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(checkout: Files) -> Path:
    write_text(checkout.root / "dvc.yaml", "stages: {teacher: {deps: [code, artifacts/prepare/manifest.csv]}}\n")
    write_text(checkout.root / "code" / "loop.py", "1")
    write_text(checkout.manifest, "path")
    return checkout.root


def folder(files: Files, *sections: str) -> Path:
    run = Run("teacher", load(files.params), files, files.artifacts("teacher"))
    return run.checkpoints(*sections).folder


def test_the_same_training_finds_its_states_again(checkout: Files, inputs: Path) -> None:
    found = folder(checkout, "teacher")
    assert found == folder(checkout, "teacher")
    assert found.parent == checkout.checkpoints / "teacher"
    (inputs / "code" / "loop.cpython-311.pyc").write_text("compiled")
    os.utime(inputs / "code" / "loop.py", (1, 1))
    assert found == folder(checkout, "teacher")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("params.yaml", "seed: 0", "seed: 1"),
        ("params.yaml", "depth: 14", "depth: 26"),
        ("params.yaml", "precision: auto", "precision: 32-true"),
        ("code/loop.py", "1", "2"),
        ("artifacts/prepare/manifest.csv", "path", "paths"),
    ],
)
def test_a_training_with_other_params_inputs_or_code_does_not_resume(
    checkout: Files, inputs: Path, name: str, old: str, new: str
) -> None:
    before = folder(checkout, "teacher")
    path = inputs / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert folder(checkout, "teacher") != before


def test_under_dvc_hashes_of_outputs_come_from_dvc_lock(
    checkout: Files, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "teacher")
    before = folder(checkout, "teacher")
    lock = "stages: {prepare: {outs: [{path: artifacts/prepare/manifest.csv, hash: md5, md5: abc}]}}\n"
    write_text(checkout.root / "dvc.lock", lock)
    locked = folder(checkout, "teacher")
    assert locked != before
    checkout.manifest.write_text("not read again")
    assert folder(checkout, "teacher") == locked
    write_text(checkout.root / "dvc.lock", lock.replace("abc", "def"))
    assert folder(checkout, "teacher") != locked


def test_large_inputs_are_identified_by_content_not_by_modification_time(checkout: Files, inputs: Path) -> None:
    large = inputs / "code" / "large.bin"
    large.write_bytes(bytes(20 * 2**20))
    before = folder(checkout, "teacher")
    os.utime(large, (1, 1))
    assert folder(checkout, "teacher") == before
    large.write_bytes(bytes(20 * 2**20 - 1) + b"1")
    assert folder(checkout, "teacher") != before


def test_params_of_other_stages_and_of_the_machine_do_not_matter(checkout: Files, inputs: Path) -> None:
    before = folder(checkout, "teacher")
    text = checkout.params.read_text()
    for old, new in (("workers: 0", "workers: 1"), ("threads: 0", "threads: 1"), ("repeats: 5", "repeats: 6")):
        assert old in text
        text = text.replace(old, new)
    checkout.params.write_text(text)
    assert folder(checkout, "teacher") == before


def test_training_states_are_deleted_after_the_metrics_are_written(run: Run, inputs: Path) -> None:
    states = run.checkpoints("teacher").folder
    states.mkdir(parents=True)
    run.write(TeacherRecord.model_validate(NUMBERS["teacher"]), 1.0)
    assert not states.exists()
