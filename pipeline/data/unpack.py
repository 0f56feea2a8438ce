"""Unpack archives of data sets: regular files only, and nothing at all if any entry is unsafe.

`tarfile` and `zipfile` extract. Before that, the headers of all entries are checked for what these modules do not
guarantee: types, names and sizes. Links are refused, so the bypasses of tarfile's filter that were fixed in 2025
(CVE-2025-4517, -4330 and -4138 need links) are impossible in any patch release of Python.
"""

import gzip
import lzma
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from pipeline.data.manifest import DataError
from pipeline.progress import track

MAX_FILES = 5_000_000
MAX_BYTES = 2**40
MAX_RATIO, FREE_BYTES = 100, 2**28
"""Images hardly compress: an archive that unpacks to more than MAX_RATIO times its size + FREE_BYTES is a bomb."""
MAX_HEADER = 2**20
"""Bytes of an extended tar header, which tarfile reads into memory completely."""
READ_ERRORS = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, RuntimeError, UnicodeError),  # RuntimeError: encrypted
)
"""Exceptions of `tarfile` and `zipfile` for damaged or unsupported archives."""
Entry = tuple[str, int, str]
"""Name (a folder's ends with a slash), size in bytes, and why its type is refused ("" if it is not)."""


def unpack(archive: Path, target: Path) -> int:
    """Unpack a .zip or .tar file (gz, bz2 and xz too) into a new folder, which appears when all files are complete.

    Returns:
        Number of files.

    Raises:
        FileExistsError: If the folder exists.
        FileNotFoundError: If the archive does not exist.
        DataError: If it is damaged, not an archive, or has an unsafe entry; nothing is left behind then.
    """
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists; name a new folder, or remove it")
    if not archive.is_file():
        raise FileNotFoundError(f"there is no file {archive}; check the path of the archive")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch) / "unpacked"
        folder.mkdir()
        with archive.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # zipfile.is_zipfile also takes a tar whose last file is a zip
        try:
            count = _unzip(archive, folder) if is_zip else _untar(archive, folder)
        except READ_ERRORS as error:
            raise DataError(f"{archive} is damaged or of an unsupported format: {error}") from error
        folder.rename(target)
    return count


def _unzip(archive: Path, folder: Path) -> int:
    try:
        zipped = zipfile.ZipFile(archive, metadata_encoding="utf-8")  # many tools write UTF-8 without its flag
    except UnicodeDecodeError:
        zipped = zipfile.ZipFile(archive)
    with zipped:
        infos = zipped.infolist()
        _check(archive, [_zip_entry(info) for info in infos])
        for info in track(infos, len(infos), "unpacking"):
            zipped.extract(info, folder)  # writes at most the size in the header, and checks the checksum
    return sum(not info.is_dir() for info in infos)


def _zip_entry(info: zipfile.ZipInfo) -> Entry:
    refusal = ""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile decompresses only these in bounded chunks: a few kilobytes of bzip2 would fill the memory.
        raise zipfile.BadZipFile(f"compression {info.compress_type} of {info.filename!r}; repack it with deflate")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        refusal = "is a link or a device"
    elif info.orig_filename != info.filename:  # zipfile cuts a name at a zero byte
        refusal = "hides another name"
    return info.filename.removeprefix("./"), info.file_size, refusal


def _untar(archive: Path, folder: Path) -> int:
    if not hasattr(tarfile, "data_filter"):
        raise DataError("this Python cannot extract tar files safely; use 3.11.4 or newer, or repack it as .zip")
    members, entries, total = list[tarfile.TarInfo](), list[Entry](), 0
    with tarfile.open(archive, tarinfo=_Header) as tarred:
        for member in tarred:
            total += member.size
            _check_size(archive, len(entries), total)  # detects a compressed bomb while its headers are read
            name = member.name.removeprefix("./")
            if member.type == b"V" or (member.isdir() and name in ("", ".")):  # the volume label, or the root folder
                continue
            allowed = member.isdir() or (member.isreg() and not member.issparse())
            refusal = "" if allowed else "is a link or a device, or sparse"
            entries.append((f"{name}/" if member.isdir() else name, member.size, refusal))
            members.append(member)
        _check_end(tarred)
        _check(archive, entries)
        checked = track(members, len(members), "unpacking")
        tarred.extractall(folder, checked, filter=_content_only)  # noqa: S202 - checked and filtered
    return sum(member.isreg() for member in members)


class _Header(tarfile.TarInfo):
    """A tar header whose size is checked before tarfile reads its content."""

    def _block(self, count: int) -> int:
        # A negative size made an endless loop before the fix of CVE-2025-8194.
        if count < 0 or (count > MAX_HEADER and not self.isreg()):
            raise tarfile.ReadError(f"a header of {count} bytes")
        return super()._block(count)  # type: ignore[misc]


def _content_only(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Apply tarfile's filter `data`, and drop modes and times."""
    return tarfile.data_filter(member.replace(mode=None, mtime=None, deep=False), folder)  # type: ignore[arg-type]


def _check_end(tarred: tarfile.TarFile) -> None:
    """Check that nothing follows the last entry: tarfile treats a damaged header as the end of the archive."""
    assert tarred.fileobj is not None  # noqa: S101 - it is open
    tarred.fileobj.seek(tarred.offset)
    if tarred.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {tarred.offset}")
    while tarred.fileobj.read(2**20):  # to the end, where the checksum of a compressed archive is
        pass


def _check_size(archive: Path, count: int, total: int) -> None:
    size = archive.stat().st_size
    if count > MAX_FILES or total > min(MAX_BYTES, MAX_RATIO * size + FREE_BYTES):
        raise DataError(
            f"{archive} of {size} bytes unpacks to {count} files and {total} bytes or more, like a decompression bomb; "
            "unpack it by hand if you trust it"
        )


def _check(archive: Path, entries: list[Entry]) -> None:
    """Check that every entry is a plain file or folder below the target."""
    _check_size(archive, len(entries), sum(size for _, size, _ in entries))
    files, folders = set[str](), set[str]()
    for name, _, refusal in entries:
        if problem := refusal or _name_problem(name):
            raise DataError(f"{archive}: {name!r} {problem}; nothing was unpacked")
        key = unicodedata.normalize("NFC", name).lower()
        if key in files:
            raise DataError(
                f"{archive}: {name!r} and another name are the same file on some systems; nothing was unpacked"
            )
        folders.update(map(str, PurePosixPath(key).parents))
        (folders if key.endswith("/") else files).add(key.rstrip("/"))
    if both := files & folders:
        raise DataError(f"{archive}: {min(both)!r} is a file and a folder; nothing was unpacked")


def _name_problem(name: str) -> str:
    """Return why a name is unsafe on some operating system, or ""."""
    parts = name.removesuffix("/").split("/")
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        return "is an absolute path"
    if "\\" in name:
        return "has a backslash"
    if any(part in ("..", ".", "") for part in parts):
        return "is not a path below the folder"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return "has control characters or is not Unicode"
    if len(name) > 4000 or any(len(part.encode()) > 255 for part in parts):
        return "is too long"
    return ""
