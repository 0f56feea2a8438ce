"""Writing and reading a release folder."""

import hashlib
import shutil
import subprocess

import pytest

from pipeline.export import release
from pipeline.export.release import read_release, write_release


def test_checksums_match_the_files_and_sha256sum_accepts_them(tmp_path):
    write_release(tmp_path, {"model.onnx": b"one", "card.md": b"two"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "card.md", "model.onnx"]
    digests = [hashlib.sha256(content).hexdigest() for content in (b"one", b"two")]
    expected = f"{digests[0]}  model.onnx\n{digests[1]}  card.md\n"
    assert (tmp_path / "SHA256SUMS").read_bytes() == expected.encode()
    if tool := shutil.which("sha256sum"):
        subprocess.run([tool, "-c", "SHA256SUMS"], cwd=tmp_path, check=True)
        (tmp_path / "model.onnx").write_bytes(b"One")
        assert subprocess.run([tool, "-c", "SHA256SUMS"], cwd=tmp_path, check=False).returncode


def test_an_interrupted_write_leaves_no_checksums(tmp_path, monkeypatch):
    write_release(tmp_path, {"a": b"old", "b": b"old"})

    def full_disk(path, write):
        if path.name == "b":
            raise OSError("disk full")
        write(path)

    monkeypatch.setattr(release, "write_atomically", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_release(tmp_path, {"a": b"new", "b": b"new"})
    assert not (tmp_path / "SHA256SUMS").exists()


def test_files_of_an_earlier_release_are_removed_and_other_files_stay(tmp_path):
    write_release(tmp_path, {"model.onnx": b"one", "model.int8.onnx": b"two"})
    (tmp_path / "notes.txt").write_text("mine")
    write_release(tmp_path, {"model.onnx": b"three"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "model.onnx", "notes.txt"]
    assert read_release(tmp_path) == {"model.onnx": b"three"}
