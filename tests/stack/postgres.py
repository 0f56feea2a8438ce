"""A PostgreSQL server for the time of some tests, from the system's own package."""

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.ops.cluster import initialise, owner, programs
from tests.fake_stages import wait_until


def let_in(folder: Path) -> None:
    """Let PostgreSQL's user go through the folders of a test, which are pytest's; no others are opened."""
    temporary = Path(tempfile.gettempdir())
    if os.geteuid() != 0:
        return
    for path in (folder, *folder.parents):
        if temporary in path.parents and path.stat().st_uid == os.geteuid() and not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o001)


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
    let_in(folder)
    initialise(data, "mlflow", "secret", ["CREATE DATABASE runs;"])
    settings = ("listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off")
    options = [word for setting in settings for word in ("-c", setting)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [str(programs() / "postgres"), "-D", str(data), "-p", port, *options],
            stdout=log, stderr=log, cwd="/", **owner(data),
        )  # fmt: skip
    ask = [str(programs() / "psql"), "-h", str(folder), "-p", port, "-U", "mlflow", "-d", "runs", "-c", "select 1"]
    try:
        wait_until(lambda: not subprocess.run(ask, capture_output=True).returncode, 60)
        yield f"postgresql+psycopg://mlflow:secret@127.0.0.1:{port}/runs"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
