"""PostgreSQL from the system's own package, in a folder of a test."""

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
    """Folder of the server's programs; Debian keeps them out of the PATH."""
    there = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    found = [Path(path).parent for path in there if path]
    assert found, "PostgreSQL is not installed; the package is called postgresql"
    return found[-1]


def unprivileged() -> dict[str, Any]:
    """Arguments of `subprocess` for a program of PostgreSQL's, which refuses to run as root."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


def initialise(data: Path, user: str, password: str, statements: Iterable[str]) -> None:
    """Make a cluster, as PostgreSQL's image does at its first start.

    Args:
        data: Its folder, in one that does not exist yet.
        user: Its superuser; connections by the socket are trusted, others need the password.
        password: Of the user.
        statements: SQL, run once.
    """
    data.parent.mkdir(parents=True, exist_ok=True)
    secret = data.parent / "password"
    secret.write_text(password, encoding="utf-8")
    if os.geteuid() == 0:
        _let_in(data.parent)
        for path in (data.parent, secret):
            shutil.chown(path, "postgres", "postgres")
    options = ["-U", user, "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8"]
    _run("initdb", "-D", str(data), "--no-sync", *options)
    secret.unlink()
    for statement in statements:
        _run("postgres", "--single", "-D", str(data), "postgres", text=statement + "\n")


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run a server whose data are in a folder.

    Args:
        folder: Empty.

    Yields:
        URI of its database for SQLAlchemy.
    """
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
    ask = [str(programs() / "psql"), "-h", str(folder), "-p", port, "-U", "mlflow", "-d", "runs", "-c", "select 1"]
    try:
        wait_until(lambda: not subprocess.run(ask, capture_output=True).returncode, 60)
        yield f"postgresql+psycopg://mlflow:secret@127.0.0.1:{port}/runs"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


def _run(program: str, *words: str, text: str = "") -> None:
    command = [str(programs() / program), *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd="/", **unprivileged())
    assert not done.returncode and "ERROR:" not in done.stderr, f"{program} failed: {done.stderr.strip()[-500:]}"


def _let_in(folder: Path) -> None:
    """Let PostgreSQL's user go through the folders of a test, which are pytest's; no others are opened."""
    temporary = Path(tempfile.gettempdir())
    for path in (folder, *folder.parents):
        if temporary in path.parents and path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | 0o001)
