"""The Prefect server is checked before it is used, and each fault is one sentence with a remedy."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefect import __version__
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipeline.files import Files
from pipeline.flow import deploy, doctor, server
from pipeline.flow.server import ServerError, check_server, compare_versions
from tests.fake_stages import Start

Respond = Callable[[int, str], str]
"""Starts a server that sends one status and text, and returns its address."""


@pytest.fixture
def respond() -> Iterator[Respond]:
    servers: list[ThreadingHTTPServer] = []

    def begin(status: int, text: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not status:
                    time.sleep(3)
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/api"

    yield begin
    for one in servers:
        one.shutdown()
        one.server_close()


def message(url: str) -> str:
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ServerError) as caught:
        check_server()
    return str(caught.value)


def test_without_a_server_there_is_nothing_to_check() -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert check_server() is None


def test_a_server_that_is_not_older_is_accepted(respond: Respond) -> None:
    for version in (__version__, f"{__version__}+1.gabc", __version__.rpartition(".")[0] + ".99", "3.999.0"):
        url = respond(200, f'"{version}"')
        with temporary_settings({PREFECT_API_URL: url}):
            assert check_server() == url


@pytest.mark.parametrize("version", ["3.4.25", "3.8.0", "3.7.9.dev1", "2.20.25"])
def test_an_older_server_is_refused_with_both_versions(version: str) -> None:
    with pytest.raises(ServerError) as caught:
        compare_versions("the Prefect server URL", version)
    assert str(caught.value) == (
        f"the Prefect server URL has version {version}, which is older than Prefect {__version__} here; upgrade the "
        f"server to {__version__} or newer"
    )


def test_a_server_of_the_next_major_version_is_refused() -> None:
    with pytest.raises(ServerError, match=r"has version 4\.0\.1, and Prefect .* here is too old for it; use a server"):
        compare_versions("the Prefect server URL", "4.0.1")


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (401, "{}", "rejects requests with status 401; set PREFECT_API_AUTH_STRING to USER:PASSWORD"),
        (404, "{}", "rejects requests with status 404; set PREFECT_API_URL to http://HOST:PORT/api"),
        (503, "", "rejects requests with status 503; look into its log"),
        (200, "<html>", "does not respond as Prefect does; set PREFECT_API_URL to http://HOST:PORT/api"),
        (200, "{}", "does not respond as Prefect does; set PREFECT_API_URL to http://HOST:PORT/api"),
        (0, "", "cannot be reached (timed out); start it, correct PREFECT_API_URL, or unset it"),
    ],
    ids=["401", "404", "503", "HTML", "other JSON", "silent"],
)
def test_a_server_that_cannot_be_used_is_one_sentence_at_once(
    respond: Respond, monkeypatch: pytest.MonkeyPatch, status: int, text: str, expected: str
) -> None:
    monkeypatch.setattr(server, "TIMEOUT", 1.0)
    url, began = respond(status, text), time.monotonic()
    assert message(url).startswith(f"the Prefect server {url} {expected}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("url", "reason"),
    [("http://127.0.0.1:1/api", "Connection refused"), ("127.0.0.1:4200/api", "missing an 'http://'")],
)
def test_an_address_without_a_server_is_one_sentence(url: str, reason: str) -> None:
    text = message(url)
    assert text.startswith(f"the Prefect server {url} cannot be reached (") and reason in text
    assert "\n" not in text


def test_deploy_and_doctor_check_the_server_first(
    respond: Respond, pipeline: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipeline.root)
    with temporary_settings({PREFECT_API_URL: respond(200, '"3.4.25"')}):
        with pytest.raises(ServerError, match=r"version 3\.4\.25, which is older"):
            deploy.deploy()
        (found,) = doctor.prefect(pipeline)
    assert found.ok is False and "has version 3.4.25" in found.message
    assert found.remedy == f"upgrade the server to {__version__} or newer"


def test_retrain_checks_the_server_before_anything_runs(respond: Respond, pipeline: Files, start: Start) -> None:
    url = respond(200, '"3.4.25"')
    process = start(pipeline, "-m", "pipeline", "retrain", PREFECT_API_URL=url, PREFECT_HOME=str(pipeline.root / "p"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == (
        f"smaller-student: the Prefect server {url} has version 3.4.25, which is older than Prefect {__version__} "
        f"here; upgrade the server to {__version__} or newer\n"
    )
    assert not pipeline.metrics("prepare").exists()
