"""MLflow's store: which one, whether its address can work, and the experiment in it."""

import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.files import Files, write_text
from pipeline.system.locks import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

VARIABLE = "MLFLOW_TRACKING_URI"
LIMITS = {
    # A dead server costs four minutes a call by default. No retries: a POST that was carried out would be repeated;
    # `sync` looks up what there is before it repeats anything.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client, where the user has set no other."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https", "databricks")
KIND = {"mlflow.experimentKind": "custom_model_development", "mlflow.experiment.primaryMetric.name": "eval/mAP"}
"""Tags by which the UI chooses how to show the experiment."""


class TrackingError(RuntimeError):
    """MLflow cannot be reached, or refuses."""


class UriError(TrackingError):
    """An address at which no MLflow can be."""

    exit_code = 2


def tracking_uri(files: Files) -> str:
    """Address of the user's store, or of a database in the repository's root.

    A relative path of an SQLite file means the repository, also in the temporary working copies of `dvc exp run`.
    """
    uri = os.environ.get(VARIABLE, "").strip()
    if not uri:
        return f"sqlite:///{files.mlflow_db.resolve()}"
    scheme, path, query = _sqlite(uri)
    if not path or Path(path).is_absolute():
        return uri
    return f"{scheme}:///{(files.state / path).resolve()}{query}"


def check_uri(uri: str) -> None:
    """Refuse an address at which no MLflow can be, before anything is tried.

    Raises:
        UriError: With the remedy.
    """
    scheme, colon, _ = uri.partition(":")
    kind = scheme.partition("+")[0].lower()
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="mlflow.tracking_store")}
    if uri == "databricks" or (colon and (kind in (*DATABASES, *SERVERS) or scheme in plugins)):
        if kind in SERVERS[:2] and not urlsplit(uri).hostname:
            raise UriError(f"{VARIABLE} {uri} names no host; write http://HOST:PORT")
        if kind == "sqlite" and _sqlite(uri)[1] in ("", ":memory:"):
            raise UriError(f"{VARIABLE} {uri} names no file, so nothing would be kept; write sqlite:///FILE")
        return
    folder = not colon or kind == "file" or len(kind) == 1  # C:\\runs
    reason = "is a folder, which MLflow no longer takes" if folder else f"begins with {scheme!r}, unknown to MLflow"
    raise UriError(f"{VARIABLE} {uri} {reason}; set it to http://HOST:PORT or sqlite:///FILE, or unset it")


def _sqlite(uri: str) -> tuple[str, str, str]:
    """Scheme, path and query of an SQLite file's address; three empty texts for another one."""
    found = re.fullmatch(r"(sqlite(?:\+\w+)?):///([^?]*)(\?.*)?", uri, re.IGNORECASE)
    return (found[1], found[2], found[3] or "") if found else ("", "", "")


def cause(error: BaseException) -> str:
    """First line of the error that came first: `Connection refused`, not the ten lines around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def open_store(files: Files) -> "MlflowClient":
    """Connect to the store; a database gets its tables at the first time.

    Raises:
        UriError: If its address cannot work.
        BusyError: If another process needs more than a minute to make the tables.
        Exception: Whatever MLflow raises.
    """
    uri = tracking_uri(files)
    check_uri(uri)
    _set_limits()
    from mlflow import MlflowClient  # seconds

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if uri.startswith(SERVERS):
        return MlflowClient(uri, registry_uri=uri)
    # Two processes at once would both make the tables and leave a half-migrated database (MLflow 3.17).
    with locked(files.tracking / "store.lock", "the opening of MLflow's database", patience=60):
        _follow_checkout(files, uri)
        return MlflowClient(uri, registry_uri=uri)


def _set_limits() -> None:
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)


@contextmanager
def connected(files: Files) -> Iterator["MlflowClient"]:
    """Connect to the store; an error of MLflow becomes one sentence.

    Raises:
        TrackingError: If MLflow cannot be reached, or refuses.
    """
    check_uri(tracking_uri(files))
    _set_limits()
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield open_store(files)
    except (MlflowException, RequestException) as error:
        raise TrackingError(f"MLflow at {tracking_uri(files)} refused ({cause(error)})") from error


def _follow_checkout(files: Files, uri: str) -> None:
    """Correct the paths in the checkout's own database after the checkout was moved or copied.

    MLflow stores absolute paths of artefacts and has no call to change them, so a moved checkout would write to the
    old place, and a copied one into the other's folder. A file beside the records has the place of the last call.
    """
    if Path(_sqlite(uri)[1]) != files.mlflow_db.resolve():
        return
    here, note = files.mlflow_artifacts.resolve().as_uri(), files.tracking / "artifacts-at"
    there = note.read_text(encoding="utf-8").strip() if note.is_file() else here
    if there != here and files.mlflow_db.is_file():
        import sqlite3

        with closing(sqlite3.connect(files.mlflow_db, timeout=30)) as database, database:
            for table, column in LOCATIONS:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 - names from LOCATIONS
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (here, len(there) + 1, there, len(there) + 1, f"{there}/"),
                )
    if there != here or not note.is_file():
        write_text(note, here + "\n")


LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's tables that hold places of artefacts."""


def experiment(client: "MlflowClient", files: Files, name: str) -> str | None:
    """Id of an experiment, which is made where it is missing; None where somebody has deleted it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # A server keeps artefacts where it likes; a database alone would put them into the current directory.
        home = None if client.tracking_uri.startswith("http") else files.mlflow_artifacts.resolve().as_uri()
        try:
            return str(client.create_experiment(name, home, KIND))
        except MlflowException:  # another process was faster
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return str(found.experiment_id) if found.lifecycle_stage == "active" else None
