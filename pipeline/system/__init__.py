"""The edge: the only importers of mlflow, prefect and dvc.

Importing it sets how they behave, before any of them is imported and for every process that is started from here; what
the user has set stays.
"""

import os

DEFAULTS = {
    # No telemetry, of ONNX Runtime neither.
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The server that Prefect starts for a single run: on a busy machine it needs longer than 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
