"""Errors of MLflow in one sentence with the remedy."""

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

VARIABLE = "MLFLOW_TRACKING_URI"
STATUS = re.compile(r"error code (\d{3})|too many (\d{3}) error|(\d{3}) (?:Client|Server) Error")
"""HTTP status in an error of MLflow, urllib3 or requests."""
UNREACHABLE = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
"""Errors of a network that have no class of their own in Python."""
LOGIN = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
SECRET = re.compile(r"((?:password|passwd|pwd|token|secret)\w*(?:=|%3D))(?:(?!%3B)[^&;])+", re.IGNORECASE)
"""Password in the query of the address of a database."""


class TrackingError(RuntimeError):
    """MLflow cannot be reached, or rejects a request.

    Attributes:
        problem: Short form of the message that does not repeat the address; may be empty.
    """

    def __init__(self, message: str, problem: str = "") -> None:
        super().__init__(message)
        self.problem = problem


class UriError(TrackingError):
    """The tracking URI is invalid."""

    exit_code = 2


def shown(uri: str) -> str:
    """Return an address as messages show it, without passwords; too much is masked rather than a part of one shown."""
    scheme, rest = re.fullmatch(r"((?:[\w+.-]+://)?)(.*)", uri, re.DOTALL).groups()  # type: ignore[union-attr]
    if not (scheme.lower().startswith(("sqlite", "file")) and rest.startswith("/")):  # paths may contain : and @
        rest = re.sub(r"^([^:]*:).*@", r"\1***@", rest, flags=re.DOTALL)
    return scheme + SECRET.sub(r"\1***", rest)


def root_cause(error: BaseException) -> str:
    """Return the first line of the innermost error of a chain, such as `Connection refused`."""
    error = list(_chain(error))[-1]
    lines = (str(error) or type(error).__name__).splitlines()
    return lines[-1 if lines[0].endswith(":") else 0][:200]  # a heading, and what failed


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def failure(uri: str, error: BaseException) -> TrackingError:
    """Return an error that explains in one sentence why a request to MLflow failed, with the remedy if it is known."""
    reason = _reason(uri, error).replace(uri, shown(uri))
    return TrackingError(f"MLflow at {shown(uri)} {reason}", f"it {reason}")


def http_status(error: BaseException) -> int:
    """Return the HTTP status of a failed request; 0 if it is unknown."""
    text = "\n".join(map(str, _chain(error)))
    if match := STATUS.search(text):
        return int(next(filter(None, match.groups())))
    return 403 if "PERMISSION_DENIED" in text else 0


def _reason(uri: str, error: BaseException) -> str:
    text, cause, status = "\n".join(map(str, _chain(error))), root_cause(error), http_status(error)
    if "Invalid Host" in text:
        return "rejects this name of its host; add it and the default names to its `--allowed-hosts`"
    if status == 401:
        return _login(uri)
    if status == 403:
        who = f"user {user}" if (user := _credentials(uri)[0]) else "this login"
        return f"denies the request to {who} (403); ask its administrator, or set another {LOGIN}"
    if "not in a valid JSON format" in text or status == 404 or "{'detail': 'Not Found'}" in text:
        return f"responds like a web page (a login page, or a path prefix is missing); correct {VARIABLE}"
    if status:
        return f"cannot be used now (HTTP status {status}); see the log of the server or its proxy"
    if cause.startswith("No module named"):
        return f"cannot be used ({cause}); install this package, or name another driver in {VARIABLE}"
    if "timed out" in cause:
        seconds = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT")
        return f"cannot be reached (no response in {seconds} s; MLFLOW_HTTP_REQUEST_TIMEOUT sets this limit)"
    if is_network_error(error):
        return f"cannot be reached ({cause})"
    return f"cannot be used ({cause})" if is_os_error(error) else f"rejects the request ({cause})"


def is_network_error(error: BaseException) -> bool:
    """Return whether a request failed before it was answered."""
    from requests.exceptions import RequestException

    kinds = (RequestException, ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
    return any(
        isinstance(one, kinds) or (isinstance(one, OSError) and one.errno in UNREACHABLE) for one in _chain(error)
    )


def is_os_error(error: BaseException) -> bool:
    """Return whether the network or this machine caused an error, such as by a full disk, and MLflow did not."""
    return any(isinstance(one, OSError) for one in _chain(error))


def _credentials(uri: str) -> tuple[str, str]:
    """Return user and password that MLflow's client uses for a server; empty if it has none."""
    from mlflow.utils.credentials import read_mlflow_creds

    found, address = read_mlflow_creds(), urlsplit(uri)
    return found.username or address.username or "", found.password or address.password or ""


def _login(uri: str) -> str:
    """Describe a rejected login: which variables are missing, or which were used."""
    (user, password), token = _credentials(uri), os.environ.get("MLFLOW_TRACKING_TOKEN")
    if urlsplit(uri).password:
        return f"rejects the password of user {user} in the address (401); correct {VARIABLE}"
    if user and password:
        return f"rejects the password of user {user} (401); correct {LOGIN}"
    if token:
        return f"rejects the token (401); correct MLFLOW_TRACKING_TOKEN, or set {LOGIN}"
    if user or password:
        missing = "PASSWORD" if user else "USERNAME"
        return f"needs a login (401) and MLFLOW_TRACKING_{missing} is not set; set it, or MLFLOW_TRACKING_TOKEN"
    return f"needs a login (401); set {LOGIN}, or MLFLOW_TRACKING_TOKEN"
