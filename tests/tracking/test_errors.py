import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.files import Files
from pipeline.tracking.errors import TrackingError, shown
from pipeline.tracking.store import connect


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Files(tmp_path / "temporary", tmp_path / "repository")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://user:pass@host:5000/path", "http://user:***@host:5000/path"),
        ("postgresql+psycopg://user:p@ss@host/db", "postgresql+psycopg://user:***@host/db"),
        ("http://user@host", "http://user@host"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////a:b@c/mlflow.db", "sqlite:////a:b@c/mlflow.db"),
        ("postgresql://user:se/cr:et@host/db", "postgresql://user:***@host/db"),
        ("http://ann@example.org:secret@host", "http://ann@example.org:***@host"),
        ("user:secret@host", "user:***@host"),
        ("http//user:secret@host", "http//user:***@host"),
        ("http:/user:secret@host", "http:***@host"),
        ("http:///user:secret@host", "http:///user:***@host"),
        ("postgresql://host/db?user=u&password=sec&x=1", "postgresql://host/db?user=u&password=***&x=1"),
        (
            "mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dse%20c%3Bx",
            "mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3D***%3Bx",
        ),
    ],
)
def test_messages_show_no_password(uri: str, expected: str) -> None:
    assert shown(uri) == expected


LOGIN_PAGE = "<!doctype html><title>Sign in</title>"


class Answer(http.server.BaseHTTPRequestHandler):
    """Gives the answer of the server to every request."""

    def do_GET(self) -> None:
        status, body = self.server.answer  # type: ignore[attr-defined]
        if not status:
            time.sleep(5)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[http.server.ThreadingHTTPServer]:
    """A server that is not MLflow, or stands in front of it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


NAMES = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


@pytest.mark.parametrize(
    ("status", "body", "login", "reason"),
    [
        (200, LOGIN_PAGE, {}, "responds like a web page (a login page, or a path prefix is missing); correct MLFLOW"),
        (404, LOGIN_PAGE, {}, "responds like a web page (a login page, or a path prefix is missing); correct MLFLOW"),
        (404, '{"detail":"Not Found"}', {}, "responds like a web page (a login page, or a path prefix is missing)"),
        (502, LOGIN_PAGE, {}, "cannot be used now (HTTP status 502); see the log of the server or its proxy"),
        (0, "", {}, "cannot be reached (no response in 1 s; MLFLOW_HTTP_REQUEST_TIMEOUT sets this limit)"),
        (401, "no", {}, f"needs a login (401); set {NAMES}, or MLFLOW_TRACKING_TOKEN"),
        (401, "no", {"USERNAME": "ann"}, "needs a login (401) and MLFLOW_TRACKING_PASSWORD is not set; set it, or"),
        (401, "no", {"PASSWORD": "secret"}, "needs a login (401) and MLFLOW_TRACKING_USERNAME is not set; set it, or"),
        (401, "no", {"USERNAME": "ann", "PASSWORD": "secret"}, "rejects the password of user ann (401); corr"),
        (401, "no", {"TOKEN": "secret"}, f"rejects the token (401); correct MLFLOW_TRACKING_TOKEN, or set {NAMES}"),
        (403, "no", {"USERNAME": "ann", "PASSWORD": "secret"}, "denies the request to user ann (403); ask its admin"),
        (403, "Invalid Host header - possible DNS rebinding", {}, "rejects this name of its host; add it and the"),
    ],
)
def test_a_failed_request_is_one_sentence_with_the_remedy(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    other_server: http.server.ThreadingHTTPServer,
    status: int,
    body: str,
    login: dict[str, str],
    reason: str,
) -> None:
    other_server.answer = (status, body)  # type: ignore[attr-defined]
    address = f"http://127.0.0.1:{other_server.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("HOME", str(files.root))  # MLflow reads credentials from there, too
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    for name, value in login.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    with pytest.raises(TrackingError) as caught, connect(files) as client:
        client.search_experiments()
    assert str(caught.value).startswith(f"MLflow at {address} {reason}")
    assert os.linesep not in str(caught.value) and "secret" not in str(caught.value)


def test_a_password_in_the_address_is_corrected_there(
    files: Files, monkeypatch: pytest.MonkeyPatch, other_server: http.server.ThreadingHTTPServer
) -> None:
    other_server.answer = (401, "no")  # type: ignore[attr-defined]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{other_server.server_port}")
    with (
        pytest.raises(
            TrackingError, match=r"//ann:\*\*\*@.* user ann in the address \(401\); correct MLFLOW_TRACKING_URI"
        ),
        connect(files) as client,
    ):
        client.search_experiments()
