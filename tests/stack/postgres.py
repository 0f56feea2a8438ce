"""A PostgreSQL server for the time of some tests, from the system's own package."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def programs() -> Path:
    """Folder of the server's programs; Debian keeps them out of the PATH."""
    there = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    found = [Path(path).parent for path in there if path]
    assert found, "PostgreSQL is not installed; the package is called postgresql"
    return found[-1]


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run a server whose data are in a folder.

    Args:
        folder: Empty.

    Yields:
        URI of its database for SQLAlchemy.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    who: list[str] = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        for path in (folder, *folder.parents):
            if path.owner() == "root" and not path.stat().st_mode & 0o001:
                path.chmod(path.stat().st_mode | 0o011)
        shutil.chown(folder, "postgres")
        who = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    subprocess.run(
        [*who, str(programs() / "initdb"), "-D", str(data), "-U", "mlflow", "-A", "trust", "--no-sync"],
        check=True, capture_output=True, cwd="/",
    )  # fmt: skip
    control = [*who, str(programs() / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd="/")
    try:
        yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "fast", "stop"], check=True, stdout=subprocess.DEVNULL, cwd="/")
