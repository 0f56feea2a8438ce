"""What the page asks for."""

import io

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipeline.search import page
from pipeline.search.index import build
from tests.search.conftest import picture


@pytest.fixture(scope="module")
def indexes(release, gallery):
    return [build(release / name, gallery) for name in ("teacher.onnx", "model.onnx")]


@pytest.fixture(scope="module")
def client(indexes):
    return TestClient(page.application(indexes, ["localhost"]), base_url="http://localhost")


def content(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(number).save(file, kind)
    return file.getvalue()


def test_it_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_columns_are_told(client):
    found = client.get("/indexes").json()
    assert [(column["name"], column["images"]) for column in found] == [("teacher.onnx", 40), ("model.onnx", 40)]
    assert {"map", "protocol", "params", "macs"} <= set(found[0])


def test_a_picture_finds_itself_in_every_column_in_order(client):
    found = client.post("/search", content=content(7)).json()["columns"]
    assert len(found) == 2
    for column in found:
        assert column["hits"][0]["path"].endswith("auto 07 \N{LATIN SMALL LETTER E WITH ACUTE}.png")
        similarities = [hit["similarity"] for hit in column["hits"]]
        assert similarities == sorted(similarities, reverse=True)
        assert len(similarities) == page.TOP
        assert column["milliseconds"] > 0


def test_what_is_no_picture_is_said_and_too_much_is_not_read(client, monkeypatch):
    answer = client.post("/search", content=b"no picture")
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("This is no picture that can be read")
    assert "/tmp" not in answer.json()["detail"]
    monkeypatch.setattr(page, "UPLOAD", 10)
    assert client.post("/search", content=content(1)).status_code == 413


def test_images_are_shown_small_and_only_those_of_the_index(client, indexes):
    answer = client.get("/image/1/3")
    with Image.open(io.BytesIO(answer.content)) as image:
        assert max(image.size) <= page.LARGEST
    for address in ("/image/2/0", "/image/0/40", "/image/0/-1", "/image/0/..%2Fnotes.txt", "/image/-1/0"):
        assert client.get(address).status_code in (404, 422)


def test_an_image_that_is_gone_is_said(release, tmp_path):
    picture(1).save(tmp_path / "one.png")
    application = page.application([build(release / "model.onnx", tmp_path)], ["localhost"])
    client = TestClient(application, base_url="http://localhost")
    (tmp_path / "one.png").unlink()
    assert client.get("/image/0/0").status_code == 404


def test_a_name_of_somebody_elses_is_refused(client):
    assert client.get("/indexes", headers={"Host": "evil.example"}).status_code == 400
