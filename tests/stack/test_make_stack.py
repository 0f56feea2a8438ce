"""`make stack`: the processes of Procfile, started and stopped as by a user."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.fake_stages import wait_until
from tests.stack.runner import free_ports
from tests.test_end_to_end import checkout

pytestmark = pytest.mark.stack


@pytest.fixture
def make(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`make stack` in a checkout, in its own session as in a terminal, with a proxy that does not work."""
    root = checkout(tmp_path / "checkout")
    ours = ("MLFLOW_", "PREFECT_", "NO_PROXY", "no_proxy")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    dead = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["make", "-o", "setup", "stack", f"VENV={sys.prefix}"],
            cwd=root, env={**kept, **free_ports(), **dead}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    yield process
    for child in processes_in(root):
        child.kill()
    process.wait()


def processes_in(root: Path) -> list[psutil.Process]:
    """Return the processes whose working directory is below a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(root):
                found.append(process)
    return found


def test_the_stack_listens_on_this_machine_only_and_ends_with_ctrl_c(
    make: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    root, log = tmp_path / "checkout", tmp_path / "log"
    wait_until(lambda: make.poll() is not None or b"' started!" in log.read_bytes(), 180)
    assert make.poll() is None, log.read_text()
    (worker,) = [process for process in processes_in(root) if "worker" in process.cmdline()[:3]]
    environment = {name: value for name, value in worker.environ().items() if name.startswith(("MLFLOW_", "PREFECT_"))}

    doctor = [sys.executable, "-m", "pipeline", "doctor"]
    done = subprocess.run(
        doctor, cwd=root, env={**os.environ, **environment, "COLUMNS": "200"}, capture_output=True, text=True
    )
    marks = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
    assert [marks[name] for name in ("mlflow", "prefect", "worker")] == ["ok", "ok", "ok"], done.stdout
    listening = {
        connection.laddr.ip
        for process in processes_in(root)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    assert {path.name for path in (root / ".stack").iterdir()} >= {"mlflow.db", "prefect"}

    os.killpg(make.pid, signal.SIGINT)
    make.wait(30)
    wait_until(lambda: not processes_in(root), 30)
