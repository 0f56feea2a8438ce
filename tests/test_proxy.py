"""Loopback is never reached through a proxy, whatever the environment says."""

import asyncio
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import httpx
import pytest
import requests
from websockets.proxy import get_proxy
from websockets.uri import parse_uri

from pipeline import bypass_proxy_for_loopback
from pipeline.files import Files
from tests.fake_stages import OFF, Start

ROOT = Path(__file__).parents[1]
DEAD = "http://127.0.0.1:9"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def address() -> Iterator[str]:
    """A server on this machine that responds with JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NO_PROXY", *PROXIES):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in PROXIES:
        monkeypatch.setenv(name, DEAD)
    return monkeypatch


def test_every_http_client_reaches_this_machine(proxied: pytest.MonkeyPatch, address: str) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)
    with pytest.raises(OSError):
        urllib.request.build_opener().open(address)  # `urlopen` keeps the opener of its first call

    async def by_aiohttp(url: str) -> str:
        async with aiohttp.ClientSession(trust_env=True) as session, session.get(url) as response:
            return await response.text()

    environment = dict.fromkeys(PROXIES, DEAD)
    bypass_proxy_for_loopback(environment)
    for name, value in environment.items():
        proxied.setenv(name, value)
    for url in (address, address.replace("127.0.0.1", "localhost")):
        assert urllib.request.build_opener().open(url, timeout=5).read() == b"{}"
        assert requests.get(url, timeout=5).text == "{}"
        assert httpx.get(url).text == "{}"
        assert asyncio.run(by_aiohttp(url)) == "{}"
        assert get_proxy(parse_uri(url.replace("http", "ws"))) is None  # Prefect's events
    assert get_proxy(parse_uri("ws://example.org/")) == DEAD


def test_the_health_check_of_a_service_uses_no_proxy(proxied: pytest.MonkeyPatch, address: str) -> None:
    subprocess.run([sys.executable, ROOT / "docker" / "health.py", address], check=True, timeout=30)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, None)),  # without a proxy nothing is set
        ({"NO_PROXY": "a"}, ("a", None)),
        ({"http_proxy": "x"}, ("localhost,127.0.0.1,::1",) * 2),
        ({"HTTPS_PROXY": "x", "NO_PROXY": "a, b"}, ("a,b,localhost,127.0.0.1,::1",) * 2),
        ({"all_proxy": "x", "no_proxy": "a"}, ("a,localhost,127.0.0.1,::1",) * 2),
        (
            {"HTTP_PROXY": "x", "NO_PROXY": "a", "no_proxy": "b"},
            ("a,localhost,127.0.0.1,::1", "b,localhost,127.0.0.1,::1"),
        ),
        ({"HTTP_PROXY": "x", "NO_PROXY": "*"}, ("*", None)),
        ({"HTTP_PROXY": "x", "NO_PROXY": "*,a"}, ("*,a,localhost,127.0.0.1,::1",) * 2),
        ({"HTTP_PROXY": "x", "NO_PROXY": "127.0.0.1"}, ("127.0.0.1,localhost,::1",) * 2),
    ],
)
def test_hosts_of_the_user_stay(given: dict[str, str], expected: tuple[str | None, str | None]) -> None:
    environment = dict(given)
    bypass_proxy_for_loopback(environment)
    assert (environment.get("NO_PROXY"), environment.get("no_proxy")) == expected
    again = dict(environment)
    bypass_proxy_for_loopback(again)
    assert again == environment


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"NO_PROXY": "corp.example"}, "corp.example"),
        ({"HTTP_PROXY": DEAD, "NO_PROXY": "*"}, "*"),
        ({"HTTP_PROXY": DEAD, "NO_PROXY": "a"}, "a,localhost,127.0.0.1,::1"),
        ({"HTTP_PROXY": DEAD, "no_proxy": "a"}, "a,localhost,127.0.0.1,::1"),
    ],
)
def test_make_stack_passes_the_list_to_all_processes(
    tmp_path: Path, given: dict[str, str], expected: str | None
) -> None:
    for name in ("Makefile", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "Procfile").write_text("one: env > environment\n")
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    subprocess.run(
        ["make", "-o", "setup", "stack", f"VENV={sys.prefix}"],
        cwd=tmp_path, env={**inherited, "PYTHONPATH": str(ROOT), **given}, check=True, timeout=60,
    )  # fmt: skip
    lines = (tmp_path / "environment").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines if line.lower().startswith("no_proxy="))
    assert found.get("NO_PROXY") == expected
    assert found.get("no_proxy") in (expected, None)


def test_a_retraining_behind_a_dead_proxy_reaches_its_own_server(
    pipeline: Files, start: Start, proxied: pytest.MonkeyPatch
) -> None:
    process = start(pipeline, "-m", "pipeline", "retrain", PREFECT_HOME=str(pipeline.root / "prefect"), **OFF)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("Completed: ran prepare")
