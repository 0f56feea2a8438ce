"""Check the Prefect server before it is used: whether it responds, and which version it has."""

import re

from prefect import __version__
from prefect.client.base import ServerType
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from pipeline.tracking.errors import root_cause

TIMEOUT = 5.0
"""Seconds until a server that does not respond counts as unreachable."""
ADDRESS = "set PREFECT_API_URL to http://HOST:PORT/api"
REMEDIES = {401: "set PREFECT_API_AUTH_STRING to USER:PASSWORD", 403: "set PREFECT_API_KEY", 404: ADDRESS}
"""Remedy for each status of a rejected request."""


class ServerError(RuntimeError):
    """The Prefect server cannot be used; reason and remedy are separated by a semicolon."""


def check_server() -> str | None:
    """Check that the configured Prefect server responds and is not too old for this client.

    Returns:
        Address of the server; None if none is configured.

    Raises:
        ServerError: If it cannot be used.
    """
    if not (url := get_current_settings().api.url):
        return None
    server = f"the Prefect server {url}"
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings={"timeout": TIMEOUT}) as client,
        ):
            if client.server_type == ServerType.CLOUD:  # fits every client
                client.read_work_pools(limit=1)
                return url
            version = client.api_version()
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        remedy = REMEDIES.get(status, "look into its log")
        raise ServerError(f"{server} rejects requests with status {status}; {remedy}") from error
    except ValueError as error:  # not JSON
        raise ServerError(f"{server} does not respond as Prefect does; {ADDRESS}") from error
    except Exception as error:  # of httpx, ssl or a proxy
        remedy = "start it, correct PREFECT_API_URL, or unset it to retrain without a server"
        raise ServerError(f"{server} cannot be reached ({root_cause(error)}); {remedy}") from error
    compare_versions(server, str(version))
    return url


def compare_versions(server: str, version: str) -> None:
    """Check that a server is not older than this client, nor of a newer major version.

    A client sends fields that an older server rejects: with 3.8.8, `make deploy` ends in status 422 at servers
    3.4.25, 3.6.29, 3.7.2 and 3.8.0.

    Raises:
        ServerError: If they do not fit; names both versions and which must be newer.
    """
    theirs, ours = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version, __version__))
    if len(theirs) < 3:
        raise ServerError(f"{server} does not respond as Prefect does; {ADDRESS}")
    if theirs < ours:
        raise ServerError(
            f"{server} has version {version}, which is older than Prefect {__version__} here; upgrade the server to "
            f"{__version__} or newer"
        )
    if theirs[0] > ours[0]:
        raise ServerError(
            f"{server} has version {version}, and Prefect {__version__} here is too old for it; use a server of "
            f"version {ours[0]}"
        )
