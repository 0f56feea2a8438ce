"""ONNX Runtime is opened in one place, without telemetry."""

import ast
import os
from pathlib import Path

import pytest

from pipeline.inference.session import open_session
from pipeline.runtime import available_threads

ROOT = Path(__file__).parents[2]


def test_telemetry_is_off_before_any_file_imports_the_runtime():
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")]:
        modules = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules.append(node.module or "")
        runtime = [module for module in modules if module.split(".")[0] == "onnxruntime"]
        if runtime and path.name != "session.py":
            assert "pipeline.inference.session" in modules[: modules.index(runtime[0])], path
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(("requested", "expected"), [(0, available_threads()), (1, 1), (3, 3)])
def test_zero_threads_stands_for_all_available_ones(content, tmp_path, requested, expected):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert open_session(path, requested).get_session_options().intra_op_num_threads == expected


def test_the_variable_of_openmp_limits_all_threads_but_not_a_number_that_was_asked_for(content, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    counts = [open_session(content, number).get_session_options().intra_op_num_threads for number in (0, 2)]
    assert counts == [1, 2]


def test_the_error_for_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.onnx is missing; run `dvc repro`"):
        open_session(tmp_path / "model.onnx")
