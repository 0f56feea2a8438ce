"""Unpacking archives: plain ones, damaged ones, and attempts to write outside the target folder."""

import io
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.data import unpack as module
from pipeline.data.manifest import DataError
from pipeline.data.unpack import unpack
from tests import layouts


def zipped(path, *names, content=b"x", change=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            info = zipfile.ZipInfo("placeholder")
            info.compress_type = zipfile.ZIP_DEFLATED
            info.filename = info.orig_filename = name
            if change:
                change(info)
            file.writestr(info, content)
    return path


def tarred(path, *entries, content=b"x", mode="w"):
    with tarfile.open(path, mode) as file:
        for name, kind, link in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(content) if info.size else None)
    return path


def link(info):
    info.external_attr = 0o120777 << 16


def device(info):
    info.external_attr = 0o020666 << 16


def too_small_size(path):
    zipped(path, "a.jpg", content=b"0" * 1000)
    raw = path.read_bytes()
    for at in (raw.index(b"PK\x03\x04") + 22, raw.index(b"PK\x01\x02") + 24):
        raw = raw[:at] + struct.pack("<I", 10) + raw[at + 4 :]
    path.write_bytes(raw)
    return path


def encrypted(path):
    zipped(path, "a.jpg")
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x03\x04") + 6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    return path


def long_header(path, size):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    path.write_bytes(info.tobuf() + bytes(size + 4096))
    return path


def negative_size(path):
    """Write a header whose size leads back to its start."""
    info = tarfile.TarInfo("a.jpg")
    raw = bytearray(info.tobuf())
    raw[124:136] = tarfile.itn(-512, 12, tarfile.GNU_FORMAT)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(tarfile.TarInfo("b.jpg").tobuf() + raw + bytes(4096))
    return path


def bzip2_bomb(path):
    """Write bzip2 in a zip: 64 MB from a few bytes, with a size of ten in the header."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("a.jpg", bytes(2**26))
    raw = path.read_bytes()
    for at in (raw.index(b"PK\x03\x04") + 22, raw.index(b"PK\x01\x02") + 24):
        raw = raw[:at] + struct.pack("<I", 10) + raw[at + 4 :]
    path.write_bytes(raw)
    return path


REG, SYM, LNK, FIFO, CHR, BLK = (
    *(tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE),
    *(tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
)

ESCAPES = {
    "zip: parent": (lambda path: zipped(path, "../out.jpg"), "not a path below the folder"),
    "zip: parent further in": (lambda path: zipped(path, "a/../../out.jpg"), "not a path below the folder"),
    "zip: absolute": (lambda path: zipped(path, "/tmp/out.jpg"), "absolute path"),
    "zip: drive": (lambda path: zipped(path, "C:/out.jpg"), "absolute path"),
    "zip: backslashes": (lambda path: zipped(path, "..\\out.jpg"), "backslash"),
    "zip: share": (lambda path: zipped(path, "\\\\host\\out.jpg"), "absolute path"),
    "zip: name after zero": (lambda path: zipped(path, "a.jpg\0../out.jpg"), "hides another name"),
    "zip: newline": (lambda path: zipped(path, "a\n.jpg"), "control characters"),
    "zip: link": (lambda path: zipped(path, "a.jpg", content=b"/etc/passwd", change=link), "link or a device"),
    "zip: device": (lambda path: zipped(path, "a.jpg", change=device), "link or a device"),
    "zip: encrypted": (encrypted, "encrypted"),
    "zip: larger than its header": (too_small_size, "damaged"),
    "zip: empty part": (lambda path: zipped(path, "a//b.jpg"), "not a path below the folder"),
    "zip: long name": (lambda path: zipped(path, "a" * 256), "too long"),
    "zip: the same name in capitals": (lambda path: zipped(path, "a.jpg", "A.jpg"), "same file on some"),
    "zip: the same name in other bytes": (
        lambda path: zipped(path, "\u00fc.jpg", "u\u0308.jpg"),
        "same file on some",
    ),
    "zip: a file as folder": (lambda path: zipped(path, "a", "a/b.jpg"), "is a file and a folder"),
    "zip: a file as folder in capitals": (lambda path: zipped(path, "a/b.jpg", "A"), "is a file and a folder"),
    "zip: bzip2 fills the memory": (bzip2_bomb, "compression 12 of 'a.jpg'"),
    "zip: bomb": (lambda path: zipped(path, "a.jpg", content=bytes(2**29)), "like a decompression bomb"),
    "tar: parent": (lambda path: tarred(path, ("../out.jpg", REG, "")), "not a path below the folder"),
    "tar: absolute": (lambda path: tarred(path, ("/tmp/out.jpg", REG, "")), "absolute path"),
    "tar: link out": (lambda path: tarred(path, ("a", SYM, ".."), ("a/out.jpg", REG, "")), "link or a device"),
    "tar: link inside": (lambda path: tarred(path, ("b.jpg", REG, ""), ("a.jpg", SYM, "b.jpg")), "link or a device"),
    "tar: hard link": (lambda path: tarred(path, ("a.jpg", LNK, "/etc/passwd")), "link or a device"),
    "tar: pipe": (lambda path: tarred(path, ("a.jpg", FIFO, "")), "link or a device"),
    "tar: character device": (lambda path: tarred(path, ("a.jpg", CHR, "")), "link or a device"),
    "tar: block device": (lambda path: tarred(path, ("a.jpg", BLK, "")), "link or a device"),
    "tar: bomb": (
        lambda path: tarred(path, ("a.jpg", REG, ""), content=bytes(2**29), mode="w:xz"),
        "like a decompression bomb",
    ),
    "tar: the same name twice": (lambda path: tarred(path, ("a", REG, ""), ("a", REG, "")), "same file on some"),
    "tar: long header": (lambda path: long_header(path, 2**21), "a header of"),
    "tar: negative size": (negative_size, "a header of -512 bytes"),
    "tar: name that is no Unicode": (lambda path: tarred(path, ("\udcff.jpg", REG, "")), "not Unicode"),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_malicious_archives_are_refused_and_leave_nothing_behind(name, tmp_path):
    make, reason = ESCAPES[name]
    archive = make(tmp_path / "archive")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=reason) as error:
        unpack(archive, tmp_path / "target")
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/out.jpg").exists()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_plain_archives_are_unpacked_completely(tmp_path, ending):
    layouts.veri776(tmp_path / "veri", 2, 1)
    archive = tmp_path / f"veri.{ending}"
    files = sorted(path for path in (tmp_path / "veri").rglob("*") if path.is_file())
    if ending == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in (tmp_path / "veri").rglob("*"):
                file.write(path, path.relative_to(tmp_path))
    else:
        with tarfile.open(archive, f"w:{ending[4:]}") as file:
            file.add(tmp_path / "veri", "./veri")
    assert unpack(archive, tmp_path / "new" / "target") == len(files)
    for path in files:
        copy = tmp_path / "new" / "target" / path.relative_to(tmp_path)
        assert copy.read_bytes() == path.read_bytes() and not copy.stat().st_mode & 0o111
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["target"]
    with pytest.raises(FileExistsError, match="target exists"):
        unpack(archive, tmp_path / "new" / "target")


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 3)
    for archive in (
        zipped(tmp_path / "a.zip", "1", "2", "3", "4"),
        tarred(tmp_path / "a.tar", *[(str(n), REG, "") for n in range(4)]),
    ):
        with pytest.raises(DataError, match="like a decompression bomb"):
            unpack(archive, tmp_path / "target")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(50)])
def test_a_file_that_is_not_an_archive_is_refused(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"damaged"):
        unpack(tmp_path / "a.zip", tmp_path / "target")
    with pytest.raises(FileNotFoundError, match="no file"):
        unpack(tmp_path / "gone.zip", tmp_path / "target")


def test_a_truncated_archive_leaves_nothing_behind(tmp_path):
    archive = tarred(tmp_path / "a.tar.gz", ("a.jpg", REG, ""), content=bytes(range(256)) * 4000, mode="w:gz")
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("at", [512 + 512 + 20, 1030])
def test_a_damaged_later_header_is_not_taken_for_the_end(tmp_path, at):
    archive = tarred(tmp_path / "a.tar", *[(f"{n}.jpg", REG, "") for n in range(3)])
    raw = bytearray(archive.read_bytes())
    raw[at] ^= 1
    archive.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "target")
    archive.write_bytes(raw[:1100])
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "target")


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_a_flipped_byte_is_detected(tmp_path, ending):
    content = bytes(range(256)) * 400
    archive = tmp_path / f"a.{ending}"
    if ending == "zip":
        zipped(archive, "a.jpg", content=content)
    else:
        tarred(archive, ("a.jpg", REG, ""), content=content, mode=f"w:{ending[4:]}")
    raw = bytearray(archive.read_bytes())
    raw[len(raw) // 2] ^= 0x55
    archive.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_names_are_utf_8_even_without_the_flag(tmp_path):
    archive = zipped(tmp_path / "a.zip", "./\u00fc.jpg", "x/\u4e16.jpg")
    raw = archive.read_bytes()
    for at in [match.start() for match in re.finditer(b"PK\x03\x04", raw)]:
        raw = raw[: at + 7] + bytes([raw[at + 7] & ~8]) + raw[at + 8 :]
    for at in [match.start() for match in re.finditer(b"PK\x01\x02", raw)]:
        raw = raw[: at + 9] + bytes([raw[at + 9] & ~8]) + raw[at + 10 :]
    archive.write_bytes(raw)  # without the flag for UTF-8, as older tools write it
    unpack(archive, tmp_path / "target")
    assert {path.name for path in (tmp_path / "target").rglob("*.jpg")} == {"\u00fc.jpg", "\u4e16.jpg"}


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    inner = zipped(tmp_path / "inner.zip", "inner.txt").read_bytes()
    archive = tarred(tmp_path / "a.tar", ("images.zip", REG, ""), content=inner)
    unpack(archive, tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["images.zip"]


def test_an_unsupported_compression_is_refused(tmp_path):
    archive = zipped(tmp_path / "a.zip", "a.jpg")
    raw = bytearray(archive.read_bytes())
    for at in (raw.index(b"PK\x03\x04") + 8, raw.index(b"PK\x01\x02") + 10):
        raw[at] = 99
    archive.write_bytes(raw)
    with pytest.raises(DataError, match=r"damaged or of an unsupported format: .*compression"):
        unpack(archive, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_volume_label_is_not_a_file(tmp_path):
    archive = tarred(tmp_path / "a.tar", ("label", b"V", ""), ("a.jpg", REG, ""))
    assert unpack(archive, tmp_path / "target") == 1


def test_modes_owners_and_times_are_not_unpacked(tmp_path):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as file:
        for name, kind in (("folder", tarfile.DIRTYPE), ("folder/run.sh", REG)):
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.mtime, info.uid = kind, 0o6711, 1, 12345
            file.addfile(info)
    assert unpack(archive, tmp_path / "target") == 1
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").touch()
    for path, like in (("target", "made"), ("target/folder", "made"), ("target/folder/run.sh", "made/file")):
        actual, expected = (tmp_path / path).stat(), (tmp_path / like).stat()
        assert (actual.st_mode, actual.st_uid) == (expected.st_mode, expected.st_uid) and actual.st_mtime > 1


def test_a_python_without_tarfile_filters_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    archive = tarred(tmp_path / "a.tar", ("a.jpg", REG, ""))
    with pytest.raises(DataError, match=r"use 3\.11\.4 or newer"):
        unpack(archive, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
