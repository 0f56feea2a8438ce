"""What README, docs and presets promise exists."""

import re
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from typer.main import get_command

from docs.make_params import PAGE, page
from pipeline.cli.commands import app
from pipeline.config import Data
from pipeline.data import layout, published
from pipeline.data.sources import read_source
from pipeline.losses import registry
from pipeline.stage.params_file import load
from pipeline.stage.params_problems import keys
from pipeline.stage.presets import COMPLETE, names, preset_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
page_of = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@page_of
def test_every_page_is_linked_from_the_readme_and_has_lines_that_fit(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert path.name == "README.md" or f"](docs/{path.name})" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in lines if len(line) > 132 and line[0] not in "|$ "] == []


def test_every_make_target_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:`|\$ |=\S+ )make ([a-z][a-z-]*)", TEXT))
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "test-stack", "ui", "lint"} <= named
    assert named <= targets


def test_every_command_is_named_and_every_named_one_exists() -> None:
    named = set(re.findall(r"`smaller-student ([a-z]+)|\$ smaller-student ([a-z]+)", TEXT))
    assert {one or other for one, other in named} == set(get_command(app).commands)


@page_of
def test_yaml_blocks_fit_into_the_default_params(path: Path, tmp_path: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
        params = load(ROOT / "params.yaml").model_dump()
        for section, content in YAML(typ="safe", pure=True).load(block).items():
            for key, value in content.items():
                params[section][key] = params[section][key] | value if isinstance(value, dict) else value
        changed = tmp_path / "params.yaml"
        YAML().dump(params, changed)
        load(changed)


def test_every_key_that_is_named_exists() -> None:
    sections = "data|teacher|student|surgery|export|benchmark|runtime|tracking|retrain"
    named = set(re.findall(rf"`-?((?:{sections})\.[a-z_.]+)[`:]", TEXT))
    assert named
    assert {name for name in named if not name.endswith(".py")} <= set(keys())


@page_of
def test_every_picture_and_file_that_is_linked_exists(path: Path) -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8"))
    assert [name for name in linked if not (path.parent / name).is_file()] == []


@page_of
def test_every_source_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:pipeline|stages|tests|docker|presets|evidence)/[\w/.-]*)`", text))
    local = {"docker/secrets", "docker/.env"}  # written by `make up`
    assert [name for name in named - local if not (ROOT / name).exists()] == []


def test_the_reference_of_params_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


@pytest.mark.parametrize("name", names(ROOT))
def test_every_preset_is_valid_and_says_what_it_takes(name: str, tmp_path: Path) -> None:
    text = preset_text(ROOT, name)
    (tmp_path / "params.yaml").write_text(text)
    load(tmp_path / "params.yaml")
    head = text.split("\n\n")[0]
    assert all(f"# {word}" in head for word in ("Command", "Time", "Result"))


def test_the_params_file_of_the_repository_is_the_complete_preset() -> None:
    assert (ROOT / "params.yaml").read_bytes() == preset_text(ROOT, COMPLETE).encode()


def example(page: str, start: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(start)]
    return block


def test_the_layout_of_the_docs_reads_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "query", "gallery"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0002_c1_000451.jpg").touch()
    monkeypatch.delitem(layout.LAYOUTS, "myset", raising=False)  # so that it is removed afterwards
    exec(example("own-data.md", "_MYSET_NAME"), vars(published).copy())
    found = read_source(Data.model_construct(source="myset", unlabelled=[]), tmp_path).items
    assert [(item.path, item.identity, item.camera) for item in found] == [
        (f"{split}/0002_c1_000451.jpg", "0002", "c1") for split in ("train", "query", "gallery")
    ]


def test_the_loss_of_the_docs_is_a_mean_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    exec(example("method.md", '"""Distances'), {"__name__": "pipeline.losses.relations"})
    student, teacher = torch.eye(2), torch.ones(2, 2)
    settings = {"weight": 2.0, "power": 2.0}
    assert float(registry._LOSSES["relations"].bind(settings)(student, teacher, torch.arange(2))) == pytest.approx(1.0)
