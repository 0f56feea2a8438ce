import os
from pathlib import Path

import pytest

from pipeline.files import Files
from pipeline.tracking.errors import TrackingError, UriError
from pipeline.tracking.store import check_uri, connect, tracking_uri


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Files(tmp_path / "temporary", tmp_path / "repository")


def test_the_default_store_is_in_the_repository(files: Files) -> None:
    assert tracking_uri(files) == f"sqlite:///{files.state}/mlflow.db"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///runs.db", "sqlite:///{state}/runs.db"),
        ("sqlite:///./a/runs.db", "sqlite:///{state}/a/runs.db"),
        ("sqlite+pysqlite:///runs.db", "sqlite+pysqlite:///{state}/runs.db"),
        ("sqlite:////var/runs.db", "sqlite:////var/runs.db"),
        ("sqlite:///runs.db?timeout=30", "sqlite:///{state}/runs.db?timeout=30"),
        ("SQLITE:///runs.db", "SQLITE:///{state}/runs.db"),
        (" http://host:5000 ", "http://host:5000"),
        ("postgresql://u:p@host/db", "postgresql://u:p@host/db"),
    ],
)
def test_a_relative_database_path_is_relative_to_the_repository(
    files: Files, monkeypatch: pytest.MonkeyPatch, uri: str, expected: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri(files) == expected.format(state=files.state)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://mlflow.example.org/path",
        "sqlite:////tmp/mlflow.db",
        "postgresql+psycopg://u:p@host/db",
        "mysql+pymysql://host/db",
        "mssql+pyodbc://host/db",
        "databricks",
        "databricks://profile",
    ],
)
def test_valid_uris_pass(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABRICKS_HOST", "https://example.org")
    check_uri(uri)


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile"])
def test_databricks_needs_a_login(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UriError, match=f"^MLFLOW_TRACKING_URI {uri} needs a login; set DATABRICKS_HOST"):
        check_uri(uri)
    (tmp_path / ".databrickscfg").write_text("[DEFAULT]\n")
    check_uri(uri)


def test_a_missing_driver_of_a_database_is_named(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+pg8000://user:secret@127.0.0.1:9/db")
    reason = r"user:\*\*\*@127.* cannot be used \(No module named 'pg8000'\); install"
    with pytest.raises(TrackingError, match=reason), connect(files) as client:
        client.search_experiments()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("mlruns", "is a folder, which MLflow no longer supports"),
        ("./mlruns", "is a folder, which MLflow no longer supports"),
        ("/var/mlruns", "is a folder, which MLflow no longer supports"),
        ("file:///var/mlruns", "is a folder, which MLflow no longer supports"),
        ("C:\\mlruns", "is a folder, which MLflow no longer supports"),
        ("ftp://host", "has the unknown scheme 'ftp'"),
        ("htp://host:5000", "has the unknown scheme 'htp'"),
        ("http//host", "is a folder, which MLflow no longer supports"),
        ("localhost:5000", "has the unknown scheme 'localhost'"),
        ("http://host:port", "is invalid (Port could not be cast"),
        ("http://[::1", "is invalid (Invalid IPv6 URL)"),
        ("http://127.0.0.1:5000/#/experiments/1", "is the address of a page, not of a server"),
        ("https://host/?workspace=default", "is the address of a page, not of a server"),
        ("http:///path", "has no host"),
        ("http:5000", "has no host"),
        ("http://:5000", "has no host"),
        ("http://user@", "has no host"),
        ("sqlite:///", "has no file, so runs would be lost"),
        ("sqlite:///:memory:", "has no file, so runs would be lost"),
    ],
)
def test_invalid_uris_are_rejected_with_a_remedy(uri: str, reason: str) -> None:
    with pytest.raises(UriError) as caught:
        check_uri(uri)
    assert str(caught.value).startswith(f"MLFLOW_TRACKING_URI {uri} {reason}")
    assert "http://HOST:PORT" in str(caught.value) or "sqlite:///FILE" in str(caught.value)
    assert caught.value.exit_code == 2
    assert os.linesep not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "htps://user:secret@host",
        "user:secret@host",
        "user:secret@host:5000",
        "http//user:secret@host",
        "http:/user:secret@host",
        "http:///user:secret@host",
        "http://user:secret@",
        "http://user:secret@:5000",
        "http://user:secret@host:port",
        "http://user:secret@host/#/experiments/1",
        "http://user:secret/word@host",
        "http://user:secret#word@host",
        "http://user:[secret]@host",
        "http://user:secret\u2100@host",
        "databricks://user:secret@host",
        "file://user:secret@host/runs",
    ],
)
def test_errors_of_addresses_show_no_password(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UriError) as caught:
        check_uri(uri)
    assert "***@" in str(caught.value) and "secret" not in str(caught.value)
