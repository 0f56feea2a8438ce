"""A checkout of its own for experiments that start from the last commit."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.imports import ROOT


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Clone the working tree, commit it, and remove the results."""
    folder = tmp_path / "checkout"
    git(tmp_path, "clone", "-q", str(ROOT), str(folder))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in tracked:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    shutil.rmtree(folder / "evidence", ignore_errors=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "working tree")
    return folder
