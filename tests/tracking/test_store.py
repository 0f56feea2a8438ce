import os
from pathlib import Path

import pytest

from pipeline.files import Files
from pipeline.tracking.store import UriError, check_uri, tracking_uri


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
def test_valid_uris_pass(uri: str) -> None:
    check_uri(uri)


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
