"""Loading a release: hashes are checked before parsing, and graphs before ONNX Runtime opens them."""

import json
import os
import random
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.export import model as module
from pipeline.export import sample
from pipeline.export.model import check_graph, load_model, open_model
from pipeline.export.release import ReleaseError, read_release, write_release
from tests.export.tiny_network import SIZE, Pictures


@pytest.fixture(scope="module")
def release(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    files = {"model.onnx": content}
    extra = {
        "card.md": b"# A card\n",
        sample.PICTURE: sample.as_png(sample.picture(SIZE)),
        sample.EXPECTED: sample.expected(files, SIZE),
    }
    write_release(folder, files | extra)
    return folder


def test_a_file_of_a_release_loads_with_its_metadata(release, content, metadata, reference):
    model = open_model(release / "model.onnx")
    assert (model.metadata, model.name, model.resizes) == (metadata, "model.onnx", False)
    np.testing.assert_allclose(model.embed(Pictures.pixels), reference, atol=1e-5)


def test_an_intact_release_passes(release):
    assert sample.check_release(release)["model.onnx"] == pytest.approx(1, abs=1e-6)


def test_a_flipped_bit_anywhere_is_rejected_before_anything_is_parsed(release, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("parsed before the hash was checked")

    for name in ("check_graph", "open_session"):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(sample.Image, "open", fail)
    monkeypatch.setattr(sample.json, "loads", fail)
    rng = random.Random(0)
    for path in sorted(release.iterdir()):
        content = path.read_bytes()
        offsets = {
            0,
            len(content) - 1,
            *(rng.randrange(len(content)) for _ in range(6 if len(content) > 2000 else len(content))),
        }
        for offset in offsets:
            folder = tmp_path / "changed"
            shutil.copytree(release, folder)
            damaged = bytearray(content)
            damaged[offset] ^= 1 << rng.randrange(8)
            (folder / path.name).write_bytes(damaged)
            with pytest.raises(ReleaseError):
                sample.check_release(folder)
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["model.onnx", "card.md", "SHA256SUMS", "sample.json"])
def test_the_error_names_a_missing_file(release, tmp_path, name):
    folder = tmp_path / "changed"
    shutil.copytree(release, folder)
    (folder / name).unlink()
    with pytest.raises(ReleaseError, match=name.replace(".", r"\.")) as caught:
        sample.check_release(folder)
    assert caught.value.exit_code == 4


def test_checksums_of_files_outside_the_folder_are_rejected(tmp_path):
    for name in ("../model.onnx", "/etc/passwd", "a/b", "..", "a\\b", ""):
        (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(ReleaseError, match="damaged"):
            read_release(tmp_path)


def test_the_error_names_a_model_whose_embedding_differs(release, content, tmp_path):
    files = read_release(release)
    expected = json.loads(files[sample.EXPECTED])
    expected["model.onnx"]["embedding"] = list(np.roll(expected["model.onnx"]["embedding"], 1))
    write_release(tmp_path, files | {sample.EXPECTED: json.dumps(expected).encode()})
    with pytest.raises(
        ReleaseError, match=r"model\.onnx gives another embedding .*: cosine -?0\.\d+, at least 0\.99999 is"
    ):
        sample.check_release(tmp_path)


def replaced(release, folder, name, content):
    """Copy the release with one file replaced and matching checksums."""
    write_release(folder, read_release(release) | {name: content})
    return folder


def test_models_and_expected_embeddings_must_match(release, content, tmp_path):
    files = read_release(release)
    with pytest.raises(
        ReleaseError, match=r"has embeddings of model\.onnx, but the release has extra\.ONNX, model\.onnx"
    ):
        sample.check_release(replaced(release, tmp_path / "more", "extra.ONNX", content))
    with pytest.raises(ReleaseError, match=r"has embeddings of no model, but the release has model\.onnx"):
        sample.check_release(replaced(release, tmp_path / "none", sample.EXPECTED, b"{}"))
    (tmp_path / "more" / "stranger.onnx").write_bytes(content)
    write_release(tmp_path / "more", files)
    with pytest.raises(ReleaseError, match=r"stranger\.onnx in .* is not part of the release"):
        sample.check_release(tmp_path / "more")


def test_the_limit_in_a_downloaded_sample_json_is_ignored(release, tmp_path):
    expected = json.loads(read_release(release)[sample.EXPECTED])
    expected["model.onnx"]["embedding"].reverse()
    expected["model.onnx"]["min_cosine"] = -1
    with pytest.raises(ReleaseError, match=r"gives another embedding .* at least 0\.99999 is required"):
        sample.check_release(replaced(release, tmp_path, sample.EXPECTED, json.dumps(expected).encode()))


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"model.onnx": 1}', b'{"model.onnx": {}}', b"\xff"])
def test_a_malformed_sample_json_is_rejected(release, tmp_path, text):
    with pytest.raises(
        ReleaseError, match=r"sample\.json (is not in the format of this package|has embeddings of no model)"
    ):
        sample.check_release(replaced(release, tmp_path, sample.EXPECTED, text))


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (sample.as_png(np.zeros((48, 37, 3), np.uint8)), r"size \(37, 48\) and mode RGB"),
        (sample.as_png(np.zeros((48, 36), np.uint8)), "mode L"),
        (b"GIF89a", "cannot be decoded"),
        (sample.as_png(sample.picture(SIZE))[:-30], "cannot be decoded"),
    ],
    ids=["larger", "grey", "GIF", "truncated"],
)
def test_another_sample_image_is_rejected(release, tmp_path, picture, reason):
    with pytest.raises(ReleaseError, match=rf"sample\.png .*{reason}"):
        sample.check_release(replaced(release, tmp_path, sample.PICTURE, picture))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(release, tmp_path, kind):
    folder = tmp_path / "changed"
    shutil.copytree(release, folder)
    path = folder / "model.onnx"
    path.rename(folder / "kept")
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    with pytest.raises(ReleaseError, match="is not a regular file"):
        sample.check_release(folder)
    if kind != "folder":
        path.unlink()
        path.symlink_to("kept")  # DVC links files to its cache
        assert set(sample.check_release(folder)) == {"model.onnx"}


def model_of(nodes, initialisers=(), domains=("",)):
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)],
        list(initialisers),
    )  # fmt: skip
    imports = [helper.make_opsetid(domain, 18 if domain == "" else 1) for domain in domains]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def external_tensor():
    tensor = TensorProto(name="weights", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    return tensor


def nested(tensor):
    """Put the tensor into a branch of an If node, as the attribute of a constant."""
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=tensor)], "branch", [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [3])],
    )  # fmt: skip
    return helper.make_node("If", ["image"], ["embedding"], then_branch=branch, else_branch=branch)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            model_of([helper.make_node("Add", ["image", "weights"], ["embedding"])], [external_tensor()]),
            "stores `weights` in another",
        ),
        (model_of([nested(external_tensor())]), "stores `weights` in"),
        (
            model_of([helper.make_node("Run", ["image"], ["embedding"], domain="evil")], domains=("", "evil")),
            "evil::Run",
        ),
        (b"\x80\x04\x95no onnx", "not an ONNX file"),
        (b"\x22\x02\x08\x01ORTM", "in ONNX Runtime's own format"),
        (model_of([helper.make_node("Identity", ["image"], ["embedding"])]), "lacks the metadata"),
    ],
    ids=["external", "nested external", "domain", "pickle", "two formats", "foreign"],
)
def test_unsafe_or_foreign_models_are_rejected(content, reason):
    with pytest.raises(ReleaseError, match=reason):
        load_model("model.onnx", content)


def test_content_above_the_protobuf_limit_is_rejected_unparsed(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(ReleaseError, match="11 bytes"):
        check_graph("model.onnx", b"x" * 11)


def test_an_exported_model_uses_standard_operators_only(content):
    check_graph("model.onnx", content)
    assert {node.domain for node in onnx.load_from_string(content).graph.node} <= {"", "ai.onnx"}
