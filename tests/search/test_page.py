"""The search page and its endpoints."""

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


def test_the_page_loads_nothing_from_other_hosts(client):
    response = client.get("/")
    assert (response.status_code, response.headers["x-content-type-options"]) == (200, "nosniff")
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert "<title>" in response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "http://" not in response.text
    assert "https://" not in response.text


def test_the_page_names_every_index_and_escapes_what_it_shows(release, tmp_path, client):
    status = re.search(r'<p id="status" role="status">(.*?)</p>', client.get("/").text, flags=re.DOTALL)[1]
    assert re.fullmatch(r"teacher\.onnx: 40 images of \S+ · model\.onnx: 40 images of \S+", status)
    gallery = tmp_path / "<img src=x onerror=alert(1)>'&\"{{ 1 }}"
    gallery.mkdir()
    picture(1).save(gallery / "one.png")
    application = page.application([build(release / "model.onnx", gallery)], ["localhost"])
    text = TestClient(application, base_url="http://localhost").get("/").text
    assert "<img src=x" not in text
    assert f"1 images of {gallery.name}" in html.unescape(text)
    (description,) = json.loads(re.search(r"const indexes = (.*);\n", text)[1])
    assert description["gallery"] == gallery.name


def test_the_indexes_are_described(client):
    described = client.get("/indexes").json()
    assert [(column["name"], column["images"]) for column in described] == [("teacher.onnx", 40), ("model.onnx", 40)]
    assert {"map", "protocol", "params", "macs"} <= set(described[0])


def test_a_query_from_the_gallery_is_the_first_result_in_every_column(client):
    columns = client.post("/search", content=content(7)).json()["columns"]
    assert len(columns) == 2
    for column in columns:
        assert column["hits"][0]["path"].endswith("auto 07 \N{LATIN SMALL LETTER E WITH ACUTE}.png")
        similarities = [hit["similarity"] for hit in column["hits"]]
        assert similarities == sorted(similarities, reverse=True)
        assert len(similarities) == page.TOP
        assert column["milliseconds"] > 0


def test_files_that_are_not_images_or_too_large_are_refused(client, monkeypatch):
    response = client.post("/search", content=b"no picture")
    assert response.status_code == 422
    assert response.json()["detail"].startswith("This file cannot be read as a picture")
    assert "/tmp" not in response.json()["detail"]
    monkeypatch.setattr(page, "MAX_UPLOAD", 10)
    read = []

    def parts(number):
        for part in range(number):
            read.append(part)
            yield b"1234567"

    assert client.post("/search", content=content(1)).status_code == 413
    assert client.post("/search", content=parts(9)).status_code == 413  # a body of unknown length
    assert client.post("/search", content=b"1234567").status_code == 422


def test_thumbnails_are_small_and_only_of_images_in_the_index(client, indexes):
    response = client.get("/image/1/3")
    with Image.open(io.BytesIO(response.content)) as image:
        assert max(image.size) <= page.THUMBNAIL
    for address in ("/image/2/0", "/image/0/40", "/image/0/-1", "/image/-1/0"):
        assert client.get(address).json()["detail"] == "there is no such image"
    assert client.get("/image/0/..%2Fnotes.txt").status_code == 404


def test_an_image_that_was_deleted_is_status_404(release, tmp_path):
    picture(1).save(tmp_path / "one.png")
    application = page.application([build(release / "model.onnx", tmp_path)], ["localhost"])
    client = TestClient(application, base_url="http://localhost")
    (tmp_path / "one.png").unlink()
    assert client.get("/image/0/0").status_code == 404


async def searches(application, number):
    """Return the responses to `number` simultaneous searches, and to one more afterwards."""
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        many = await asyncio.gather(*(client.post("/search", content=content(n)) for n in range(number)))
        return [*many, await client.post("/search", content=content(0))]


def test_searches_run_one_at_a_time_and_too_many_are_refused(indexes, monkeypatch):
    monkeypatch.setattr(page, "MAX_WAITING", 3)
    running, peak, search = 0, 0, page._search

    def counted(*arguments):
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        try:
            return search(*arguments)
        finally:
            running -= 1

    monkeypatch.setattr(page, "_search", counted)
    responses = asyncio.run(searches(page.application(indexes, ["localhost"]), 12))
    codes = [response.status_code for response in responses]
    assert (sorted(set(codes)), codes.count(200), codes[-1], peak) == ([200, 503], 5, 200, 1)
    assert {response.headers["retry-after"] for response in responses if response.status_code == 503} == {"5"}


@pytest.mark.parametrize(
    ("origin", "code"), [("http://evil.example", 403), ("null", 403), ("http://localhost", 200), (None, 200)]
)
def test_a_foreign_page_cannot_search_here(client, origin, code):
    headers = {} if origin is None else {"Origin": origin}
    assert client.post("/search", content=content(1), headers=headers).status_code == code


def test_allowed_hosts_are_local_names_the_address_and_given_names():
    assert page.allowed_hosts("127.0.0.1", []) == ["localhost", "127.0.0.1"]
    assert page.allowed_hosts("10.0.0.7", []) == ["localhost", "127.0.0.1", "10.0.0.7"]
    assert page.allowed_hosts("0.0.0.0", ["box.lan"]) == ["localhost", "127.0.0.1", "box.lan"]
    for host in ("0.0.0.0", "::", "", "fe80::1"):
        with pytest.raises(page.AddressError, match="needs a host name; give it with `--name`"):
            page.allowed_hosts(host, [])
    for name in ("*", "*.lan", "http://box", "box:8000", ""):
        with pytest.raises(page.AddressError, match="is not a host name"):
            page.allowed_hosts("0.0.0.0", [name])


def test_a_foreign_host_name_is_refused(client):
    assert client.get("/indexes", headers={"Host": "evil.example"}).status_code == 400


@pytest.fixture
def index(release, gallery, tmp_path):
    build(release / "model.onnx", gallery).save(tmp_path / "index", release / "model.onnx")
    return tmp_path / "index"


def serve(index, *words):
    command = [sys.executable, "-m", "pipeline", "serve", "--index", index, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_serve_prints_the_address_that_it_listens_on(index):
    with serve(index, "--port", "0") as server:
        try:
            (address,) = [line.strip() for line in (server.stdout.readline() for _ in range(2)) if "http" in line]
            assert not address.endswith(":0/")
            with urllib.request.urlopen(f"{address}indexes", timeout=60) as response:
                assert [column["images"] for column in json.load(response)] == [40]
            port = re.search(r":(\d+)/", address)[1]
            with serve(index, "--port", port) as second:
                errors = second.communicate(timeout=60)[1]
            assert second.returncode == 2
            assert f"cannot listen on 127.0.0.1:{port} (Address already in use" in errors
        finally:
            server.terminate()
