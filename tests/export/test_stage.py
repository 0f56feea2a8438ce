"""The stage: all files or none."""

import hashlib
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.manifest import Item, Manifest
from pipeline.export import files
from pipeline.export.parity import ParityError
from pipeline.export.sample import check_release
from pipeline.files import Files, write_atomically
from pipeline.inference.timing import Gain
from pipeline.models import cost
from pipeline.retrieval.evaluate import evaluate_embedder
from pipeline.stage.presets import load_preset
from pipeline.stage.run import Run
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
    smoke = load_preset(ROOT, "smoke").model_dump()
    smoke["data"]["image_size"] = list(SIZE)
    paths = Files(tmp_path, tmp_path)
    Manifest(PICTURES, paths.vehicles).write(paths.manifest)
    paths.vehicles.mkdir(parents=True)
    write_atomically(paths.image_cache, lambda path: np.lib.format.open_memmap(path, "w+", np.uint8, (12, *SIZE, 3)))
    np.load(paths.image_cache, mmap_mode="r+")[:] = Pictures.pixels
    for row, item in enumerate(PICTURES):
        Image.fromarray(Pictures.pixels[row]).save(paths.vehicles / item.path, format="PNG")
    for name in ("teacher", "surgery"):
        checkpoint.save(paths.artifacts(name), tiny_net(0))
    return Run("export", Params.model_validate(smoke), paths, paths.artifacts("export"))


def written(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.out.iterdir()}


@pytest.mark.parametrize("gain", [None, 2.0, 0.9], ids=["not asked for", "faster", "slower"])
def test_it_writes_files_that_say_what_the_record_says(run, translated, net, monkeypatch, gain):
    monkeypatch.setattr(files, "to_onnx", lambda *_: onnx.load_from_string(translated))
    if gain is not None:  # else timing, which has its own tests, would decide about this one
        run.params.export.precisions.append("int8")
        monkeypatch.setattr(files, "gains", lambda tried, *_: dict.fromkeys(tried, Gain(gain, gain, gain, 8)))
    record = stage.export(run)
    found = written(run)
    published = gain == 2.0
    onnx_files = {"model.onnx", "model.allinone.onnx", "teacher.onnx"} | ({"model.int8.onnx"} if published else set())
    assert set(found) == {*onnx_files, "card.md", "sample.png", "sample.json", "SHA256SUMS"}
    assert record.params == cost.params(net.spec)
    assert record.macs == cost.macs(net.spec, SIZE)
    assert (record.bytes, record.bytes_allinone, record.bytes_teacher) == tuple(
        len(found[name]) for name in ("model.onnx", "model.allinone.onnx", "teacher.onnx")
    )
    assert (record.map_allinone, record.map_teacher, record.params_reduction) == (record.map, record.map, 0.0)
    assert (record.int8_published, record.map_int8 is None) == (int(published), not published)
    assert record.map_student_on_teacher == record.map  # it is the same network
    text = found["card.md"].decode()
    for name in onnx_files:
        held = {entry.key: entry.value for entry in onnx.load_from_string(found[name]).metadata_props}
        quality = record.map_int8 if name == "model.int8.onnx" else record.map
        assert (float(held["map"]), held["git_commit"]) == (quality, "unknown")
        assert re.search(rf"\| `{name}` \| [^|]+ \| {quality:.4f} \|", text)
    assert ("## Eight bits" in text) is (gain is not None)
    for line in found["SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(found[name]).hexdigest() == digest
    assert set(check_release(run.out)) == onnx_files

    torch.manual_seed(99)
    assert (stage.export(run), written(run)) == (record, found)


def test_no_embeddings_are_scored_twice(run, translated, monkeypatch):
    monkeypatch.setattr(files, "to_onnx", lambda *_: onnx.load_from_string(translated))
    scored = []

    def counted(embedder, *arguments):
        scored.append((embedder(None), arguments[-1]))
        return evaluate_embedder(embedder, *arguments)

    monkeypatch.setattr(stage, "evaluate_embedder", counted)
    stage.export(run)
    networks, onnx_files, batches, other_protocols = 2, 3, 3, 1  # each file runs in batches of 32, and of 1, 3 and 8
    assert len(scored) == networks + onnx_files * (1 + batches + other_protocols)
    assert len({(id(found), protocol) for found, protocol in scored}) == len(scored)


def test_eight_bits_that_depend_on_the_batch_are_not_published_and_the_card_says_why(run, translated, monkeypatch):
    monkeypatch.setattr(files, "to_onnx", lambda *_: onnx.load_from_string(translated))
    monkeypatch.setattr(files, "gains", lambda tried, *_: dict.fromkeys(tried, Gain(2.0, 2.0, 2.0, 8)))
    monkeypatch.setattr(files, "BYTES", 1.1)
    run.params.export.precisions.append("int8")
    record = stage.export(run)
    assert (record.int8_published, record.map_int8, record.bytes_int8) == (0, None, None)
    assert "model.int8.onnx" not in written(run)
    text = written(run)["card.md"].decode()
    assert re.search(
        r"There is no int8 file\. .* but in batches of 1 an image's embedding has cosine (1\.0|0\.99)", text
    )


def test_it_writes_nothing_if_a_gate_does_not_hold_for_the_last_file(run, translated, monkeypatch):
    checkpoint.save(run.files.artifacts("teacher"), tiny_net(1))
    monkeypatch.setattr(files, "to_onnx", lambda *_: onnx.load_from_string(translated))
    with pytest.raises(ParityError, match=r"teacher\.onnx: cosine") as caught:
        stage.export(run)
    assert caught.value.exit_code == 4
    assert written(run) == {}
