"""The search page in a real browser, served by the real command."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from pipeline.search.index import build
from tests.search.conftest import gallery, picture, release

__all__ = ["gallery", "release"]

pytestmark = pytest.mark.stack


@contextmanager
def served(*indexes: Path) -> Iterator[str]:
    """Serve indexes with the real command; yield the address."""
    words = [word for index in indexes for word in ("--index", str(index))]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "pipeline", "serve", *words, "--port", str(port)])
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/indexes", timeout=2):
            break
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(10)


@pytest.fixture
def address(release: Path, gallery: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a page with two indexes."""
    for name in ("teacher", "model"):
        build(release / f"{name}.onnx", gallery).save(tmp_path / name, release / f"{name}.onnx")
    with served(tmp_path / "teacher", tmp_path / "model") as address:
        yield address


def test_a_dropped_image_is_found_in_both_columns(page: Page, address: str, tmp_path: Path) -> None:
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("teacher.onnx: 40 images")
    picture(11).save(tmp_path / "query.png")
    page.set_input_files("#file", tmp_path / "query.png")
    expect(page.locator("section")).to_have_count(2)
    for column in range(2):
        first = page.locator("section").nth(column).locator("li").first
        expect(first).to_contain_text("auto 11")
        expect(first).to_contain_text("1. 1.000")
        expect(first).to_have_class("both")
    assert page.locator("h2").all_text_contents()[1].startswith("model.onnx")
    expect(page.locator("h2").nth(1)).to_contain_text("times as fast as teacher.onnx")
    page.wait_for_function("[...document.querySelectorAll('li img')].slice(0, 3).every(i => i.naturalWidth > 0)")

    other = page.locator("section").nth(1).locator("li").nth(2)  # a hit can be the next query
    name = other.locator(".name").text_content() or ""
    other.locator("button").click()
    expect(page.locator("section").nth(1).locator("li").first.locator(".name")).to_have_text(name)
    assert messages == []

    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "broken.jpg")
    expect(page.locator("#status")).to_contain_text("This file cannot be read as a picture")
    expect(page.locator("section")).to_have_count(0)


def test_a_hit_that_was_deleted_or_replaced_is_marked_and_cannot_be_searched_for(
    page: Page, release: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "gallery"
    pictures.mkdir()
    for number in range(3):
        picture(number).save(pictures / f"{number}.png")
    build(release / "model.onnx", pictures).save(tmp_path / "index", release / "model.onnx")
    picture(0).save(tmp_path / "query.png")
    (pictures / "0.png").unlink()
    picture(9).save(pictures / "1.png")
    with served(tmp_path / "index") as address:
        page.goto(address)
        page.set_input_files("#file", tmp_path / "query.png")
        for name, gone in (("0.png", True), ("1.png", True), ("2.png", False)):
            button = page.locator("li button", has_text=name)
            if gone:
                expect(button).to_contain_text(f"{name} (no longer there)")
                expect(button).to_be_disabled()
            else:
                expect(button.locator(".name")).to_have_text(name)
                expect(button).to_be_enabled()
