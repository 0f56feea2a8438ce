"""Every layout through DVC: stage `prepare` on a miniature of each, and all six stages on two of them."""

import csv
import os
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.files import Files
from pipeline.flow.refresh import check_incoming, refresh
from pipeline.stage.params_file import load
from tests import layouts
from tests.test_end_to_end import checkout, metrics, repro

TRAIN, TEST = 10, 5
WHOLE = ("cub200", "csv")
"""Layouts that all stages run on: one where all images ask each other, one of one's own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("sources"))


def choose(folder: Path, source: str) -> None:
    """A miniature in data/, and the params that a user would set."""
    shutil.rmtree(folder / "data" / source, ignore_errors=True)
    layouts.LAYOUTS[source](folder / "data" / source, TRAIN, TEST)
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["data"] |= {"source": source, "root": f"data/{source}", "protocol": layouts.PROTOCOLS.get(source, "market")}
    yaml.dump(params, folder / "params.yaml")


@pytest.mark.parametrize("source", layouts.LAYOUTS)
def test_each_layout_is_prepared(folder: Path, source: str) -> None:
    choose(folder, source)
    done = repro(folder, "prepare")
    assert done.returncode == 0, done.stdout
    found = metrics(folder, "prepare")
    listed = list(csv.DictReader((folder / "artifacts/prepare/manifest.csv").open()))
    assert len(listed) == found["images"] == sum(found[name] for name in ("train", "validation", "query", "gallery"))
    extra = 2 if source == "market1501" else 0  # junk and distractors
    assert found["identities"] == TRAIN + TEST + extra
    assert found["validation"] > 0 and found["quarantined"] == found["leaked"] == 0
    assert bool(found["gallery"]) is (source not in ("vehicleid", "cub200", "sop"))


def test_what_comes_in_with_a_table_is_prepared_too(folder: Path) -> None:
    choose(folder, "csv")
    assert repro(folder, "prepare").returncode == 0
    before = metrics(folder, "prepare")
    layouts.table(folder / "incoming", TRAIN + 2, TEST)  # lists again what is there
    for path in (folder / "incoming").iterdir():
        os.utime(path, (1, 1))
    params = load(folder / "params.yaml")
    check_incoming(Files(folder, folder), params)
    assert len(refresh(Files(folder, folder), params)) == 2 * 3 * 2
    done = repro(folder, "prepare")
    assert done.returncode == 0, done.stdout
    found = metrics(folder, "prepare")
    assert found["images"] == before["images"] + 2 * 3 * 2 and found["identities"] == before["identities"] + 2


@pytest.mark.parametrize("source", WHOLE)
def test_all_stages_run(folder: Path, source: str) -> None:
    choose(folder, source)
    done = repro(folder)
    assert done.returncode == 0, done.stdout
    teacher, export = metrics(folder, "teacher"), metrics(folder, "export")
    assert 0 < teacher["map"] <= 1 and export["map_teacher"] == pytest.approx(teacher["map"], abs=1e-4)
    assert ("recall" in teacher) is (source == "cub200")
    page = (folder / "artifacts/benchmark/report/index.html").read_text()
    assert f"protocol {'loo' if source == 'cub200' else 'market'}" in page
    assert "images asked of each other" in page if source == "cub200" else "queries" in page
