"""Upload the run record of a stage while the stage runs: `python -m pipeline.tracking.background JSON`.

It is a separate process, because importing mlflow takes seconds and must not happen in a process that forks image
loaders.
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.files import Files, write_text
from pipeline.system.locks import BusyError
from pipeline.tracking import errors, store
from pipeline.tracking.run_record import ExecutionRecords
from pipeline.tracking.sync import Sync

INTERVAL = 60.0
"""Seconds between two uploads during a stage."""


def main() -> None:
    """Upload every INTERVAL seconds until the stage that started this process ends, which closes standard input."""
    arguments = json.loads(sys.argv[1])
    files = Files(Path(arguments["root"]), Path(arguments["state"]))
    records = ExecutionRecords(Path(arguments["records"]))
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended, os.getppid()), daemon=True).start()
    if arguments["quiet"]:
        ended.wait()
    monitor: Any = None
    last = False
    while not last:
        last = ended.is_set()
        upload = Sync(files)
        try:
            with suppress(BusyError):
                upload.upload(records)
            if not last:
                upload.upload_all()
            upload.check()
            records.problem.unlink(missing_ok=True)
        except Exception as error:
            write_text(records.problem, f"{getattr(error, 'problem', '') or errors.root_cause(error)}\n")
        if monitor is None and not ended.is_set():
            monitor = _start_monitor(files, records, arguments["name"])
        ended.wait(INTERVAL)
    if monitor is not None:
        monitor.finish()


def _wait_for_end(ended: threading.Event, stage: int) -> None:
    killed = not sys.stdin.buffer.read(1)
    deadline = time.monotonic() + 5
    while killed and os.getppid() == stage and time.monotonic() < deadline:
        time.sleep(0.02)  # its pipe is closed shortly before the process counts as ended
    ended.set()


def _start_monitor(files: Files, records: ExecutionRecords, name: str) -> Any:
    """Start MLflow's system metrics for a stage's run, unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false."""
    run = records.synced(store.store_key(files)).get(name, {}).get("run")
    if run is None or os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() == "false":
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor: Any = SystemMetricsMonitor(run, tracking_uri=store.tracking_uri(files))  # type: ignore[no-untyped-call]
    monitor.start()
    return monitor


if __name__ == "__main__":
    main()
