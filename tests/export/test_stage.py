"""The stage: all files or none."""

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.manifest import Item, Manifest
from pipeline.export.parity import ParityError
from pipeline.files import Files, write_atomically
from pipeline.models import cost
from pipeline.ops.execution import current
from pipeline.ops.params import load
from pipeline.ops.stage import Run
from stages import export as stage
from tests.export.tiny_network import SIZE, Pictures, tiny_net

ROOT = Path(__file__).parents[2]
SPLITS = ["train"] * 2 + ["query"] * 2 + ["gallery"] * 8
PICTURES = [
    Item(f"{row}.jpg", f"{row % 2}" if row > 1 else f"t{row}", f"c{row % 3}", s) for row, s in enumerate(SPLITS)
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Params of the smoke preset, a dozen pictures, one network as teacher and as student."""
    smoke = load(ROOT / "presets" / "smoke.yaml").model_dump()
    smoke["data"]["image_size"] = list(SIZE)
    files = Files(tmp_path, tmp_path)
    Manifest(PICTURES, files.vehicles).write(files.manifest)
    write_atomically(files.image_cache, lambda path: np.lib.format.open_memmap(path, "w+", np.uint8, (12, *SIZE, 3)))
    np.load(files.image_cache, mmap_mode="r+")[:] = Pictures.pixels
    for name in ("teacher", "surgery"):
        checkpoint.save(files.artifacts(name), tiny_net(0))
    return Run("export", Params.model_validate(smoke), files, current(), files.artifacts("export"))


def written(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.out.iterdir()}


def test_it_writes_files_that_say_what_the_record_says(run, translated, net, monkeypatch):
    monkeypatch.setattr(stage, "to_onnx", lambda *_: onnx.load_from_string(translated))
    record = stage.export(run)
    files = written(run)
    assert set(files) == {"model.onnx", "teacher.onnx", "card.md", "SHA256SUMS"}
    assert (record.bytes, record.params, record.macs) == (
        len(files["model.onnx"]),
        cost.params(net.spec),
        cost.macs(net.spec, SIZE),
    )
    assert (record.map_teacher, record.params_reduction, record.int8_published) == (record.map, 0.0, 0)
    held = {entry.key: entry.value for entry in onnx.load_from_string(files["model.onnx"]).metadata_props}
    assert float(held["map"]) == record.map
    assert f"| {record.map:.4f} |" in files["card.md"].decode()
    for line in files["SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(files[name]).hexdigest() == digest

    torch.manual_seed(99)
    assert (stage.export(run), written(run)) == (record, files)


def test_it_writes_nothing_if_a_gate_does_not_hold_for_the_second_file(run, translated, monkeypatch):
    checkpoint.save(run.files.artifacts("teacher"), tiny_net(1))
    monkeypatch.setattr(stage, "to_onnx", lambda *_: onnx.load_from_string(translated))
    with pytest.raises(ParityError, match=r"teacher\.onnx: cosine") as caught:
        stage.export(run)
    assert caught.value.exit_code == 4
    assert written(run) == {}
