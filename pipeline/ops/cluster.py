"""A PostgreSQL cluster in a folder, from the system's own package: what the image of compose.yaml does at its start."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class ClusterError(RuntimeError):
    """PostgreSQL is missing, or cannot be set up."""

    exit_code = 3


def programs() -> Path:
    """Folder of the server's programs; Debian keeps them out of the PATH.

    Raises:
        ClusterError: If there is none.
    """
    there = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    if not (found := [Path(path).parent for path in there if path]):
        raise ClusterError("PostgreSQL is not installed; the package is called postgresql")
    return found[-1]


def owner(folder: Path) -> dict[str, Any]:
    """Arguments of `subprocess` for a program of PostgreSQL's, which refuses to run as root.

    Args:
        folder: That it works in, made where it is missing; root's is given to the user that PostgreSQL has.

    Raises:
        ClusterError: If that user cannot go there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt" or os.getuid() != 0:
        return {}
    import pwd  # not on Windows

    its = pwd.getpwnam("postgres").pw_uid
    places = [(path, path.stat()) for path in folder.resolve().parents]
    closed = [str(path) for path, found in places if not found.st_mode & 0o001 and found.st_uid != its]
    if closed:
        raise ClusterError(
            f"PostgreSQL does not run as root, and its user postgres may not enter {' and '.join(closed)}: run "
            f"`chmod o+x {' '.join(closed)}`, or work as another user"
        )
    shutil.chown(folder, "postgres", "postgres")
    return {"user": "postgres", "group": "postgres", "extra_groups": []}


def initialise(data: Path, user: str, password: str, statements: Iterable[str]) -> None:
    """Make a cluster, unless it is there.

    Args:
        data: Its folder.
        user: Its superuser; who connects by the socket is believed, others need the password.
        password: Of the user.
        statements: SQL, run once.

    Raises:
        ClusterError: If a program of PostgreSQL's fails.
    """
    unfinished, secret = data.parent / "UNFINISHED", data.parent / "password"
    if (data / "PG_VERSION").exists() and not unfinished.exists():
        return
    shutil.rmtree(data, ignore_errors=True)
    as_whom = owner(data.parent)
    unfinished.touch()
    secret.touch(mode=0o600)
    if as_whom:
        shutil.chown(secret, as_whom["user"])
    secret.write_text(password + "\n", encoding="utf-8")
    options = ["-U", user, "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8"]
    try:
        _run(data, "initdb", "-D", str(data), *options)
    finally:
        secret.unlink()
    for statement in statements:
        _run(data, "postgres", "--single", "-D", str(data), "postgres", text=statement + "\n")
    unfinished.unlink()


def _run(data: Path, program: str, *words: str, text: str = "") -> None:
    command = [str(programs() / program), *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd="/", **owner(data))
    if done.returncode or "ERROR:" in done.stderr:
        raise ClusterError(f"{program} failed: {done.stderr.strip()[-500:]}")
