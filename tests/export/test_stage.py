"""Stage `export`: it writes all files or none."""

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
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec, Input
from pipeline.retrieval.evaluate import evaluate_embedder
from pipeline.stage.presets import load_preset
from pipeline.stage.run import Run
from stages import export as stage
from tests.export.tiny_network import SIZE, Pictures, tiny_net

ROOT = Path(__file__).parents[2]
SPLITS = ["train"] * 2 + ["query"] * 2 + ["gallery"] * 8
ITEMS = [Item(f"{row}.jpg", f"{row % 2}" if row > 1 else f"t{row}", f"c{row % 3}", s) for row, s in enumerate(SPLITS)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Prepare the smoke preset with twelve images and one network as both teacher and student."""
    smoke = load_preset(ROOT, "smoke").model_dump()
    smoke["data"]["image_size"] = list(SIZE)
    for network in ("teacher", "student"):
        smoke[network]["batch"]["identities"] = 2  # as many as there are to train on
    paths = Files(tmp_path, tmp_path)
    Manifest(ITEMS, paths.vehicles).write(paths.manifest)
    paths.vehicles.mkdir(parents=True)
    write_atomically(paths.image_cache, lambda path: np.lib.format.open_memmap(path, "w+", np.uint8, (12, *SIZE, 3)))
    np.load(paths.image_cache, mmap_mode="r+")[:] = Pictures.pixels
    for row, item in enumerate(ITEMS):
        Image.fromarray(Pictures.pixels[row]).save(paths.vehicles / item.path, format="PNG")
    for name in ("teacher", "surgery"):
        checkpoint.save(paths.artifacts(name), tiny_net(0))
    checkpoint.save_spec(paths.artifacts("student") / checkpoint.FULL, tiny_net(0).spec)
    return Run("export", Params.model_validate(smoke), paths, paths.artifacts("export"))


def written(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.out.iterdir()}


@pytest.mark.parametrize("gain", [None, 2.0, 0.9], ids=["not requested", "faster", "slower"])
def test_files_metadata_and_card_agree_with_the_record(run, translated, net, monkeypatch, gain):
    monkeypatch.setattr(files, "to_onnx", lambda *_: onnx.load_from_string(translated))
    if gain is not None:  # a real timing would make the result random
        run.params.export.precisions.append("int8")
        monkeypatch.setattr(files, "gains", lambda candidates, *_: dict.fromkeys(candidates, Gain(gain, gain, gain, 8)))
    record = stage.export(run)
    content = written(run)
    published = gain == 2.0
    onnx_files = {"model.onnx", "model.allinone.onnx", "teacher.onnx"} | ({"model.int8.onnx"} if published else set())
    assert set(content) == {*onnx_files, "card.md", "sample.png", "sample.json", "SHA256SUMS"}
    assert record.params == cost.params(net.spec)
    assert record.macs == cost.macs(net.spec, SIZE)
    assert (record.bytes, record.bytes_allinone, record.bytes_teacher) == tuple(
        len(content[name]) for name in ("model.onnx", "model.allinone.onnx", "teacher.onnx")
    )
    assert (record.map_allinone, record.map_teacher, record.params_reduction) == (record.map, record.map, 0.0)
    assert (record.int8_published, record.map_int8 is None) == (int(published), not published)
    assert record.map_student_on_teacher == record.map  # teacher and student are the same network
    text = content["card.md"].decode()
    for name in onnx_files:
        properties = {entry.key: entry.value for entry in onnx.load_from_string(content[name]).metadata_props}
        expected_map = record.map_int8 if name == "model.int8.onnx" else record.map
        assert (float(properties["map"]), properties["git_commit"]) == (expected_map, "unknown")
        assert re.search(rf"\| `{name}` \| [^|]+ \| {expected_map:.4f} \|", text)
    assert ("## Is there an int8 file?" in text) is (gain is not None)
    for line in content["SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(content[name]).hexdigest() == digest
    assert set(check_release(run.out)) == onnx_files

    torch.manual_seed(99)
    assert (stage.export(run), written(run)) == (record, content)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_all_files_take_the_fixed_batch_of_the_params(run, batch, monkeypatch):
    settings = run.params.export.model_copy(update={"batch": batch, "precisions": ["fp32", "int8"]})
    settings = settings.model_copy(update={"limits": settings.limits.model_copy(update={"int8_map_loss": 1.0})})
    run = Run("export", run.params.model_copy(update={"export": settings}), run.files, run.out)
    timed = []

    def gains(candidates, _reference, _size, count):
        timed.append(count)
        return dict.fromkeys(candidates, Gain(2.0, 2.0, 2.0, 8))

    monkeypatch.setattr(files, "gains", gains)
    record = stage.export(run)
    content = written(run)
    assert (record.int8_published, timed) == (1, [batch])
    for name in ("model.onnx", "model.allinone.onnx", "model.int8.onnx", "teacher.onnx"):
        model = onnx.load_from_string(content[name])
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
        assert model.ir_version == 8
    assert record.map_allinone == record.map == record.map_teacher
    assert min(check_release(run.out).values()) > 0.9999
    assert f"The number of images in a call is {batch} " in content["card.md"].decode()


def test_each_set_of_embeddings_is_evaluated_once_per_protocol(run, translated, monkeypatch):
    monkeypatch.setattr(files, "to_onnx", lambda *_: onnx.load_from_string(translated))
    scored = []

    def counted(embedder, *arguments):
        scored.append((embedder(None), arguments[-1]))
        return evaluate_embedder(embedder, *arguments)

    monkeypatch.setattr(stage, "evaluate_embedder", counted)
    stage.export(run)
    networks, onnx_files, batches, other_protocols = 2, 3, 3, 1  # each file runs at batch size 32, and at 1, 3 and 8
    assert len(scored) == networks + onnx_files * (1 + batches + other_protocols)
    assert len({(id(embeddings), protocol) for embeddings, protocol in scored}) == len(scored)


def test_an_int8_file_that_depends_on_the_batch_is_not_published_and_the_card_gives_the_reason(
    run, translated, monkeypatch
):
    monkeypatch.setattr(files, "to_onnx", lambda *_: onnx.load_from_string(translated))
    monkeypatch.setattr(files, "gains", lambda candidates, *_: dict.fromkeys(candidates, Gain(2.0, 2.0, 2.0, 8)))
    monkeypatch.setattr(files, "MIN_COSINE_INT8", 1.1)
    run.params.export.precisions.append("int8")
    record = stage.export(run)
    assert (record.int8_published, record.map_int8, record.bytes_int8) == (0, None, None)
    assert "model.int8.onnx" not in written(run)
    text = written(run)["card.md"].decode()
    assert re.search(r"There is no int8 file\. .* but at batch 1 an embedding has cosine (1\.0|0\.99)", text)


def test_nothing_is_written_if_the_last_file_fails_its_check(run, translated, monkeypatch):
    checkpoint.save(run.files.artifacts("teacher"), tiny_net(1))
    monkeypatch.setattr(files, "to_onnx", lambda *_: onnx.load_from_string(translated))
    with pytest.raises(ParityError, match=r"teacher\.onnx: cosine") as caught:
        stage.export(run)
    assert caught.value.exit_code == 4
    assert written(run) == {}


def test_only_plain_networks_count_as_tried_in_other_runtimes() -> None:
    plain = ArchSpec.full(14, 8, 24)
    assert stage.is_plain(RetrievalNet(plain))
    for change in (
        {"max_pool": "unpadded"},
        {"pool": "gem"},
        {"instance_norms": {"layer1.0.conv1": 4}},
        {"input": Input(scale=(1, 1, 1), shift=(0, 0, 0), bgr=True)},
    ):
        assert not stage.is_plain(RetrievalNet(plain.model_copy(update=change)))
