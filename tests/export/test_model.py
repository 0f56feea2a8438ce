"""Files are hashed before they are parsed, and looked through before they are loaded."""

import json
import random
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.export import model as module
from pipeline.export import sample
from pipeline.export.model import load_model, open_model, vet
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


def test_a_file_of_a_release_can_be_run_and_says_what_it_is(release, content, metadata, reference):
    found = open_model(release / "model.onnx")
    assert (found.metadata, found.name, found.resizes) == (metadata, "model.onnx", False)
    np.testing.assert_allclose(found.embed(Pictures.pixels), reference, atol=1e-5)


def test_a_whole_release_checks(release):
    assert sample.check_release(release)["model.onnx"] == pytest.approx(1, abs=1e-6)


def test_a_flipped_byte_anywhere_is_refused_before_anything_is_parsed(release, tmp_path, monkeypatch):
    def parsed(*_):
        raise AssertionError("it was parsed")

    for name in ("vet", "open_session"):
        monkeypatch.setattr(module, name, parsed)
    monkeypatch.setattr(sample.Image, "open", parsed)
    monkeypatch.setattr(sample.json, "loads", parsed)
    rng = random.Random(0)
    for path in sorted(release.iterdir()):
        good = path.read_bytes()
        places = {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(6 if len(good) > 2000 else len(good)))}
        for place in places:
            folder = tmp_path / "changed"
            shutil.copytree(release, folder)
            bad = bytearray(good)
            bad[place] ^= 1 << rng.randrange(8)
            (folder / path.name).write_bytes(bad)
            with pytest.raises(ReleaseError):
                sample.check_release(folder)
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["model.onnx", "card.md", "SHA256SUMS", "sample.json"])
def test_a_missing_file_is_named(release, tmp_path, name):
    folder = tmp_path / "changed"
    shutil.copytree(release, folder)
    (folder / name).unlink()
    with pytest.raises(ReleaseError, match=name.replace(".", r"\.")) as caught:
        sample.check_release(folder)
    assert caught.value.exit_code == 4


def test_sums_that_point_elsewhere_are_damaged(tmp_path):
    for name in ("../model.onnx", "/etc/passwd", "a/b", "..", "a\\b", ""):
        (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(ReleaseError, match="damaged"):
            read_release(tmp_path)


def test_a_model_that_works_otherwise_is_named(release, content, tmp_path):
    files = read_release(release)
    expected = json.loads(files[sample.EXPECTED])
    expected["model.onnx"]["embedding"] = list(np.roll(expected["model.onnx"]["embedding"], 1))
    write_release(tmp_path, files | {sample.EXPECTED: json.dumps(expected).encode()})
    with pytest.raises(ReleaseError, match=r"model\.onnx works otherwise here: .* has cosine -?0\.\d+ .* 0\.99999 is"):
        sample.check_release(tmp_path)


def of(nodes, initialisers=(), domains=("",)):
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)],
        list(initialisers),
    )  # fmt: skip
    imports = [helper.make_opsetid(domain, 18 if domain == "" else 1) for domain in domains]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def elsewhere():
    tensor = TensorProto(name="weights", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    return tensor


def hidden(tensor):
    """The tensor in the branch of an If, as a constant's attribute."""
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=tensor)], "branch", [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [3])],
    )  # fmt: skip
    return helper.make_node("If", ["image"], ["embedding"], then_branch=branch, else_branch=branch)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            of([helper.make_node("Add", ["image", "weights"], ["embedding"])], [elsewhere()]),
            "keeps `weights` in another",
        ),
        (of([hidden(elsewhere())]), "keeps `weights` in"),
        (of([helper.make_node("Run", ["image"], ["embedding"], domain="evil")], domains=("", "evil")), "evil::Run"),
        (b"\x80\x04\x95no onnx", "no ONNX file"),
        (of([helper.make_node("Identity", ["image"], ["embedding"])]), "does not say what it is"),
    ],
    ids=["external", "hidden external", "domain", "pickle", "foreign"],
)
def test_what_this_package_does_not_write_is_refused(content, why):
    with pytest.raises(ReleaseError, match=why):
        load_model("model.onnx", content)


def test_what_protobuf_cannot_hold_is_refused_unparsed(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 10)
    with pytest.raises(ReleaseError, match="11 bytes"):
        vet("model.onnx", b"x" * 11)


def test_files_of_all_operators_that_are_written_pass(content):
    vet("model.onnx", content)
    assert {node.domain for node in onnx.load_from_string(content).graph.node} <= {"", "ai.onnx"}
