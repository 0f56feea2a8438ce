"""Every command and every Python block of README and docs, run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import ROOT
from tests.layouts import LAYOUTS
from tests.test_end_to_end import checkout

pytestmark = pytest.mark.stack

NOT_RUN = {
    "source .venv/bin/activate": "the tests have their environment",
}
ENDS_WITH = {
    "smaller-student rollback": 3,  # there was only one champion
    "smaller-student rollback --to 3": 3,  # nor a version 3
}
"""Exit codes other than 0 on a checkout that has been published once."""


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Commands of the console blocks, without their comments."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [re.split(r"\s+# ", line)[0].removeprefix("$ ") for line in lines]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Git checkout with the smoke preset, all stages of which have run."""
    root = checkout(tmp_path_factory.mktemp("docs"))
    assert run(root, "dvc repro")[0] == 0
    query = next((root / "artifacts/prepare/vehicles/image_query").glob("*.jpg"))
    shutil.copy(query, root / "query.jpg")
    LAYOUTS["folder"](root / "data" / "mine", 10, 5)
    for key in ("name", "email"):
        assert run(root, f"git config user.{key} test@example.org")[0] == 0
    return root


def run(root: Path, command: str, timeout: float = 300) -> tuple[int, str]:
    """Run a command as a person would, in a shell with this environment; make only shows what it would do."""
    scripts = str(Path(sys.executable).parent)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))},
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "PYTHONPATH": str(root),
        "PREFECT_HOME": str(root / ".prefect"),
    }
    command = re.sub(r"^make ", f"make -n VENV={Path(scripts).parent} ", command)
    command = command.replace("smaller-student ", f"{sys.executable} -m pipeline ")
    done = subprocess.run(
        command, shell=True, cwd=root, env=environment, timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(root: Path, page: Path) -> None:
    params = (root / "params.yaml").read_text()
    shutil.rmtree(root / "model", ignore_errors=True)
    for command in commands(page):
        if command in NOT_RUN:
            continue
        if command.startswith("smaller-student serve"):  # it serves until it is stopped
            code, out = run(root, f"timeout 30 {command} --port 0")
            assert code == 124 and "http://127.0.0.1:" in out, out
            continue
        code, out = run(root, command)
        assert code == ENDS_WITH.get(command, 0), f"$ {command}\n{out}"
    (root / "params.yaml").write_text(params)


def test_the_python_block_of_the_readme_embeds_a_picture(root: Path) -> None:
    if not (root / "model").is_dir():
        assert run(root, "smaller-student publish")[0] in (0, 4)  # 4: another one stays champion
        assert run(root, "smaller-student pull")[0] == 0
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    code, out = run(root, f"{sys.executable} -c {subprocess.list2cmdline([block + 'print(embedding.shape)'])!s}")
    assert (code, out.splitlines()[-1]) == (0, "(1, 32)")
