"""What README and presets promise exists."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from pipeline.cli.commands import app
from pipeline.config import Params
from pipeline.stage.params_file import keys, load
from pipeline.stage.presets import COMPLETE, names, preset_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_make_target_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:`|\$ |=\S+ )make ([a-z][a-z-]*)", README))
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "test-stack", "ui", "lint"} <= named
    assert named <= targets


def test_every_command_that_is_named_exists() -> None:
    named = set(re.findall(r"smaller-student ([a-z]+)", README))
    assert named
    assert named <= set(get_command(app).commands)


def test_yaml_blocks_fit_into_the_default_params() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        params = load(ROOT / "params.yaml").model_dump()
        for section, content in YAML(typ="safe", pure=True).load(block).items():
            params[section] |= content
        Params.model_validate(params)


def test_every_key_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:data|teacher|student|surgery|export|benchmark|runtime)\.[a-z_.]+)[`:]", README))
    assert named
    assert named <= set(keys())


def test_every_picture_and_file_that_is_linked_exists() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert linked
    assert [name for name in linked if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", names(ROOT))
def test_every_preset_is_valid_and_says_what_it_takes(name: str, tmp_path: Path) -> None:
    text = preset_text(ROOT, name)
    (tmp_path / "params.yaml").write_text(text)
    load(tmp_path / "params.yaml")
    head = text.split("\n\n")[0]
    assert all(f"# {word}" in head for word in ("Command", "Time", "Result"))


def test_the_params_file_of_the_repository_is_the_complete_preset() -> None:
    assert (ROOT / "params.yaml").read_bytes() == preset_text(ROOT, COMPLETE).encode()
