"""The index of a gallery: it is searched by the model that embedded it, and by no other."""

import io
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipeline.cli import main
from pipeline.export.release import ReleaseError, read_release, write_release
from pipeline.search.index import GalleryError, build, open_index
from pipeline.search.page import application
from tests.search.conftest import picture


@pytest.fixture(scope="module")
def folder(release, gallery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    build(release / "model.onnx", gallery).save(folder, release / "model.onnx")
    return folder


def test_an_index_has_every_image_and_skips_unreadable_files_with_a_warning(release, gallery, caplog):
    with caplog.at_level(logging.WARNING):
        index = build(release / "model.onnx", gallery)
    assert len(index) == 40
    assert index.paths == sorted(index.paths)
    assert "cut.jpg is skipped" in caplog.text
    assert not [path for path in index.paths if "hidden" in path or path.endswith("txt")]
    assert "1 files of the gallery, such as .hidden.png, are skipped: " in caplog.text
    assert "1 files of the gallery, such as notes.txt, are skipped: the suffix is not one of an image" in caplog.text


def test_what_systems_leave_behind_is_not_in_an_index(release, tmp_path):
    left = ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/a.png", "sub/._b.png")
    for name in ("a.png", "sub/b.png", *left):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(1).save(tmp_path / name, format="PNG")
    assert build(release / "model.onnx", tmp_path).paths == ["a.png", "sub/b.png"]


def test_results_are_those_of_an_exhaustive_search(folder, gallery):
    index = open_index(folder)
    embeddings = np.concatenate([index.model.embed(index.query(gallery / path)) for path in index.paths])
    for place in (0, 17, 39):
        expected = np.argsort(-(embeddings @ embeddings[place]), kind="stable")[:7]
        hits = index.search(embeddings[place : place + 1], 7)
        assert hits[0].place == place
        assert hits[0].similarity == pytest.approx(1, abs=1e-5)
        assert [hit.path for hit in hits] == [index.paths[row] for row in expected]
        np.testing.assert_allclose(
            [hit.similarity for hit in hits], (embeddings @ embeddings[place])[expected], atol=1e-5
        )
    assert len(index.search(embeddings[:1], 1000)) == 40


def test_equal_images_are_sorted_by_their_names(release, tmp_path):
    for name in ("b", "a", "c"):
        picture(1).save(tmp_path / f"{name}.png")
    picture(2).save(tmp_path / "0.png")
    index = build(release / "model.onnx", tmp_path)
    hits = index.search(index.model.embed(index.query(tmp_path / "a.png")), 4)
    assert [hit.path for hit in hits] == ["a.png", "b.png", "c.png", "0.png"]


def test_queries_of_another_model_are_refused(folder, release, tmp_path):
    with pytest.raises(GalleryError, match=r"embedded by a model with SHA-256 .* index the gallery again") as caught:
        open_index(folder, release / "teacher.onnx")
    assert caught.value.exit_code == 3
    moved = tmp_path / "moved"
    shutil.copytree(release, moved)
    assert len(open_index(folder, moved / "model.onnx")) == 40


def test_a_model_that_was_exported_again_is_another_model(gallery, release, tmp_path):
    mine, index = tmp_path / "mine", tmp_path / "index"
    shutil.copytree(release, mine)
    build(mine / "model.onnx", gallery).save(index, mine / "model.onnx")
    files = read_release(mine)
    write_release(mine, {"model.onnx": files["teacher.onnx"]})
    with pytest.raises(GalleryError, match="so its queries do not fit"):
        open_index(index)


@pytest.mark.parametrize("name", ["index.json", "vectors.npy", "SHA256SUMS"])
def test_a_damaged_index_is_refused(folder, tmp_path, name):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(ReleaseError):
        open_index(damaged)


def test_an_index_may_overwrite_an_index_and_no_other_release(folder, release, gallery, tmp_path, monkeypatch, capsys):
    index, mine = tmp_path / "index", tmp_path / "mine"
    shutil.copytree(release, mine)
    words = ("index", "--gallery", gallery, "--out")
    assert smaller_student(monkeypatch, *words, mine, "--model", mine / "model.onnx") == 3
    assert "is a release with model.onnx, teacher.onnx; choose another folder with `--out`" in capsys.readouterr().err
    assert read_release(mine) == read_release(release)
    shutil.copytree(folder, index)
    assert smaller_student(monkeypatch, *words, index, "--model", mine / "teacher.onnx") == 0
    assert open_index(index).model.name == "teacher.onnx"


def as_npy(array):
    content = io.BytesIO()
    np.save(content, array, allow_pickle=array.dtype == object)
    return content.getvalue()


def wrong_vectors():
    good = np.zeros((40, 16), np.float32)
    archive = io.BytesIO()
    np.savez(archive, good)
    yield "pickled", as_npy(np.array([[{}] * 16] * 40, object)), "not a NumPy array"
    yield "fewer", as_npy(good[:39]), r"float32 \(39, 16\), not float32 \(40, 16\)"
    yield "doubles", as_npy(good.astype(np.float64)), "holds float64"
    yield "archive", archive.getvalue(), "holds an archive"
    yield "infinite", as_npy(np.full_like(good, np.inf)), "not finite"
    yield "nothing", b"", "not a NumPy array"


@pytest.mark.parametrize(
    ("content", "message"), [case[1:] for case in wrong_vectors()], ids=[c[0] for c in wrong_vectors()]
)
def test_vectors_that_do_not_fit_the_images_are_refused(folder, tmp_path, content, message):
    write_release(tmp_path, read_release(folder) | {"vectors.npy": content})
    with pytest.raises(GalleryError, match=message):
        open_index(tmp_path)


def test_a_folder_that_is_not_an_index_is_refused(folder, release, tmp_path):
    with pytest.raises(GalleryError, match=r"is not an index: SHA256SUMS names model\.onnx, teacher\.onnx"):
        open_index(release)
    files = read_release(folder)
    for change, key in (({"paths": []}, "paths"), ({"paths": "all"}, "paths"), ({"more": 1}, "more")):
        info = json.loads(files["index.json"]) | change
        write_release(tmp_path, files | {"index.json": json.dumps(info).encode()})
        with pytest.raises(GalleryError, match=rf"index\.json is invalid: {key}"):
            open_index(tmp_path)


@pytest.mark.parametrize("way", ["up", "absolute", "link"])
def test_an_index_cannot_reach_files_outside_its_gallery(folder, tmp_path, way):
    secret, inside, files = tmp_path / "secret.png", tmp_path / "gallery", read_release(folder)
    picture(3).save(secret)
    inside.mkdir()
    (inside / "link.png").symlink_to(secret)
    info = json.loads(files["index.json"])
    info |= {"gallery": str(inside), "gallery_from_here": "../gallery"}
    info["paths"][0] = {"up": "../secret.png", "absolute": str(secret), "link": "link.png"}[way]
    write_release(tmp_path / "index", files | {"index.json": json.dumps(info).encode()})
    index = open_index(tmp_path / "index")
    with pytest.raises(GalleryError, match="not the file that was indexed" if way == "link" else "outside the gallery"):
        index.path(0)
    client = TestClient(application([index], ["localhost"]), base_url="http://localhost")
    assert client.get("/image/0/0").status_code == 404


def test_a_gallery_without_images_is_refused(release, tmp_path):
    with pytest.raises(GalleryError, match="is not a folder"):
        build(release / "model.onnx", tmp_path / "none")
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(GalleryError, match=r"has no readable image \(1 files"):
        build(release / "model.onnx", tmp_path)


def smaller_student(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["smaller-student", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_commands_index_and_search_a_gallery(release, gallery, tmp_path, monkeypatch, capsys):
    index, panel = tmp_path / "index", tmp_path / "results.png"
    query = gallery / "1" / "auto 04 \N{LATIN SMALL LETTER E WITH ACUTE}.png"
    model = release / "model.onnx"
    assert smaller_student(monkeypatch, "index", "--gallery", gallery, "--out", index, "--model", model) == 0
    assert "40 images in" in capsys.readouterr().out
    words = ("search", "--index", index, "--query", query, "--top", "3")
    assert smaller_student(monkeypatch, *words, "--out", panel, "--json") == 0
    hits = json.loads(capsys.readouterr().out)
    assert [set(hit) for hit in hits] == [{"place", "path", "similarity"}] * 3
    assert gallery / hits[0]["path"] == query
    with Image.open(panel) as image:
        assert image.width > 800
    assert smaller_student(monkeypatch, *words) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"1.0000  {hits[0]['path']}"
    assert smaller_student(monkeypatch, *words, "--model", release / "teacher.onnx") == 3
    assert "index the gallery again" in capsys.readouterr().err


def test_a_query_that_is_not_an_image_is_refused(folder, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    assert smaller_student(monkeypatch, "search", "--index", folder, "--query", broken) != 0
    assert "broken.jpg" in capsys.readouterr().err
    assert smaller_student(monkeypatch, "search", "--index", folder, "--query", Path("none.jpg")) == 3
