"""The folder that leaves the building: files, and their SHA-256 in the format of `sha256sum`."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipeline.files import write_atomically, write_text

SUMS = "SHA256SUMS"


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def write_release(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files and then SHA256SUMS: a folder without it was not finished.

    Args:
        folder: Where they go.
        files: Content by file name.
    """
    (folder / SUMS).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
    write_text(folder / SUMS, "".join(f"{sha256(content)}  {name}\n" for name, content in files.items()))
