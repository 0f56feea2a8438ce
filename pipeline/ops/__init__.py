"""The edge: the only importers of mlflow, prefect and dvc.

Importing it switches their telemetry (and ONNX Runtime's) off, before any of them is imported and for every process
that is started from here.
"""

import os

QUIET = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
