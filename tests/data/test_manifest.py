"""The manifest: validation, reading and writing."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import DataError, Item, Manifest

GOOD = (
    Item("a/1.jpg", "007", "c001", "train"),
    Item("a/2.jpg", "8", "c001", "train"),
    Item("a/3.jpg", "9", "c001", "validation-query"),
    Item("a/4.jpg", "9", "c002", "validation-gallery"),
    Item("b/5.jpg", "10", "c001", "query"),
    Item("b/6.jpg", "10", "c002", "gallery"),
)


def test_indices_identities_and_cameras_are_those_of_the_given_splits():
    manifest = Manifest(GOOD, Path())
    indices = manifest.indices("query", "train")
    assert indices.dtype == np.int64 and indices.tolist() == [0, 1, 4]
    assert manifest.identities(indices).tolist() == ["007", "8", "10"]
    assert manifest.cameras(manifest.indices("validation-gallery")).tolist() == ["c002"]
    assert manifest.train_identities == ("007", "8")
    with pytest.raises(KeyError, match="no split"):
        manifest.indices("test")


def test_writing_and_reading_keeps_leading_zeros_and_the_digest(tmp_path):
    written = Manifest(GOOD, tmp_path)
    written.write(tmp_path / "m.csv")
    read = Manifest.read(tmp_path / "m.csv", tmp_path)
    assert read.items == GOOD and read.digest == written.digest
    assert (tmp_path / "m.csv").read_bytes().startswith(b"path,identity,camera,split\na/1.jpg,007,c001,train\n")


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_characters="\\/\0\r", exclude_categories=("Cs",)), min_size=1))
def test_any_name_survives_the_file(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("m")
    items = (Item(f"x{name}.jpg", f"i{name}", f"c{name}", "train"), *GOOD[1:])
    Manifest(items, folder).write(folder / "m.csv")
    assert Manifest.read(folder / "m.csv", folder).items == items


def test_the_digest_changes_with_any_field():
    digests = {Manifest(GOOD, Path()).digest}
    for change in ({"path": "z.jpg"}, {"identity": "z"}, {"camera": "z"}, {"split": "validation-query"}):
        digests.add(Manifest((GOOD[0], replace(GOOD[1], **change), *GOOD[2:]), Path()).digest)
    digests.add(Manifest(GOOD[::-1], Path()).digest)
    assert len(digests) == 6


@pytest.mark.parametrize(
    ("index", "change", "problem"),
    [
        (0, {"split": "training"}, "unknown splits training"),
        (1, {"identity": "10"}, "in training and in test: 10"),
        (2, {"identity": "10"}, "in training and in test: 10"),
        (1, {"identity": "9"}, "in training and in validation: 9"),
        (3, {"split": "train", "identity": "8"}, "validation must have a gallery if"),
        (4, {"split": "gallery"}, "no images in query"),
        (5, {"split": "query"}, "validation must have a gallery if"),
        (0, {"camera": ""}, "is empty in 'a/1.jpg'"),
        (0, {"identity": ""}, "is empty in 'a/1.jpg'"),
        (0, {"path": "a/2.jpg"}, "more than once: a/2.jpg"),
        (0, {"path": "/a/1.jpg"}, "must be relative"),
        (0, {"path": "a/../../1.jpg"}, "must be relative"),
        (0, {"path": "a\\1.jpg"}, "must be relative"),
        (0, {"identity": "7\r"}, "carriage returns"),
    ],
)
def test_invalid_items_are_refused(index, change, problem):
    items = [replace(item, **change) if number == index else item for number, item in enumerate(GOOD)]
    with pytest.raises(DataError, match=problem) as error:
        Manifest(items, Path())
    assert error.value.exit_code == 3


def test_all_problems_are_listed_in_one_error():
    with pytest.raises(DataError, match=r"more than once: a/1.jpg; delete .*; there are no images in query"):
        Manifest([GOOD[0], GOOD[0]], Path())


def test_names_that_are_the_same_file_on_other_systems_are_refused():
    items = [replace(GOOD[0], path="\u00fc.jpg"), replace(GOOD[1], path="u\u0308.jpg"), *GOOD[2:]]
    with pytest.raises(
        DataError, match=r"differ only in their Unicode normal form, .*'u\\u0308.jpg', '\\xfc.jpg'; rename one"
    ):
        Manifest(items, Path())


def test_an_identity_in_two_unicode_normal_forms_is_refused():
    items = [replace(GOOD[0], identity="Jos\u00e9"), replace(GOOD[1], identity="Jose\u0301"), *GOOD[2:]]
    with pytest.raises(DataError, match="differ only in their Unicode normal form"):
        Manifest(items, Path())


def test_all_test_images_may_be_queries():
    queries = [replace(item, split=item.split.replace("gallery", "query")) for item in GOOD]
    assert len(Manifest(queries, Path()).indices("query")) == 2


def test_junk_may_be_in_training_and_test():
    junk = [Item(f"{split}.jpg", "-1", "c001", split) for split in ("train", "gallery")]
    assert len(Manifest([*GOOD, *junk], Path())) == 8


def test_a_file_that_is_not_a_manifest_is_refused(tmp_path):
    path = tmp_path / "m.csv"
    with pytest.raises(FileNotFoundError, match="dvc repro prepare"):
        Manifest.read(path, tmp_path)
    for text, problem in (
        ("", "first line"),
        ("a,b\n", "first line"),
        ("path,identity,camera,split\nx,1\n", "row 2"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=problem):
            Manifest.read(path, tmp_path)


def test_the_file_is_plain_csv(tmp_path):
    Manifest([Item('a,"b".jpg', "7", "c1", "train"), *GOOD[1:]], tmp_path).write(tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["path"] == 'a,"b".jpg'
