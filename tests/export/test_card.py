"""The card: short, true, and its code runs."""

import re
from dataclasses import replace

import numpy as np
from PIL import Image

from pipeline.export.card import Entry, card
from pipeline.export.release import sha256
from tests.export.tiny_network import SIZE, Pictures


def test_its_code_gives_the_pipelines_embedding(content, metadata, reference, tmp_path, monkeypatch):
    text = card({"model.onnx": Entry("the student", metadata, len(content), sha256(content))})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(content)
    Image.fromarray(Pictures.pixels[5]).save(tmp_path / "image.jpg", format="PNG")  # losslessly; PIL looks inside
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 11
    names = {}
    exec(code, names)
    assert names["embedding"].shape == (1, 16)
    np.testing.assert_allclose(names["embedding"][0], reference[5], atol=1e-5)


def test_it_tells_protocol_quality_size_input_and_checksums(metadata):
    files = {
        "model.onnx": Entry("the student", metadata, 4321, "a" * 64),
        "teacher.onnx": Entry("the teacher", replace(metadata, map=0.6666, params=9876543), 99999, "b" * 64),
    }
    text = card(files)
    height, width = SIZE
    for fact in (
        "| `model.onnx` | the student | 0.6250 | 1,234 | 56,789 | 4,321 |",
        "| `teacher.onnx` | the teacher | 0.6666 | 9,876,543 | 56,789 | 99,999 |",
        "protocol `market`",
        f"float32 (batch, 3, {height}, {width})",
        f"resize(({width}, {height})",
        f"{'a' * 64}  model.onnx",
        f"{'b' * 64}  teacher.onnx",
    ):
        assert fact in text
    assert card(files) == text
    assert len(text.splitlines()) < 60
