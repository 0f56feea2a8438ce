"""Check the Prefect server before it is used: whether it responds, and which version it has."""

import logging
import re

from prefect import __version__
from prefect.client.base import ServerType
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from pipeline.tracking.errors import root_cause

log = logging.getLogger(__name__)

DEPLOYS = (3, 8, 5)
"""Oldest server at which Prefect 3.8.8 registers automations: 3.8.0, 3.8.1 and 3.8.4 reject a field (status 422)."""
TIMEOUT = 5.0
"""Seconds until a server that does not respond counts as unreachable."""
ADDRESS = "set PREFECT_API_URL to http://HOST:PORT/api"
REMEDIES = {401: "set PREFECT_API_AUTH_STRING to USER:PASSWORD", 403: "set PREFECT_API_KEY", 404: ADDRESS}
"""Remedy for each status of a rejected request."""


class ServerError(RuntimeError):
    """The Prefect server cannot be used; reason and remedy are separated by a semicolon."""


def check_server(deploys: bool = False) -> str | None:
    """Check that the configured Prefect server responds and fits this client.

    Args:
        deploys: Whether deployments and automations will be created, which fewer servers accept than runs.

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
            if not isinstance(version, str):
                raise ValueError
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        remedy = REMEDIES.get(status, "look into its log")
        raise ServerError(f"{server} rejects requests with status {status}; {remedy}") from error
    except ValueError as error:  # not JSON, or no version
        raise ServerError(f"{server} does not respond as Prefect does; {ADDRESS}") from error
    except Exception as error:  # of httpx, ssl or a proxy
        remedy = "start it, correct PREFECT_API_URL, or unset it to retrain without a server"
        raise ServerError(f"{server} cannot be reached ({root_cause(error)}); {remedy}") from error
    compare_versions(server, version, deploys)
    return url


def compare_versions(server: str, version: str, deploys: bool) -> None:
    """Check that a server fits this client.

    Runs work with every server of the same major version that was tried, down to 3.4.25, so an older minor version is
    only a warning; `make deploy` fails there. A version without three numbers, as a build from sources may have, is one
    as well.

    Raises:
        ServerError: If they do not fit; names both versions.
    """
    theirs, ours = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version, __version__))
    has = f"{server} has version {version}"
    if len(theirs) < 3:
        log.warning("%s, which cannot be compared to Prefect %s here", has, __version__)
        return
    if theirs[0] > ours[0]:
        raise ServerError(f"{has}, and Prefect {__version__} here is too old for it; use a server of version {ours[0]}")
    same_minor = (*ours[:2], 0)
    least = min(ours, max(DEPLOYS, same_minor)) if deploys else (ours[0], 0, 0)
    if theirs < least:
        needed = ".".join(map(str, least))
        raise ServerError(
            f"{has}, which is too old for Prefect {__version__} here; upgrade the server to {needed} or newer"
        )
    if theirs < same_minor:
        log.warning("%s, which is older than Prefect %s here; `make deploy` does not work with it", has, __version__)
