"""The folder that leaves the building: files, and their SHA-256 in the format of `sha256sum`.

Nothing of it is parsed before its hash is the one that was written.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from stat import S_ISREG

from pipeline.files import write_atomically, write_text

SUMS = "SHA256SUMS"
STUDENT, ALL_IN_ONE, INT8, TEACHER = "model.onnx", "model.allinone.onnx", "model.int8.onnx", "teacher.onnx"


class ReleaseError(RuntimeError):
    """A folder is not what was written."""

    exit_code = 4


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def write_release(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files and then SHA256SUMS: a folder without it was not finished. Files of an earlier release go.

    Args:
        folder: Where they go.
        files: Content by file name.
    """
    try:
        earlier = set(read_sums(folder))
    except ReleaseError:  # there was none, or it was not finished
        earlier = set()
    (folder / SUMS).unlink(missing_ok=True)
    for name in earlier - set(files):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
    write_text(folder / SUMS, _render({name: sha256(content) for name, content in files.items()}))


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, as written.

    Raises:
        ReleaseError: If the folder has none, or they are damaged.
    """
    path = folder / SUMS
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read ({error.strerror}); a folder without it was not finished") from None
    text = raw.decode("ascii", errors="replace")
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    if _render(sums) != text or not sums or not all(map(_plain, sums)):
        raise ReleaseError(f"{path} is damaged; get the folder again from where it came")
    return sums


def read_checked(folder: Path, name: str) -> bytes:
    """Content of one file of a release, whose hash is the one that was written.

    Raises:
        ReleaseError: If it is missing, not part of the release, or another.
    """
    return _read(folder, name, read_sums(folder))


def read_release(folder: Path) -> dict[str, bytes]:
    """Content of all files that belong to a release; others in the folder are left alone.

    Raises:
        ReleaseError: As `read_checked`.
    """
    sums = read_sums(folder)
    return {name: _read(folder, name, sums) for name in sums}


def _read(folder: Path, name: str, sums: Mapping[str, str]) -> bytes:
    if name not in sums:
        raise ReleaseError(f"{folder / SUMS} names no {name}; it names {', '.join(sums)}")
    path = folder / name
    try:
        if not S_ISREG(path.stat().st_mode):  # a device or a pipe may never end
            raise ReleaseError(f"{path} is no plain file; get the folder again from where it came")
        content = path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read ({error.strerror}); get the folder again") from None
    if sha256(content) != sums[name]:
        raise ReleaseError(
            f"{path} is damaged: SHA-256 {sha256(content)[:12]}..., written was {sums[name][:12]}...; get "
            "the folder again from where it came"
        )
    return content


def _render(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def _plain(name: str) -> bool:
    """Whether it names a file in the folder itself."""
    return name == Path(name).name and name not in ("", ".", "..") and "\\" not in name
