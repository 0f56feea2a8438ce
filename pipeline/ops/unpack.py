"""Unpacks archives of data sets: regular files inside of a new folder, or nothing at all.

Python's own extractors have let links and odd names out of the folder more than once; here every entry is judged before
anything is written, links and devices are refused, and only content is taken over, not modes or owners.
"""

import gzip
import lzma
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.data.manifest import DataError
from pipeline.progress import track

MOST_FILES = 5_000_000
"""Entries of an archive."""
MOST_BYTES = 2**40
"""Bytes of all files together."""
RATIO, SPARE = 100, 2**28
"""Pictures hardly shrink: what unpacks to more than so many times the archive's bytes, and these more, is a bomb."""
CHUNK = 2**20

LONGEST_HEADER = 2**20
"""Bytes of a tar's extended header, which is read as a whole before anything else is known."""
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, RuntimeError, UnicodeError),  # RuntimeError: compressed in a way that zipfile does not know
)
"""What Python's readers raise where an archive is damaged or of a kind that they do not know."""

Reader = Callable[[], AbstractContextManager[IO[bytes]]]


@dataclass(frozen=True)
class Entry:
    """A file in an archive.

    Attributes:
        name: As the archive has it.
        size: In bytes, as the archive says.
        refusal: Why it must not be unpacked; empty where it may.
        folder: Whether it is a folder.
        read: Opens it.
    """

    name: str
    size: int
    refusal: str
    folder: bool
    read: Reader


def unpack(archive: Path, target: Path) -> int:
    """Unpack a .zip or .tar file (gz, bz2 and xz too) into a new folder.

    Args:
        archive: The file.
        target: Folder to make; it appears when all is there.

    Returns:
        Number of files.

    Raises:
        FileExistsError: If the folder exists.
        FileNotFoundError: If there is no such archive.
        DataError: If it is none, is damaged, or holds what must not be unpacked; nothing is left behind then.
    """
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists; name a folder that does not, or remove it")
    if not archive.is_file():
        raise FileNotFoundError(f"there is no file {archive}")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with _opened(archive) as entries:
            count = _write(archive, entries, folder)
        folder.chmod(0o755)
        folder.rename(target)
    except DAMAGE as error:
        raise DataError(f"{archive} is damaged or of an unknown kind: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return count


def _write(archive: Path, entries: list[Entry], folder: Path) -> int:
    """Judge all entries, then write them."""
    _judge(archive, entries)
    files = [entry for entry in entries if not entry.folder]
    for entry in track(files, len(files), "unpacking"):
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with entry.read() as source, path.open("xb") as sink:
            left = entry.size
            while chunk := source.read(CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise DataError(f"{archive}: {entry.name!r} is larger than it says")
                sink.write(chunk)
        if left:
            raise DataError(f"{archive}: {entry.name!r} is {left} bytes shorter than it says")
    return len(files)


def _judge(archive: Path, entries: list[Entry]) -> None:
    """Refuse an archive as a whole where one entry is not a plain file inside of the folder."""
    size = archive.stat().st_size
    total = sum(entry.size for entry in entries)
    if len(entries) > MOST_FILES or total > MOST_BYTES:
        raise DataError(f"{archive} holds {len(entries)} entries of {total} bytes; that is no data set of pictures")
    if total > RATIO * size + SPARE:
        raise DataError(f"{archive} unpacks from {size} to {total} bytes, as bombs do; unpack it by hand if it is none")
    seen, names = dict[str, str](), set[str]()
    files = {entry.name for entry in entries if not entry.folder}
    for entry in entries:
        if why := entry.refusal or _odd(entry.name):
            raise DataError(f"{archive}: {entry.name!r} {why}; nothing was unpacked")
        parts = entry.name.rstrip("/").split("/")
        if any("/".join(parts[:depth]) in files for depth in range(1, len(parts))):
            raise DataError(f"{archive}: {entry.name!r} lies in a file; nothing was unpacked")
        if entry.folder:
            continue
        other = seen.setdefault(unicodedata.normalize("NFC", entry.name).lower(), entry.name)
        if other != entry.name or entry.name in names:
            raise DataError(f"{archive}: {entry.name!r} and {other!r} would be one file on some systems")
        names.add(entry.name)


def _odd(name: str) -> str:
    """Why a name is not that of a file below the folder; empty where it is."""
    parts = name.rstrip("/").split("/")
    if name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":"):
        return "is an absolute path"
    if "\\" in name:
        return "has a backslash"
    if any(part in ("..", ".", "") for part in parts):
        return "does not name a place below the folder"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "has control characters"
    if any(len(part.encode(errors="surrogateescape")) > 255 for part in parts) or len(name) > 4000:
        return "is too long"
    with suppress(UnicodeEncodeError):
        name.encode()
        return ""
    return "is no Unicode"


@contextmanager
def _opened(archive: Path) -> Iterator[list[Entry]]:
    with archive.open("rb") as file:
        kind = file.read(2)
    if kind == b"PK":
        with zipfile.ZipFile(archive) as zipped:
            yield [_zipped(zipped, info) for info in zipped.infolist()]
    else:
        with tarfile.open(archive, tarinfo=_Header) as tarred:
            yield list(_tarred(tarred, archive))


def _zipped(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    mode = info.external_attr >> 16
    refusal = ""
    if info.flag_bits & 1:
        refusal = "is encrypted"
    elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        refusal = "is a link or a device"
    elif info.orig_filename != info.filename:
        refusal = "hides another name"
    name = info.orig_filename
    if not info.flag_bits & 0x800:  # said to be in an old code page, and often UTF-8 all the same
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return Entry(name.removeprefix("./"), info.file_size, refusal, info.is_dir(), lambda: file.open(info))


class _Header(tarfile.TarInfo):
    """A header that is not read where it would fill the memory."""

    def _proc_member(self, file: tarfile.TarFile) -> tarfile.TarInfo:
        extended = not (self.isreg() or self.isdir() or self.issym() or self.islnk() or self.isdev())
        if extended and self.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(file)  # type: ignore[misc]


def _tarred(file: tarfile.TarFile, path: Path) -> Iterator[Entry]:
    size, total = path.stat().st_size, 0
    for number, info in enumerate(file):  # a compressed bomb shows itself while its list is read
        total += info.size + tarfile.BLOCKSIZE
        if number >= MOST_FILES or total > min(MOST_BYTES, RATIO * size + SPARE):
            raise DataError(f"{path} unpacks from {size} to more than {total} bytes or {number} files, as bombs do")
        name = info.name.removeprefix("./")
        if info.type == b"V" or (info.isdir() and name in ("", ".")):  # the archive's own label, or its root
            continue
        refusal = "" if info.isreg() or info.isdir() else "is a link or a device"
        if info.issparse():
            refusal = "is sparse"

        def read(info: tarfile.TarInfo = info) -> AbstractContextManager[IO[bytes]]:
            opened = file.extractfile(info)
            if opened is None:
                raise DataError(f"{info.name!r} cannot be read")
            return opened

        yield Entry(name, info.size if info.isreg() else 0, refusal, info.isdir(), read)
    _end(file)


def _end(file: tarfile.TarFile) -> None:
    """Make sure that the list of files ended because there were no more: Python stops at a damaged header too."""
    if file.fileobj is None:
        raise tarfile.ReadError("closed")
    file.fileobj.seek(file.offset)
    if file.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {file.offset}")
    while file.fileobj.read(CHUNK):  # to its end, where check sums are
        pass
