"""Files are hashed before they are parsed, and looked through before they are loaded."""

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


def test_a_file_of_a_release_can_be_run_and_says_what_it_is(release, content, metadata, reference):
    found = open_model(release / "model.onnx")
    assert (found.metadata, found.name, found.resizes) == (metadata, "model.onnx", False)
    np.testing.assert_allclose(found.embed(Pictures.pixels), reference, atol=1e-5)


def test_a_whole_release_checks(release):
    assert sample.check_release(release)["model.onnx"] == pytest.approx(1, abs=1e-6)


def test_a_flipped_byte_anywhere_is_refused_before_anything_is_parsed(release, tmp_path, monkeypatch):
    def parsed(*_):
        raise AssertionError("it was parsed")

    for name in ("check_graph", "open_session"):
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


def changed(release, folder, name, content):
    """The release with another file in it, and hashes that fit."""
    write_release(folder, read_release(release) | {name: content})
    return folder


def test_a_model_that_nothing_was_written_of_is_refused(release, content, tmp_path):
    whole = read_release(release)
    with pytest.raises(ReleaseError, match=r"tells of model\.onnx, the release has extra\.ONNX, model\.onnx"):
        sample.check_release(changed(release, tmp_path / "more", "extra.ONNX", content))
    with pytest.raises(ReleaseError, match=r"tells of no model, the release has model\.onnx"):
        sample.check_release(changed(release, tmp_path / "none", sample.EXPECTED, b"{}"))
    (tmp_path / "more" / "stranger.onnx").write_bytes(content)
    write_release(tmp_path / "more", whole)
    with pytest.raises(ReleaseError, match=r"holds stranger\.onnx, which is not part of the release"):
        sample.check_release(tmp_path / "more")


def test_a_download_does_not_say_itself_how_near_is_near_enough(release, tmp_path):
    expected = json.loads(read_release(release)[sample.EXPECTED])
    expected["model.onnx"]["embedding"].reverse()
    expected["model.onnx"]["min_cosine"] = -1
    with pytest.raises(ReleaseError, match=r"works otherwise here: .* 0\.99999 is asked for"):
        sample.check_release(changed(release, tmp_path, sample.EXPECTED, json.dumps(expected).encode()))


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"model.onnx": 1}', b'{"model.onnx": {}}', b"\xff"])
def test_what_is_not_expected_is_said(release, tmp_path, text):
    with pytest.raises(ReleaseError, match=r"sample\.json (is not what this package writes|tells of no model)"):
        sample.check_release(changed(release, tmp_path, sample.EXPECTED, text))


@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (sample.as_png(np.zeros((48, 37, 3), np.uint8)), r"\(37, 48\) pixels in RGB"),
        (sample.as_png(np.zeros((48, 36), np.uint8)), "in L"),
        (b"GIF89a", "cannot be decoded"),
        (sample.as_png(sample.picture(SIZE))[:-30], "cannot be decoded"),
    ],
    ids=["larger", "grey", "GIF", "cut"],
)
def test_another_picture_is_refused(release, tmp_path, picture, why):
    with pytest.raises(ReleaseError, match=rf"sample\.png .*{why}"):
        sample.check_release(changed(release, tmp_path, sample.PICTURE, picture))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_plain_file_is_not_read(release, tmp_path, kind):
    folder = tmp_path / "changed"
    shutil.copytree(release, folder)
    path = folder / "model.onnx"
    path.rename(folder / "kept")
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    with pytest.raises(ReleaseError, match="is no plain file"):
        sample.check_release(folder)
    if kind != "folder":
        path.unlink()
        path.symlink_to("kept")  # as DVC links to its cache
        assert set(sample.check_release(folder)) == {"model.onnx"}


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
        (b"\x22\x02\x08\x01ORTM", "in ONNX Runtime's own format"),
        (of([helper.make_node("Identity", ["image"], ["embedding"])]), "does not say what it is"),
    ],
    ids=["external", "hidden external", "domain", "pickle", "two formats", "foreign"],
)
def test_what_this_package_does_not_write_is_refused(content, why):
    with pytest.raises(ReleaseError, match=why):
        load_model("model.onnx", content)


def test_what_protobuf_cannot_hold_is_refused_unparsed(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 10)
    with pytest.raises(ReleaseError, match="11 bytes"):
        check_graph("model.onnx", b"x" * 11)


def test_files_of_all_operators_that_are_written_pass(content):
    check_graph("model.onnx", content)
    assert {node.domain for node in onnx.load_from_string(content).graph.node} <= {"", "ai.onnx"}
