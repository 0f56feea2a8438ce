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


def test_a_server_of_this_version_or_newer_is_accepted(respond: Respond) -> None:
    for version in (__version__, f"{__version__}+1.gabc", __version__.rpartition(".")[0] + ".99", "3.999.0"):
        url = respond(200, f'"{version}"')
        with temporary_settings({PREFECT_API_URL: url}):
            assert check_server(deploys=True) == check_server() == url


@pytest.mark.parametrize(
    ("client", "version", "least"),  # the server that `make deploy` needs; None: it works with this one
    [
        ("3.8.8", "3.8.7", None),
        ("3.8.8", "3.8.5", None),
        ("3.8.8", "3.8.4", "3.8.5"),
        ("3.8.8", "3.7.9.dev1", "3.8.5"),
        ("3.8.8", "3.4.25", "3.8.5"),
        ("3.8.1", "3.8.1", None),  # the client does not send the field either
        ("3.8.1", "3.8.0", "3.8.1"),
        ("3.9.2", "3.9.0", None),
        ("3.9.2", "3.8.8", "3.9.0"),
        ("3.8.8", "0+unknown", None),
    ],
)
def test_an_older_server_that_was_found_to_fail_is_refused_by_deploy_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, client: str, version: str, least: str | None
) -> None:
    monkeypatch.setattr(server, "__version__", client)
    if least is None:
        compare_versions("the Prefect server URL", version, deploys=True)
    else:
        with pytest.raises(ServerError) as caught:
            compare_versions("the Prefect server URL", version, deploys=True)
        assert str(caught.value) == (
            f"the Prefect server URL has version {version}, which is too old for Prefect {client} here; upgrade the "
            f"server to {least} or newer"
        )
    caplog.clear()
    compare_versions("the Prefect server URL", version, deploys=False)
    noted = version == "0+unknown" or version.split(".")[:2] != client.split(".")[:2]
    assert bool(caplog.text) is noted and (not noted or (version in caplog.text and client in caplog.text))


@pytest.mark.parametrize("deploys", [False, True])
@pytest.mark.parametrize(("version", "why"), [("4.0.1", "here is too old for it"), ("2.20.25", "which is too old for")])
def test_a_server_of_another_major_version_is_refused(version: str, why: str, deploys: bool) -> None:
    with pytest.raises(ServerError, match=rf"has version {version}, .*{why}"):
        compare_versions("the Prefect server URL", version, deploys)


def test_a_server_whose_version_is_unknown_is_accepted_with_a_note(
    respond: Respond, caplog: pytest.LogCaptureFixture
) -> None:
    with temporary_settings({PREFECT_API_URL: respond(200, '"0+unknown"')}):
        assert check_server(deploys=True)
    assert "has version 0+unknown, which cannot be compared to Prefect" in caplog.text


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
        with pytest.raises(ServerError, match=r"version 3\.4\.25, which is too old"):
            deploy.deploy()
        (found,) = doctor.prefect(pipeline)
    assert found.ok is False and "has version 3.4.25" in found.message
    assert found.remedy.startswith("upgrade the server to 3.")


def test_retrain_checks_the_server_before_anything_runs(respond: Respond, pipeline: Files, start: Start) -> None:
    url = respond(200, '"2.20.25"')
    process = start(pipeline, "-m", "pipeline", "retrain", PREFECT_API_URL=url, PREFECT_HOME=str(pipeline.root / "p"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == (
        f"smaller-student: the Prefect server {url} has version 2.20.25, which is too old for Prefect {__version__} "
        "here; upgrade the server to 3.0.0 or newer\n"
    )
    assert not pipeline.metrics("prepare").exists()
