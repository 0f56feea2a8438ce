"""The packages have common names, so only a checkout is installed, never a copy in site-packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.imports import ROOT


def build(function: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    code = f"import hatchling.build; hatchling.build.{function}(sys.argv[1])"
    words = [sys.executable, "-c", f"import sys; {code}", str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_wheel_is_refused_with_the_remedy(tmp_path: Path) -> None:
    done = build("build_wheel", tmp_path)
    assert done.returncode
    assert "smaller-student runs from a checkout only: clone it, then `make setup` or `pip install -e .`" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_editable_install_adds_a_path_and_no_package(tmp_path: Path) -> None:
    assert build("build_editable", tmp_path).returncode == 0
    (wheel,) = tmp_path.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if not name.startswith("smaller_student-")] == ["_editable_impl_smaller_student.pth"]
