"""ONNX Runtime is opened in one way, at one place."""

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
        own = [module for module in modules if module.split(".")[0] == "onnxruntime"]
        if own and path.name != "session.py":
            assert "pipeline.inference.session" in modules[: modules.index(own[0])], path
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize(("asked", "given"), [(0, available_threads()), (1, 1), (3, 3)])
def test_zero_threads_are_all_that_there_are(content, tmp_path, asked, given):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert open_session(path, asked).get_session_options().intra_op_num_threads == given


def test_a_missing_file_comes_with_its_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.onnx is missing; run `dvc repro`"):
        open_session(tmp_path / "model.onnx")
