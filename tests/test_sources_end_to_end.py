"""Every layout with DVC: stage `prepare` on a miniature of each, and all six stages on two of them."""

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
ALL_STAGES = ("cub200", "csv")
"""Layouts that all stages run on: one in which all test images are queries, and custom data."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("sources"))


def choose(folder: Path, source: str) -> None:
    """Write a miniature to data/, and set its params."""
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
    counts = metrics(folder, "prepare")
    listed = list(csv.DictReader((folder / "artifacts/prepare/manifest.csv").open()))
    assert len(listed) == counts["images"] == sum(counts[name] for name in ("train", "validation", "query", "gallery"))
    extra = 2 if source == "market1501" else 0  # junk and distractors
    assert counts["identities"] == TRAIN + TEST + extra
    assert counts["validation"] > 0 and counts["quarantined"] == counts["leaked"] == 0
    assert bool(counts["gallery"]) is (source not in ("vehicleid", "cub200", "sop"))


def test_a_batch_that_is_changed_later_is_refused_by_the_first_stage_that_runs(folder: Path) -> None:
    choose(folder, "folder")
    assert repro(folder, "prepare").returncode == 0
    before = (folder / "params.yaml").read_text()
    content = YAML().load(before)
    content["student"]["batch"]["identities"] = 40
    try:
        YAML().dump(content, folder / "params.yaml")
        done = repro(folder)
    finally:
        (folder / "params.yaml").write_text(before)
    assert done.returncode
    assert "Stage 'prepare' didn't change, skipping" in done.stdout
    assert "teacher: `student.batch.identities` (40) must not exceed the" in done.stdout
    assert "epoch 1 of" not in done.stdout


def test_incoming_images_with_a_table_are_prepared(folder: Path) -> None:
    choose(folder, "csv")
    assert repro(folder, "prepare").returncode == 0
    before = metrics(folder, "prepare")
    layouts.table(folder / "incoming", TRAIN + 2, TEST)  # its rows include the existing ones
    for path in (folder / "incoming").iterdir():
        os.utime(path, (1, 1))
    params = load(folder / "params.yaml")
    check_incoming(Files(folder, folder), params)
    assert len(refresh(Files(folder, folder), params)) == 2 * 3 * 2
    done = repro(folder, "prepare")
    assert done.returncode == 0, done.stdout
    after = metrics(folder, "prepare")
    assert after["images"] == before["images"] + 2 * 3 * 2 and after["identities"] == before["identities"] + 2


@pytest.mark.parametrize("source", ALL_STAGES)
def test_all_stages_run(folder: Path, source: str) -> None:
    choose(folder, source)
    done = repro(folder)
    assert done.returncode == 0, done.stdout
    teacher, export = metrics(folder, "teacher"), metrics(folder, "export")
    assert 0 < teacher["map"] <= 1 and export["map_teacher"] == pytest.approx(teacher["map"], abs=1e-4)
    assert ("recall" in teacher) is (source == "cub200")
    page = (folder / "artifacts/benchmark/report/index.html").read_text()
    assert f"protocol {'loo' if source == 'cub200' else 'market'}" in page
    assert "images, each of them a query" in page if source == "cub200" else "queries" in page
