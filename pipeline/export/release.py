"""A release folder: its files, and SHA256SUMS in the format of `sha256sum`.

A file is read only if its hash matches SHA256SUMS; nothing is parsed before that.
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
    """A release folder is incomplete, damaged, or was not written by this package."""

    exit_code = 4


def sha256(content: bytes) -> str:
    """Return the hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def write_release(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name, then SHA256SUMS; remove the files of an earlier release.

    SHA256SUMS comes last, so a folder without it is an interrupted write.
    """
    try:
        earlier = set(read_sums(folder))
    except ReleaseError:  # there was no release, or its writing was interrupted
        earlier = set()
    (folder / SUMS).unlink(missing_ok=True)
    for name in earlier - set(files):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
    write_text(folder / SUMS, _render({name: sha256(content) for name, content in files.items()}))


def read_sums(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS as a mapping of file name to SHA-256.

    Raises:
        ReleaseError: If it is missing or damaged.
    """
    path = folder / SUMS
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"cannot read {path} ({error.strerror}); without it the release is incomplete") from None
    text = raw.decode("ascii", errors="replace")
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    if _render(sums) != text or not sums or not all(map(_is_plain_name, sums)):
        raise ReleaseError(f"{path} is damaged; download the folder again")
    return sums


def read_checked(folder: Path, name: str) -> bytes:
    """Read one file of a release and check its hash.

    Raises:
        ReleaseError: If it is missing, not part of the release, or its hash differs.
    """
    return _read(folder, name, read_sums(folder))


def read_release(folder: Path) -> dict[str, bytes]:
    """Read all files of a release and check their hashes; other files in the folder are ignored.

    Raises:
        ReleaseError: If a file is missing or its hash differs.
    """
    sums = read_sums(folder)
    return {name: _read(folder, name, sums) for name in sums}


def _read(folder: Path, name: str, sums: Mapping[str, str]) -> bytes:
    if name not in sums:
        raise ReleaseError(f"{name} is not listed in {folder / SUMS}; listed are {', '.join(sums)}")
    path = folder / name
    try:
        if not S_ISREG(path.stat().st_mode):  # reading a device or a pipe may never end
            raise ReleaseError(f"{path} is not a regular file; download the folder again")
        content = path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"cannot read {path} ({error.strerror}); download the folder again") from None
    if sha256(content) != sums[name]:
        raise ReleaseError(
            f"{path} is damaged: its SHA-256 is {sha256(content)[:12]}... and should be {sums[name][:12]}...; "
            "download the folder again"
        )
    return content


def _render(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def _is_plain_name(name: str) -> bool:
    """Return whether the name stays inside the folder."""
    return name == Path(name).name and name not in ("", ".", "..") and "\\" not in name
