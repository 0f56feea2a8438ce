"""Compress image-retrieval networks while they learn.

The defaults below are set before any module imports mlflow, prefect, dvc or onnxruntime, and child processes inherit
them. Variables that the user has set stay.
"""

import os
from collections.abc import MutableMapping

DEFAULTS = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Prefect's temporary server needs more than the default 20 s on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts that are never reached through a proxy: Prefect's temporary server is one of them."""


def bypass_proxy_for_loopback(environment: MutableMapping[str, str]) -> None:
    """Add LOOPBACK to NO_PROXY and no_proxy if the environment names a proxy.

    Clients prefer the lower-case name, so each gets the value of the other if it has none. Without a proxy nothing is
    set: urllib would then ignore the proxies that macOS and Windows have in their settings. `*` (every host) stays
    alone, since urllib does not understand it in a list.
    """
    if not any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in environment):
        return
    given = {name: environment.get(name, "") for name in ("no_proxy", "NO_PROXY")}
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):
        hosts = [host.strip() for host in (given[name] or given[other]).split(",") if host.strip()]
        if hosts != ["*"]:
            environment[name] = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])


for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
bypass_proxy_for_loopback(os.environ)
