"""What the page asks for."""

import asyncio
import html
import io
import json
import re
import subprocess
import sys
import urllib.request

import httpx
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
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "<title>" in answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_the_page_names_every_index_and_escapes_what_it_shows(release, tmp_path, client):
    said = re.search(r'<p id="said" role="status">(.*?)</p>', client.get("/").text, flags=re.DOTALL)[1]
    assert re.fullmatch(r"teacher\.onnx: 40 images of \S+ · model\.onnx: 40 images of \S+", said)
    gallery = tmp_path / "<img src=x onerror=alert(1)>'&\"{{ 1 }}"
    gallery.mkdir()
    picture(1).save(gallery / "one.png")
    application = page.application([build(release / "model.onnx", gallery)], ["localhost"])
    text = TestClient(application, base_url="http://localhost").get("/").text
    assert "<img src=x" not in text
    assert f"1 images of {gallery.name}" in html.unescape(text)
    (told,) = json.loads(re.search(r"const indexes = (.*);\n", text)[1])
    assert told["gallery"] == gallery.name


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
    read = []

    def parts(number):
        for part in range(number):
            read.append(part)
            yield b"1234567"

    assert client.post("/search", content=content(1)).status_code == 413
    assert client.post("/search", content=parts(9)).status_code == 413  # its length is not told
    assert client.post("/search", content=b"1234567").status_code == 422


def test_images_are_shown_small_and_only_those_of_the_index(client, indexes):
    answer = client.get("/image/1/3")
    with Image.open(io.BytesIO(answer.content)) as image:
        assert max(image.size) <= page.LARGEST
    for address in ("/image/2/0", "/image/0/40", "/image/0/-1", "/image/-1/0"):
        assert client.get(address).json()["detail"] == "there is no such image"
    assert client.get("/image/0/..%2Fnotes.txt").status_code == 404


def test_an_image_that_is_gone_is_said(release, tmp_path):
    picture(1).save(tmp_path / "one.png")
    application = page.application([build(release / "model.onnx", tmp_path)], ["localhost"])
    client = TestClient(application, base_url="http://localhost")
    (tmp_path / "one.png").unlink()
    assert client.get("/image/0/0").status_code == 404


async def searches(application, number):
    """Answers to as many searches at once, and then to one more."""
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        many = await asyncio.gather(*(client.post("/search", content=content(n)) for n in range(number)))
        return [*many, await client.post("/search", content=content(0))]


def test_searches_take_turns_and_too_many_at_once_are_asked_to_come_again(indexes, monkeypatch):
    monkeypatch.setattr(page, "WAITING", 3)
    busy, most, search = 0, 0, page._search

    def watched(*arguments):
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        try:
            return search(*arguments)
        finally:
            busy -= 1

    monkeypatch.setattr(page, "_search", watched)
    answers = asyncio.run(searches(page.application(indexes, ["localhost"]), 12))
    codes = [answer.status_code for answer in answers]
    assert (sorted(set(codes)), codes.count(200), codes[-1], most) == ([200, 503], 5, 200, 1)
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 503} == {"5"}


@pytest.mark.parametrize(
    ("origin", "code"), [("http://evil.example", 403), ("null", 403), ("http://localhost", 200), (None, 200)]
)
def test_a_foreign_page_cannot_search_here(client, origin, code):
    headers = {} if origin is None else {"Origin": origin}
    assert client.post("/search", content=content(1), headers=headers).status_code == code


def test_names_that_the_page_may_be_called_by():
    assert page.allowed_hosts("127.0.0.1", []) == ["localhost", "127.0.0.1"]
    assert page.allowed_hosts("10.0.0.7", []) == ["localhost", "127.0.0.1", "10.0.0.7"]
    assert page.allowed_hosts("0.0.0.0", ["box.lan"]) == ["localhost", "127.0.0.1", "box.lan"]
    for host in ("0.0.0.0", "::", "", "fe80::1"):
        with pytest.raises(page.AddressError, match="is called by a name; give it by `--name`"):
            page.allowed_hosts(host, [])
    for name in ("*", "*.lan", "http://box", "box:8000", ""):
        with pytest.raises(page.AddressError, match="is no host name"):
            page.allowed_hosts("0.0.0.0", [name])


def test_a_name_of_somebody_elses_is_refused(client):
    assert client.get("/indexes", headers={"Host": "evil.example"}).status_code == 400


@pytest.fixture
def index(release, gallery, tmp_path):
    build(release / "model.onnx", gallery).save(tmp_path / "index", release / "model.onnx")
    return tmp_path / "index"


def serve(index, *words):
    command = [sys.executable, "-m", "pipeline", "serve", "--index", index, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_address_that_serve_prints_is_the_one_it_listens_at(index):
    with serve(index, "--port", "0") as server:
        try:
            (address,) = [line.strip() for line in (server.stdout.readline() for _ in range(2)) if "http" in line]
            assert not address.endswith(":0/")
            with urllib.request.urlopen(f"{address}indexes", timeout=60) as answer:
                assert [column["images"] for column in json.load(answer)] == [40]
            port = re.search(r":(\d+)/", address)[1]
            with serve(index, "--port", port) as second:
                errors = second.communicate(timeout=60)[1]
            assert second.returncode == 2
            assert f"127.0.0.1:{port} cannot be listened at (Address already in use" in errors
        finally:
            server.terminate()
