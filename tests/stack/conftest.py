"""Fixtures: MLflow servers on this machine, and a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, sync_playwright

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of the installed Chromium; Playwright would download its own."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"none of {', '.join(BROWSERS)} is installed; the package is called chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser.new_page(viewport={"width": 2300, "height": 700})
        browser.close()


Serve = Callable[..., str]
"""Starts an MLflow server, `serve(store, *options, **environment)`, waits for it, and returns its address."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A server for one test."""
    yield from _servers(tmp_path)


@pytest.fixture(scope="module")
def serve_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A server for all tests of a file."""
    yield from _servers(tmp_path_factory.mktemp("server"))


def _servers(folder: Path) -> Iterator[Serve]:
    servers = []

    def begin(store: str, *options: str, **extra: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        log = (folder / "server.log").open("w")
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **extra}  # jobs start slowly
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *options],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        servers.append(server)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while server.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                return address
            time.sleep(0.2)
        raise AssertionError((folder / "server.log").read_text())

    yield begin
    for server in servers:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait()
