"""`make stack`: what docker/compose.yaml declares, as processes of this machine instead of containers.

Commands, environment and health checks are those of the file; only names of hosts and folders differ, by the variables
that the file has for them.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from pipeline.ops.cluster import initialise, owner, programs
from pipeline.ops.compose import Service, services
from pipeline.ops.process import Stopped
from pipeline.ops.stage import guarded, log_to_stderr

log = logging.getLogger(__name__)

PORTS = {"POSTGRES_PORT": "55432", "MLFLOW_PORT": "5000", "PREFECT_PORT": "4200", "SEARCH_PORT": "8000"}
"""Of this machine; PostgreSQL's own may be taken by that of the system."""
HEALTHY = 180.0
"""Seconds that a service gets until its health check holds: at the first start, tables are made."""
AGAIN = 5.0
"""Seconds until a service that ended starts again."""
LONGEST = 10 * 2**20
"""Bytes that a log may have before it begins anew; what was there is kept once."""
UNAWAITED = ("search",)
"""Services that are healthy only once there is a champion."""


class StackError(RuntimeError):
    """A service does not start."""


class Stack:
    """Services as processes; a context manager.

    Args:
        root: Of the checkout.
        folder: Where databases, artefacts, passwords and logs are kept.
        variables: Of compose.yaml, such as ports, beside those for hosts and folders.
        without: Services that are left out.
    """

    def __init__(
        self, root: Path, folder: Path, variables: Mapping[str, str] | None = None, without: Sequence[str] = ()
    ) -> None:
        self.root, self.folder = root, folder.resolve()
        hosts = ("POSTGRES_HOST", "MLFLOW_HOST", "PREFECT_HOST", "LISTEN")
        self.variables = {
            "ARTIFACTS": str(self.folder / "artifacts"),
            **PORTS,
            **os.environ,
            **dict.fromkeys(hosts, "127.0.0.1"),
            "STACK": str((root / "docker").resolve()),
            "SECRETS": str(self.folder / "secrets"),
            "SOCKETS": str(self.folder / "postgres"),
            "PGDATA": str(self.folder / "postgres" / "data"),
            "SCRATCH": str(self.folder),
            **(variables or {}),
        }
        declared = services(root / "docker" / "compose.yaml", self.variables)
        self.services = {one.name: one for one in declared if one.name not in without}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o711)  # PostgreSQL's own user must be able to go through it
        make = ["sh", str(self.root / "docker" / "make-secrets.sh"), self.variables["SECRETS"]]
        subprocess.run(make, check=True)
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        try:
            for name in self.services:
                self.start(name)
                if name not in UNAWAITED:
                    self.wait(name)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def secret(self, name: str) -> str:
        """Content of a password's file."""
        return (self.folder / "secrets" / name).read_text(encoding="utf-8").strip()

    def environment(self, name: str) -> dict[str, str]:
        """What a service finds in its environment."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        own = {"PATH": path, "PREFECT_HOME": str(self.folder / "home" / name), "PYTHONUNBUFFERED": "1"}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_"))}
        return {**inherited, **own, **self.services[name].environment}

    def start(self, name: str) -> None:
        """Start one service."""
        service = self.services[name]
        (self.folder / "home" / name).mkdir(parents=True, exist_ok=True)
        command, extra = list(service.command), {}
        if name == "postgres":
            extra = self._cluster(service)
            command[0] = str(programs() / command[0])
        with (self.folder / "logs" / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C ends them one after the other, not all at once
                **extra,
            )
        log.info("%s starts", name)

    def revive(self) -> None:
        """Start services again that ended by themselves, as compose.yaml asks for by `restart`."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                log.warning("%s ended with %s and starts again; see %s", name, process.returncode, self.folder / "logs")
                self.start(name)

    def trim(self) -> None:
        """Let logs that grew long begin anew: they are open for appending, so emptying them is enough."""
        for path in (self.folder / "logs").glob("*.log"):
            if path.stat().st_size > LONGEST:
                with suppress(OSError):  # a full disk: the more it must go
                    shutil.copyfile(path, path.with_suffix(".log.1"))
                os.truncate(path, 0)

    def wait(self, name: str, seconds: float = HEALTHY) -> None:
        """Wait until a service works.

        Raises:
            StackError: If it ends or does not work in time, with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while not self.healthy(name):
            ended = self.processes[name].poll() is not None
            if ended or time.monotonic() > deadline:
                lines = (
                    (self.folder / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                )
                what = "ended" if ended else f"does not work after {seconds:.0f} s"
                raise StackError(f"{name} {what}; its log ends with\n" + "\n".join(lines[-8:]))
            time.sleep(0.5)
        log.info("%s works", name)

    def healthy(self, name: str) -> bool:
        """Whether the health check of a service holds; one without a check need only run."""
        if self.processes[name].poll() is not None:
            return False
        check = list(self.services[name].health)
        if not check:
            return True
        if name == "postgres":
            check[0] = str(programs() / check[0])
        environment = self.environment(name)
        return not subprocess.run(check, cwd=self.root, env=environment, capture_output=True).returncode

    def stop(self) -> None:
        """End all services, the last one first; who is told to end twice does not leave some of them behind."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for name in reversed(list(self.processes)):
                self.end(name)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self, name: str) -> None:
        """End one service, and whatever it leaves after its time of grace."""
        process = self.processes.pop(name)
        below: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(process.pid).children(recursive=True)
        number = signal.SIGINT if name == "postgres" else signal.SIGTERM  # fast shutdown: it does not wait for clients
        with suppress(ProcessLookupError):
            process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(self.services[name].grace)
        for one in below:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.wait()
        log.info("%s ended", name)

    def _cluster(self, service: Service) -> dict[str, Any]:
        data = Path(service.environment["PGDATA"])
        script = (self.root / "docker" / "databases.sql").read_text(encoding="utf-8")
        statements = [line for line in script.splitlines() if line.startswith("CREATE")]
        initialise(data, service.environment["POSTGRES_USER"], self.secret("postgres"), statements)
        return owner(data)

    def addresses(self) -> dict[str, str]:
        """Where people find the services."""
        ports = {"mlflow": "MLFLOW_PORT", "prefect": "PREFECT_PORT", "search": "SEARCH_PORT"}
        return {
            name: f"http://localhost:{self.variables[port]}" for name, port in ports.items() if name in self.services
        }


def serve(root: Path, folder: Path) -> None:
    """Run the stack until this process is told to end."""
    with Stack(root, folder) as stack:
        for name, address in stack.addresses().items():
            log.info("%-8s %s", name, address)
        log.info("user admin; passwords in %s; Ctrl-C ends all", stack.variables["SECRETS"])
        with suppress(KeyboardInterrupt, Stopped):
            while True:
                time.sleep(AGAIN)
                stack.revive()
                stack.trim()


def main() -> None:
    """Entry point of `make stack`."""
    log_to_stderr("stack")
    root = Path.cwd()
    sys.exit(guarded("stack", lambda: serve(root, root / ".stack")))


if __name__ == "__main__":
    main()
