"""What an index answers after its gallery, its model, itself or the whole checkout was moved or changed."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipeline.export.metadata import finish
from pipeline.export.release import read_release, write_release
from pipeline.export.to_onnx import to_onnx
from pipeline.search.index import GalleryError, build, open_index
from pipeline.search.page import application
from tests.export.tiny_network import METADATA, SIZE, tiny_net
from tests.search.conftest import picture
from tests.search.test_index import smaller_student


@pytest.fixture
def root(release: Path, tmp_path: Path) -> Path:
    """A folder with a model, a gallery of six pictures, its index, and a query."""
    root = tmp_path / "old checkout"
    shutil.copytree(release, root / "model")
    (root / "photos" / "sub").mkdir(parents=True)
    for number in range(6):
        picture(number).save(root / "photos" / "sub" / f"{number}.png")
    picture(2).save(root / "query.png")
    build(root / "model" / "model.onnx", root / "photos").save(root / "indexes" / "mine", root / "model" / "model.onnx")
    return root


def first(root: Path, **moved: Path) -> Path:
    """Search for the query; return the path of the best hit, which must exist."""
    index = open_index(root / "indexes" / "mine", **moved)
    index.check_gallery()
    hit = index.search(index.model.embed(index.query(root / "query.png")), 1)[0]
    assert hit.path == "sub/2.png"
    return index.path(hit.place)


def test_a_gallery_that_moved_is_named_by_an_option(root, monkeypatch, capsys, tmp_path):
    (root / "photos").rename(root / "pictures")
    words = ("search", "--index", root / "indexes" / "mine", "--query", root / "query.png", "--top", "2")
    assert smaller_student(monkeypatch, *words) == 0  # names can be found without the pictures
    out, err = capsys.readouterr()
    assert out.startswith("1.0000  sub/2.png\n")
    assert err == (
        f"2 of 2 hits can no longer be shown: sub/2.png is not in {root / 'photos'} (No such file or directory); index "
        "the gallery again, or name its new folder with `--gallery`\n"
    )
    assert smaller_student(monkeypatch, *words, "--out", tmp_path / "hits.png") == 3
    assert capsys.readouterr().err == (
        f"smaller-student: the gallery {root / 'photos'} is gone; name its new folder with `--gallery`\n"
    )
    moved = ("--gallery", root / "pictures")
    assert smaller_student(monkeypatch, *words, *moved, "--out", tmp_path / "hits.png") == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "hits.png").is_file()
    assert first(root, gallery=root / "pictures") == root / "pictures" / "sub" / "2.png"
    assert smaller_student(monkeypatch, *words, "--gallery", root / "pictures" / "sub") == 3
    assert "has none of the images of the index, such as sub/0.png; name their folder" in capsys.readouterr().err


def test_a_relative_gallery_is_found_from_any_folder(root, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(root)
    shutil.rmtree(root / "indexes")
    words = ("index", "--gallery", "photos", "--out", "indexes/mine", "--model", "model/model.onnx")
    assert smaller_student(monkeypatch, *words) == 0
    monkeypatch.chdir(tmp_path)
    assert first(root) == root / "photos" / "sub" / "2.png"
    (root / "photos").rename(root / "pictures")
    monkeypatch.chdir(root)
    words = ("search", "--index", "indexes/mine", "--query", "query.png", "--top", "1", "--gallery", "pictures")
    assert smaller_student(monkeypatch, *words, "--json") == 0
    assert [hit["path"] for hit in json.loads(capsys.readouterr().out.splitlines()[-1])] == ["sub/2.png"]


def test_a_moved_checkout_keeps_its_indexes(root):
    moved = root.rename(root.parent / "new checkout")
    assert first(moved) == moved / "photos" / "sub" / "2.png"


def test_a_copied_checkout_uses_its_own_model_and_gallery(root):
    copied = root.parent / "copy"
    shutil.copytree(root, copied)
    assert first(copied) == copied / "photos" / "sub" / "2.png"
    shutil.rmtree(root)
    assert first(copied) == copied / "photos" / "sub" / "2.png"


def test_an_index_that_was_moved_alone_finds_model_and_gallery_where_they_were(root):
    (root.parent / "elsewhere" / "deep" / "indexes").mkdir(parents=True)
    index = (root / "indexes" / "mine").rename(root.parent / "elsewhere" / "deep" / "indexes" / "mine")
    assert open_index(index).path(2) == root / "photos" / "sub" / "2.png"


def test_a_model_that_moved_is_named_by_an_option(root, monkeypatch, capsys):
    (root / "model").rename(root / "release")
    words = ("search", "--index", root / "indexes" / "mine", "--query", root / "query.png")
    assert smaller_student(monkeypatch, *words) == 3
    assert capsys.readouterr().err == (
        f"smaller-student: the model {root / 'model' / 'model.onnx'} of {root / 'indexes' / 'mine'} is gone: name its "
        "path with `--model`\n"
    )
    assert first(root, model=root / "release" / "model.onnx").is_file()


def test_a_model_that_dvc_links_to_its_cache_is_still_found(root):
    cache = root / "cache"
    cache.mkdir()
    (root / "model" / "model.onnx").rename(cache / "ab12")
    (root / "model" / "model.onnx").symlink_to(cache / "ab12")
    build(root / "model" / "model.onnx", root / "photos").save(root / "indexes" / "mine", root / "model" / "model.onnx")
    assert first(root).is_file()
    cache.rename(root / "moved")
    with pytest.raises(GalleryError, match=r"model\.onnx of .* is a link to nothing: run `dvc checkout`"):
        first(root)


def test_a_gallery_behind_a_link_is_named_by_the_link(root):
    (root / "current").symlink_to(root / "photos")
    build(root / "model" / "model.onnx", root / "current").save(
        root / "indexes" / "mine", root / "model" / "model.onnx"
    )
    assert first(root) == root / "current" / "sub" / "2.png"


@pytest.mark.parametrize("change", ["deleted", "replaced", "folder", "pipe", "dangling link"])
def test_a_hit_that_is_no_longer_what_was_indexed_is_named_and_not_shown(root, change, monkeypatch, capsys, tmp_path):
    changed = root / "photos" / "sub" / "2.png"
    changed.unlink()
    {
        "deleted": lambda: None,
        "replaced": lambda: picture(99).save(changed),
        "folder": changed.mkdir,
        "pipe": lambda: os.mkfifo(changed),
        "dangling link": lambda: changed.symlink_to("nowhere"),
    }[change]()
    reason = "is not the file that was indexed" if change == "replaced" else f"sub/2.png is not in {root / 'photos'} ("
    words = ("search", "--index", root / "indexes" / "mine", "--query", root / "query.png", "--top", "3")
    assert smaller_student(monkeypatch, *words, "--out", tmp_path / "hits.png") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert err.startswith("1 of 3 hits can no longer be shown: sub/2.png ") and reason in err
    assert smaller_student(monkeypatch, *words[:-1], "1", "--out", tmp_path / "none.png") == 2
    assert "no hit can be shown in" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()

    index = open_index(root / "indexes" / "mine")
    index.check_gallery()  # one missing picture does not stop the page
    client = TestClient(application([index], ["localhost"]), base_url="http://localhost")
    response = client.get("/image/0/2")
    assert response.status_code == 404
    assert response.json()["detail"].startswith("sub/2.png ")
    assert str(root) not in response.json()["detail"]
    assert client.get("/image/0/1").status_code == 200


def test_a_link_in_a_gallery_shows_only_what_was_indexed(root):
    """As DVC links images to a cache outside of the checkout."""
    outside = root.parent / "cache" / "cd34"
    outside.parent.mkdir()
    target = root / "photos" / "sub" / "2.png"
    target.rename(outside)
    target.symlink_to(outside)
    assert first(root) == target
    picture(77).save(outside, format="PNG")
    with pytest.raises(GalleryError, match="is not the file that was indexed"):
        first(root)


def serve(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "serve", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_serve_names_the_options_for_what_moved(root):
    index = ("--index", root / "indexes" / "mine")
    (root / "photos").rename(root / "pictures")
    done = serve(*index)
    assert (done.returncode, done.stderr) == (
        3, f"smaller-student: the gallery {root / 'photos'} is gone; name its new folder with `--gallery`\n",
    )  # fmt: skip
    done = serve(*index, *index, *index, "--gallery", root / "pictures", "--gallery", root / "photos")
    assert (done.returncode, done.stderr) == (
        2, "smaller-student: 2 `--gallery` for 3 `--index`: give one, or one for each index in their order\n",
    )  # fmt: skip
    done = serve(*index, *index, "--gallery", root / "pictures", "--gallery", root / "photos")
    assert done.returncode == 3 and f"the gallery {root / 'photos'} is gone" in done.stderr
    # An address that is not of this machine ends the command after the indexes were opened.
    for galleries in (("--gallery", root / "pictures"), ("--gallery", root / "pictures") * 2):
        done = serve(*index, *index, *galleries, "--host", "192.0.2.1")
        assert done.returncode == 2 and "cannot listen on 192.0.2.1" in done.stderr
        assert done.stdout == f"serving the images of {root / 'pictures'}\n"


@pytest.mark.parametrize("batch", [1, 4, 300])
def test_a_model_with_a_fixed_batch_indexes_and_searches(root, batch, monkeypatch, capsys, tmp_path):
    content = finish(to_onnx(tiny_net(0), SIZE, 18, batch), replace(METADATA))
    write_release(root / "fixed", {"model.onnx": content})
    model, index = root / "fixed" / "model.onnx", root / "indexes" / "fixed"
    words = ("index", "--gallery", root / "photos", "--out", index, "--model", model)
    assert smaller_student(monkeypatch, *words) == 0
    capsys.readouterr()
    found = {}
    for folder in (index, root / "indexes" / "mine"):
        words = ("search", "--index", folder, "--query", root / "query.png", "--out", tmp_path / "hits.png")
        assert smaller_student(monkeypatch, *words, "--json") == 0
        found[folder.name] = json.loads(capsys.readouterr().out)
    assert [hit["path"] for hit in found["fixed"]] == [hit["path"] for hit in found["mine"]]
    similarities = [[hit["similarity"] for hit in hits] for hits in found.values()]
    assert similarities[0] == pytest.approx(similarities[1], abs=1e-5)
    with Image.open(tmp_path / "hits.png") as image:
        assert image.width > 100
    client = TestClient(application([open_index(index)], ["localhost"]), base_url="http://localhost")
    columns = client.post("/search", content=(root / "query.png").read_bytes()).json()["columns"]
    assert columns[0]["hits"][0]["path"] == "sub/2.png"


def test_an_index_needs_a_digest_of_each_image(root):
    folder = root / "indexes" / "mine"
    files = read_release(folder)
    info = json.loads(files["index.json"])
    info["digests"].pop()
    write_release(folder, files | {"index.json": json.dumps(info).encode()})
    with pytest.raises(GalleryError, match="5 digests of 6 images; index the gallery again"):
        open_index(folder)
