"""Raw layouts."""

import logging

import pytest

from pipeline.data.manifest import DataError, Item
from pipeline.data.sources import read_source

NAMES = {
    "train": ["0002_c003_00016450_0.jpg", "0001_c001_00000001_1.JPG"],
    "query": ["0776_c020_00000007_0.jpg"],
    "test": ["0776_c020_00000007_0.jpg", "-1_c001_00000009_0.jpeg"],
}


@pytest.fixture
def veri(tmp_path):
    for part, names in NAMES.items():
        (tmp_path / f"image_{part}").mkdir()
        for name in names:
            (tmp_path / f"image_{part}" / name).touch()
        (tmp_path / f"name_{part}.txt").write_text("\r\n".join(names) + "\r\n\r\n")
    return tmp_path


def test_veri776_is_read_in_the_order_of_its_lists(veri):
    assert read_source("veri776", veri) == [
        Item("image_train/0002_c003_00016450_0.jpg", "0002", "c003", "train"),
        Item("image_train/0001_c001_00000001_1.JPG", "0001", "c001", "train"),
        Item("image_query/0776_c020_00000007_0.jpg", "0776", "c020", "query"),
        Item("image_test/0776_c020_00000007_0.jpg", "0776", "c020", "gallery"),
        Item("image_test/-1_c001_00000009_0.jpeg", "-1", "c001", "gallery"),
    ]
    assert read_source("vehicles", veri) == read_source("veri776", veri)


def test_a_missing_list_folder_or_image_is_named(veri):
    (veri / "image_test" / NAMES["test"][0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"0776_c020_00000007_0\.jpg"):
        read_source("veri776", veri)
    (veri / "name_query.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"name_query.txt is missing; `data.root`"):
        read_source("veri776", veri)


def test_a_name_of_another_form_is_refused(veri):
    (veri / "name_train.txt").write_text("car7.jpg\n")
    (veri / "image_train" / "car7.jpg").touch()
    with pytest.raises(DataError, match=r"'car7.jpg' is not in the form"):
        read_source("veri776", veri)


def test_files_that_no_list_names_are_left_out_and_counted(veri, caplog):
    (veri / "image_train" / "Thumbs.db").touch()
    with caplog.at_level(logging.WARNING):
        assert len(read_source("veri776", veri)) == 5
    assert "1 files are not in name_train.txt" in caplog.text


def test_an_unknown_layout_is_named(tmp_path):
    with pytest.raises(KeyError, match="coco"):
        read_source("coco", tmp_path)
