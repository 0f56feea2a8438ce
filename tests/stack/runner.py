"""Run the services of docker/compose.yaml as processes of this machine.

Commands, environment and health checks are those of the file; its variables set other hosts and folders.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.stack.compose import services
from tests.stack.postgres import initialise, programs, unprivileged

ROOT = Path(__file__).parents[2]
PORTS = ("POSTGRES_PORT", "MLFLOW_PORT", "PREFECT_PORT", "SEARCH_PORT")
GRACE = 5.0
"""Seconds that a service has to end by itself; Prefect's worker sometimes never does."""


def free_ports() -> dict[str, str]:
    """Return free ports for the variables of compose.yaml."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    ports = {name: str(listener.getsockname()[1]) for name, listener in zip(PORTS, held, strict=True)}
    for listener in held:
        listener.close()
    return ports


class Stack:
    """Context manager that runs all services as processes.

    Args:
        root: Root of the checkout.
        folder: Folder for databases, artifacts, passwords and logs.
        variables: Variables of compose.yaml, except those for ports, hosts and folders.
        settings: Environment variables that compose.yaml does not set.
    """

    def __init__(self, root: Path, folder: Path, variables: dict[str, str], settings: dict[str, str]) -> None:
        self.root, self.folder, self.settings = root, folder.resolve(), settings
        hosts = ("POSTGRES_HOST", "MLFLOW_HOST", "PREFECT_HOST", "LISTEN")
        self.variables = {
            **free_ports(),
            **dict.fromkeys(hosts, "127.0.0.1"),
            "STACK": str((root / "docker").resolve()),
            "ARTIFACTS": str(self.folder / "artifacts"),
            "SECRETS": str(self.folder / "secrets"),
            "SOCKETS": str(self.folder / "postgres"),
            "PGDATA": str(self.folder / "postgres" / "data"),
            "SCRATCH": str(self.folder),
            **variables,
        }
        self.services = services(root / "docker" / "compose.yaml", self.variables)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        (self.folder / "logs").mkdir(parents=True)
        make = ["sh", str(self.root / "docker" / "make-secrets.sh"), self.variables["SECRETS"]]
        subprocess.run(make, check=True)
        script = (self.root / "docker" / "databases.sql").read_text(encoding="utf-8")
        statements = [line for line in script.splitlines() if line.startswith("CREATE")]
        initialise(Path(self.variables["PGDATA"]), "stack", self.secret("postgres"), statements)
        try:
            for name, service in self.services.items():
                for other in service.after:
                    self.wait(other)
                self.start(name)
            self.wait("worker")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def secret(self, name: str) -> str:
        """Read a password from its file."""
        return (self.folder / "secrets" / name).read_text(encoding="utf-8").strip()

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a service."""
        path = os.pathsep.join([str(Path(sys.executable).parent), str(programs()), os.environ.get("PATH", "")])
        own = {"PATH": path, "PREFECT_HOME": str(self.folder / "home" / name), "PYTHONUNBUFFERED": "1"}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_"))}
        return {**inherited, **own, **self.settings, **self.services[name].environment}

    def start(self, name: str) -> None:
        """Start one service."""
        (self.folder / "home" / name).mkdir(parents=True, exist_ok=True)
        environment = self.environment(name)
        with (self.folder / "logs" / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                self.services[name].command,
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # as in a container; Ctrl-C must only reach pytest
                **(unprivileged() if name == "postgres" else {}),
            )

    def log(self, name: str) -> str:
        """Return the output of a service."""
        return (self.folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def healthy(self, name: str) -> bool:
        """Return whether the health check of a service passes; without a check it must only run."""
        if self.processes[name].poll() is not None:
            return False
        if not (check := self.services[name].health):
            return True
        return not subprocess.run(check, cwd=self.root, env=self.environment(name), capture_output=True).returncode

    def wait(self, name: str, seconds: float = 180) -> None:
        """Wait until a service works."""
        deadline = time.monotonic() + seconds
        while not self.healthy(name):
            running = self.processes[name].poll() is None
            assert running and time.monotonic() < deadline, f"{name} does not work: {self.log(name)[-2000:]}"
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop all services, PostgreSQL last, and kill their remaining processes."""
        below: list[psutil.Process] = []
        for process in self.processes.values():
            with suppress(psutil.NoSuchProcess):
                below += psutil.Process(process.pid).children(recursive=True)
        for name in reversed(self.processes):
            process = self.processes[name]
            process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)  # SIGTERM waits for clients
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            process.wait()
        for child in below:
            with suppress(psutil.NoSuchProcess):
                child.kill()
