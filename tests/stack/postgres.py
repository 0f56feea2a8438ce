"""PostgreSQL of the system package, with its data in a folder of a test."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fake_stages import wait_until


def programs() -> Path:
    """Return the folder of the server's programs, which Debian does not put into the PATH."""
    candidates = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    found = [Path(path).parent for path in candidates if path]
    assert found, "PostgreSQL is not installed; the package is called postgresql"
    return found[-1]


def unprivileged() -> dict[str, Any]:
    """Return arguments of `subprocess` for a PostgreSQL program, which must not run as root."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


def initialise(data: Path, user: str, password: str, statements: Iterable[str]) -> None:
    """Create a cluster as the PostgreSQL image does at its first start, and run SQL statements.

    Connections by the socket are trusted, others need the password. The parent of `data` must not exist yet.
    """
    data.parent.mkdir(parents=True, exist_ok=True)
    secret = data.parent / "password"
    secret.write_text(password, encoding="utf-8")
    if os.geteuid() == 0:
        _allow_entry(data.parent)
        for path in (data.parent, secret):
            shutil.chown(path, "postgres", "postgres")
    options = ["-U", user, "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8"]
    _run("initdb", "-D", str(data), "--no-sync", *options)
    secret.unlink()
    for statement in statements:
        _run("postgres", "--single", "-D", str(data), "postgres", text=statement + "\n")


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run a server with its data in an empty folder, and yield the SQLAlchemy URI of its database."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    data = folder / "data"
    initialise(data, "mlflow", "secret", ["CREATE DATABASE runs;"])
    settings = ("listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off")
    options = [word for setting in settings for word in ("-c", setting)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [str(programs() / "postgres"), "-D", str(data), "-p", port, *options],
            stdout=log, stderr=log, cwd="/", **unprivileged(),
        )  # fmt: skip
    query = [str(programs() / "psql"), "-h", str(folder), "-p", port, "-U", "mlflow", "-d", "runs", "-c", "select 1"]
    try:
        wait_until(lambda: not subprocess.run(query, capture_output=True).returncode, 60)
        yield f"postgresql+psycopg://mlflow:secret@127.0.0.1:{port}/runs"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


def _run(program: str, *words: str, text: str = "") -> None:
    command = [str(programs() / program), *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd="/", **unprivileged())
    assert not done.returncode and "ERROR:" not in done.stderr, f"{program} failed: {done.stderr.strip()[-500:]}"


def _allow_entry(folder: Path) -> None:
    """Let the user postgres enter the temporary folders of pytest above a folder, and no others."""
    temporary = Path(tempfile.gettempdir())
    for path in (folder, *folder.parents):
        if temporary in path.parents and path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | 0o001)
