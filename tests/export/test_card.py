"""The model card: its numbers, and its code, which runs without torch and without this package."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from PIL import Image

from pipeline.export.card import CardEntry, gallery_note, render_card, teacher_note
from pipeline.export.metadata import finish
from pipeline.export.preprocessing import add_preprocessing
from pipeline.export.release import sha256
from pipeline.export.runtimes import Requirements
from pipeline.export.to_onnx import to_onnx
from tests.export.tiny_network import MEAN, SIZE, STD, Pictures

NEEDS = Requirements(opset=18, ir_version=8, onnxruntime="1.15", batch=None)

RUN_WITHOUT_TORCH = """
import importlib.abc, json, sys
class BlockOtherPackages(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "onnx", "pipeline", "stages", "scipy", "mlflow"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, BlockOtherPackages())
variables = {}
exec(open("code.py").read(), variables)
print(json.dumps(variables["embedding"].tolist()))
"""


@pytest.fixture(scope="module", params=[None, 1, 3], ids=["dynamic", "one", "three"])
def batch(request):
    return request.param


@pytest.fixture(scope="module")
def files(batch, translated, net, metadata):
    model = onnx.load_from_string(translated) if batch is None else to_onnx(net, SIZE, 18, batch)
    whole = add_preprocessing(model, SIZE, MEAN, STD)
    return {"model.onnx": finish(model, metadata), "model.allinone.onnx": finish(whole, metadata)}


@pytest.fixture(scope="module")
def entries(files, batch, metadata):
    needs = replace(NEEDS, batch=batch)
    return {
        name: CardEntry(
            "the student", metadata, {"market": 0.625, "loo": 0.5}, len(file), sha256(file), needs, "all" in name
        )
        for name, file in files.items()
    }


def test_each_code_block_reproduces_the_embedding_with_onnxruntime_alone(files, entries, batch, reference, tmp_path):
    text = render_card(entries, {})
    for name, file in files.items():
        (tmp_path / name).write_bytes(file)
    Image.fromarray(Pictures.pixels[5]).save(
        tmp_path / "image.jpg", format="PNG"
    )  # lossless; Pillow ignores the suffix
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert [file for block in blocks for file in files if f'"{file}"' in block] == ["model.allinone.onnx", "model.onnx"]
    for block in blocks:
        assert len(block.splitlines()) <= 11
        (tmp_path / "code.py").write_text(block)
        command = [sys.executable, "-c", RUN_WITHOUT_TORCH]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        embedding = np.array(json.loads(done.stdout))
        assert embedding.shape == (batch or 1, 16)
        np.testing.assert_allclose(embedding[0], reference[5], atol=1e-5)


@pytest.mark.parametrize("batch", [None], indirect=True)
def test_it_shows_protocols_map_size_input_licence_origin_and_checksums(entries, metadata):
    changed = replace(metadata, params=9876543, git_commit="c" * 40 + "+")
    shown = entries | {
        "teacher.onnx": CardEntry("the teacher", changed, {"market": 0.6666, "loo": 0.1}, 99, "b" * 64, NEEDS, False)
    }
    text = render_card(shown, {"Is there an int8 file?": "No."})
    height, width = SIZE
    for expected in (
        "| file | content | mAP, `market` | mAP, `loo` | params | MACs | bytes |\n|---|---|---|---|---|---|---|\n",
        f"| `model.onnx` | the student | 0.6250 | 0.5000 | 1,234 | 56,789 | {shown['model.onnx'].bytes:,} |",
        "| `teacher.onnx` | the teacher | 0.6666 | 0.1000 | 9,876,543 | 56,789 | 99 |",
        f"float32, (batch, 3, {height}, {width})",
        f"resize(({width}, {height})",
        "uint8 images, (batch, height, width, 3) RGB of any size",
        "Licence: as you like",
        f"Git commit `{'c' * 12}`",
        "## Is there an int8 file?\n\nNo.",
        f"{'b' * 64}  teacher.onnx",
        "operator set 18 and IR version 8",
        "ONNX Runtime 1.15 and later",
        "| TensorRT 10 | `model.onnx`, `teacher.onnx` | not tried",
        "For a runtime that needs a fixed number of images in a call, set `export.batch` and export again.",
    ):
        assert expected in text
    assert render_card(shown, {"Is there an int8 file?": "No."}) == text
    changed_first = {name: replace(entry, metadata=changed) for name, entry in shown.items()}
    assert f"Git commit `{'c' * 12}` with uncommitted changes" in render_card(changed_first, {})


@pytest.mark.parametrize("batch", [None], indirect=True)
def test_a_teacher_from_elsewhere_is_named_and_claims_no_other_runtime(entries, metadata):
    teacher = CardEntry(
        "the teacher",
        metadata,
        {"market": 0.7, "loo": 0.1},
        99,
        "b" * 64,
        replace(NEEDS, opset=13),
        False,
        untried=True,
    )
    note = teacher_note(
        "net.onnx",
        {"the teacher": {"parameters": 0.5, "MACs": None}, "its own network": {"parameters": 0.25, "MACs": -0.125}},
    )
    assert "decide about the use of `teacher.onnx` and of all other files" in teacher_note("a.pth", {}, inherited=True)
    text = render_card(entries | {"teacher.onnx": teacher}, {"Which network was the teacher?": note})
    for expected in (
        "## Which network was the teacher?\n\n`net.onnx`, which was trained elsewhere.",
        "compared with the teacher, it has 50.0 % fewer parameters and an unknown share of the MACs; ",
        "compared with its own network, it has 25.0 % fewer parameters and 12.5 % more MACs.",
        "All files but `teacher.onnx` have ONNX operator set 18",
        "| TensorRT 10 | `model.onnx` | not tried",
        "Of `teacher.onnx`, with layers of other toolkits, no other runtime was tried.",
        "Its authors decide about the use of `teacher.onnx`.",
    ):
        assert expected in text


@pytest.mark.parametrize("batch", [3], indirect=True)
def test_a_fixed_batch_is_on_the_card(entries):
    text = render_card(entries, {})
    for expected in (
        "uint8 images, (3, height, width, 3) RGB of any size",
        "float32, (3, 16), L2-normalised",
        "Each call takes exactly 3 images: fill the last batch up",
        "The number of images in a call is 3 (`export.batch`).",
    ):
        assert expected in text


def test_the_card_says_whether_the_student_can_search_a_gallery_of_the_teacher():
    assert gallery_note(0.9, 0.9).startswith("Yes. ")
    assert gallery_note(0.9, 0.8999).startswith("No: embed the gallery again")
    assert "different lengths" in gallery_note(0.9, None)
