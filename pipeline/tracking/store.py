"""Address and identity of the MLflow store, connection to it, and its experiment."""

import hashlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.files import Files, write_text
from pipeline.system.locks import BusyError, locked
from pipeline.tracking.errors import VARIABLE, TrackingError, UriError, failure, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

CLIENT_DEFAULTS = {
    # By default each call to a dead server takes four minutes. Retries would repeat POST requests that succeeded;
    # `sync` looks up existing runs before it repeats a call.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of the MLflow client, unless the user has set them."""
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https", "databricks")
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": "eval/mAP",
}
"""Tags that select the view of the experiment in the MLflow UI."""


def tracking_uri(files: Files) -> str:
    """Return MLFLOW_TRACKING_URI, or the URI of a database in the root of the repository.

    Relative paths of SQLite files are relative to the repository, also in temporary working copies of `dvc exp run`.
    """
    uri = os.environ.get(VARIABLE, "").strip()
    if not uri:
        return f"sqlite:///{files.mlflow_db.resolve()}"
    scheme, path, query = _sqlite(uri)
    if not path or Path(path).is_absolute():
        return uri
    return f"{scheme}:///{(files.state / path).resolve()}{query}"


def check_uri(uri: str) -> None:
    """Check a tracking URI without connecting to it.

    Raises:
        UriError: If no MLflow store can have this URI.
    """
    scheme, colon, _ = uri.partition(":")
    kind = scheme.partition("+")[0].lower()
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="mlflow.tracking_store")}
    if uri == "databricks" or (colon and (kind in (*DATABASES, *SERVERS) or scheme in plugins)):
        if kind in SERVERS[:2]:
            _check_address(uri)
        configured = any(name.startswith("DATABRICKS_") for name in os.environ)
        if kind == "databricks" and not (configured or Path("~/.databrickscfg").expanduser().is_file()):
            raise UriError(f"{VARIABLE} {shown(uri)} needs a login; set DATABRICKS_HOST and DATABRICKS_TOKEN")
        if kind == "sqlite" and _sqlite(uri)[1] in ("", ":memory:"):
            raise UriError(f"{VARIABLE} {shown(uri)} has no file, so runs would be lost; set it to sqlite:///FILE")
        return
    folder = not colon or kind == "file" or len(kind) == 1  # C:\\runs
    reason = "is a folder, which MLflow no longer supports" if folder else f"has the unknown scheme {scheme!r}"
    raise UriError(f"{VARIABLE} {shown(uri)} {reason}; set it to http://HOST:PORT or sqlite:///FILE, or unset it")


def _check_address(uri: str) -> None:
    """Check the address of a server.

    Raises:
        UriError: If it has no host, an invalid port, or is the address of a page of the MLflow UI.
    """
    try:
        address = urlsplit(uri)
        reason = "" if address.hostname else "has no host"
        if address.fragment or address.query:
            reason = "is the address of a page, not of a server"
        _ = address.port
    except ValueError as error:  # of the port, or of an IPv6 address
        reason = f"is invalid ({error})"
        if shown(uri) != uri:  # the error may quote a part of the password
            reason = "is invalid (in a password, write / as %2F, # as %23 and ? as %3F)"
    if reason:
        raise UriError(f"{VARIABLE} {shown(uri)} {reason}; set it to http://HOST:PORT")


def _sqlite(uri: str) -> tuple[str, str, str]:
    """Split the URI of an SQLite file into scheme, path and query; empty strings for any other URI."""
    match = re.fullmatch(r"(sqlite(?:\+\w+)?):///([^?]*)(\?.*)?", uri, re.IGNORECASE)
    return (match[1], match[2], match[3] or "") if match else ("", "", "")


# --- connection -------------------------------------------------------------------------------------------------------


def open_store(files: Files) -> "MlflowClient":
    """Connect to the store; a new database gets its tables.

    Raises:
        UriError: If its URI is invalid.
        BusyError: If another process has been creating the tables for more than a minute.
        Exception: Any error of MLflow.
    """
    uri = tracking_uri(files)
    check_uri(uri)
    _set_client_defaults()
    from mlflow import MlflowClient  # takes seconds

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if uri.startswith(SERVERS):
        return MlflowClient(uri, registry_uri=uri)
    # Two processes that create the tables at once leave a half-migrated database (MLflow 3.17).
    with locked(files.tracking / "store.lock", "the setup of the MLflow database", timeout=60):
        _update_artifact_paths(files, uri)
        return MlflowClient(uri, registry_uri=uri)


def _set_client_defaults() -> None:
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def connect(files: Files) -> Iterator["MlflowClient"]:
    """Connect to the store, and raise errors of MLflow as `TrackingError`.

    Raises:
        TrackingError: If MLflow cannot be reached, or rejects a request.
    """
    check_uri(tracking_uri(files))
    _set_client_defaults()
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        client = open_store(files)
    except (TrackingError, BusyError):
        raise
    except Exception as error:  # of MLflow, SQLAlchemy or a driver
        raise failure(tracking_uri(files), error) from error
    try:
        yield client
    except (MlflowException, RequestException) as error:
        raise failure(tracking_uri(files), error) from error


def store_key(files: Files) -> str:
    """Return the key of the present store, under which the state of uploads is kept.

    It is a digest of the address, with the identity of the store as of the last connection (see `identify`).
    """
    path = _identity_file(files)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else path.name


def identify(files: Files, client: "MlflowClient") -> str:
    """Read the identity of the store from it, save the key of the store for `store_key`, and return it.

    The identity is the time at which the store was created, to the millisecond: MLflow creates experiment 0 together
    with its tables. So a new store at an old address has no state. The address is a part of the key because a clone of
    a database has the same identity and may lack later runs; at another address of the same store, `sync` finds the
    existing runs by their tags. A store that does not show experiment 0 keeps its last key.

    Raises:
        Exception: Any error of MLflow.
    """
    from mlflow.exceptions import MlflowException

    path, known = _identity_file(files), store_key(files)
    try:
        created = client.get_experiment("0").creation_time
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"):
            raise
        created = None
    key = f"{path.name}-{created}" if created else known
    if key != known == path.name:  # of version 0.1.0, or of a store that did not show experiment 0 before
        for state in (files.tracking / "runs").glob(f"*/synced/{path.name}.json"):
            if not (target := state.with_name(f"{key}.json")).exists():
                with suppress(FileNotFoundError):  # another process moved it
                    state.rename(target)
    if key != known or not path.is_file():
        write_text(path, key + "\n")
    return key


def _identity_file(files: Files) -> Path:
    return files.tracking / "stores" / hashlib.sha256(tracking_uri(files).encode()).hexdigest()[:16]


def _update_artifact_paths(files: Files, uri: str) -> None:
    """Update the artifact paths in a database below the checkout after the checkout was moved or copied.

    MLflow stores absolute paths and has no call to change them, so a copied checkout would write into the folder of the
    original. The file `artifacts-at` holds the path at the last call.
    """
    database_file, name = Path(_sqlite(uri)[1]), "artifacts-at"
    if not database_file.is_relative_to(files.state.resolve()):
        return
    if database_file != files.mlflow_db.resolve():
        name += "-" + "-".join(database_file.relative_to(files.state.resolve()).parts)
    new, path_file = files.mlflow_artifacts.resolve().as_uri(), files.tracking / name
    old = path_file.read_text(encoding="utf-8").strip() if path_file.is_file() else new
    if old != new and database_file.is_file():
        import sqlite3

        with closing(sqlite3.connect(database_file, timeout=30)) as database, database:
            for table, column in ARTIFACT_COLUMNS:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 - constant names
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )
    if old != new or not path_file.is_file():
        write_text(path_file, new + "\n")


ARTIFACT_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's tables that hold artifact paths."""


def experiment_id(client: "MlflowClient", files: Files, name: str) -> str | None:
    """Return the id of an experiment, creating it if it is missing; None if it was deleted in MLflow."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # A server chooses the artifact folder; a database would use the current directory.
        location = None if client.tracking_uri.startswith("http") else files.mlflow_artifacts.resolve().as_uri()
        try:
            return str(client.create_experiment(name, location, EXPERIMENT_TAGS))
        except MlflowException:  # another process created it meanwhile
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return str(found.experiment_id) if found.lifecycle_stage == "active" else None
