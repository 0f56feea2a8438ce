import os
from pathlib import Path

import pytest

from pipeline.files import Files
from pipeline.tracking.store import UriError, check_uri, tracking_uri


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Files(tmp_path / "temporary", tmp_path / "repository")


def test_the_default_store_lies_in_the_repository(files: Files) -> None:
    assert tracking_uri(files) == f"sqlite:///{files.state}/mlflow.db"


@pytest.mark.parametrize(
    ("given", "used"),
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
def test_a_relative_database_means_the_repository(
    files: Files, monkeypatch: pytest.MonkeyPatch, given: str, used: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri(files) == used.format(state=files.state)


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
def test_addresses_that_may_work_pass(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("mlruns", "is a folder, which MLflow no longer takes"),
        ("./mlruns", "is a folder, which MLflow no longer takes"),
        ("/var/mlruns", "is a folder, which MLflow no longer takes"),
        ("file:///var/mlruns", "is a folder, which MLflow no longer takes"),
        ("C:\\mlruns", "is a folder, which MLflow no longer takes"),
        ("ftp://host", "begins with 'ftp', unknown to MLflow"),
        ("htp://host:5000", "begins with 'htp', unknown to MLflow"),
        ("http:///path", "names no host"),
        ("http:5000", "names no host"),
        ("http://:5000", "names no host"),
        ("http://user@", "names no host"),
        ("sqlite:///", "names no file, so nothing would be kept"),
        ("sqlite:///:memory:", "names no file, so nothing would be kept"),
    ],
)
def test_addresses_that_cannot_work_are_refused_with_the_remedy(uri: str, reason: str) -> None:
    with pytest.raises(UriError) as caught:
        check_uri(uri)
    assert str(caught.value).startswith(f"MLFLOW_TRACKING_URI {uri} {reason}")
    assert "http://HOST:PORT" in str(caught.value) or "sqlite:///FILE" in str(caught.value)
    assert caught.value.exit_code == 2
    assert os.linesep not in str(caught.value)
