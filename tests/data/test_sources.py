"""Data set layouts: published data sets and custom data."""

import logging
import os
import re
from collections import Counter
from dataclasses import replace

import pytest
from pydantic import ValidationError

from pipeline.config import Custom, Data
from pipeline.data import custom, folders
from pipeline.data.layout import LAYOUTS, UNASSIGNED, UNASSIGNED_TEST, UNASSIGNED_VALIDATION, UNKNOWN
from pipeline.data.manifest import DataError, Item
from pipeline.data.published import lines
from pipeline.data.sources import read_source
from tests import layouts

NAMES = {
    "train": ["0002_c003_00016450_0.jpg", "0001_c001_00000001_1.JPG"],
    "query": ["0776_c020_00000007_0.jpg"],
    "test": ["0776_c020_00000007_0.jpg", "-1_c001_00000009_0.jpeg"],
}


def section(source, **changes):
    settings = {"table": "images.csv", "pattern": "", "test": 0.5, **changes}
    return Data.model_construct(
        source=source,
        unlabelled=[],
        vehicles=Data.model_fields["vehicles"].annotation.model_construct(unlabelled_identities=0),
        custom=Custom.model_construct(**settings),
        vehicleid=Data.model_fields["vehicleid"].annotation(test_identities=800),
    )


def read(source, root, **changes):
    return read_source(section(source, **changes), root)


@pytest.fixture
def veri(tmp_path):
    for part, names in NAMES.items():
        (tmp_path / f"image_{part}").mkdir()
        for name in names:
            (tmp_path / f"image_{part}" / name).touch()
        (tmp_path / f"name_{part}.txt").write_text("\r\n".join(names) + "\r\n\r\n")
    return tmp_path


def test_veri776_is_listed_in_the_order_of_its_lists(veri):
    assert read("veri776", veri).items == [
        Item("image_train/0002_c003_00016450_0.jpg", "0002", "c003", "train"),
        Item("image_train/0001_c001_00000001_1.JPG", "0001", "c001", "train"),
        Item("image_query/0776_c020_00000007_0.jpg", "0776", "c020", "query"),
        Item("image_test/0776_c020_00000007_0.jpg", "0776", "c020", "gallery"),
        Item("image_test/-1_c001_00000009_0.jpeg", "-1", "c001", "gallery"),
    ]
    assert read("vehicles", veri) == read("veri776", veri)


def test_a_missing_list_or_image_is_named(veri):
    (veri / "image_test" / NAMES["test"][0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"0776_c020_00000007_0\.jpg"):
        read("veri776", veri)
    (veri / "name_query.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"name_query.txt is missing; `data.root`"):
        read("veri776", veri)


def test_a_file_name_of_another_form_is_refused(veri):
    (veri / "name_train.txt").write_text("car7.jpg\n")
    (veri / "image_train" / "car7.jpg").touch()
    with pytest.raises(DataError, match=r"'car7.jpg' does not have the form"):
        read("veri776", veri)


def test_files_that_are_in_no_list_are_skipped_with_a_warning(veri, caplog):
    (veri / "image_train" / "0009_c001_00000001_1.jpg").touch()
    with caplog.at_level(logging.WARNING):
        assert len(read("veri776", veri).items) == 5
    assert "1 files are not in name_train.txt" in caplog.text


COUNTS = {
    "veri776": {"train": 30, "query": 6, "gallery": 12},
    "market1501": {"train": 30, "query": 6, "gallery": 14},
    "msmt17": {"train": 30, "query": 6, "gallery": 6},
    "vehicleid": {"train": 20, "query": 8},
    "cub200": {"train": 20, "query": 8},
    "inshop": {"train": 20, "query": 4, "gallery": 4},
    "sop": {"train": 20, "query": 8},
    "folder": {UNASSIGNED: 42},
    "csv": {UNASSIGNED: 42},
}


@pytest.mark.parametrize("source", layouts.LAYOUTS)
def test_each_layout_is_read_as_its_archive_unpacks(source, tmp_path, caplog):
    layouts.LAYOUTS[source](tmp_path, 5, 2)
    listing = read(source, tmp_path)
    assert Counter(item.split for item in listing.items) == COUNTS[source]
    assert all((tmp_path / item.path).is_file() for item in listing.items)
    trained = {item.identity for item in listing.items if item.split == "train"}
    tested = {item.identity for item in listing.items if item.split in ("query", "gallery")}
    assert not trained & tested
    assert len(trained | tested - {"-1", "0000"}) == (0 if source in ("folder", "csv") else 7)
    for split, count in LAYOUTS[source].published(section(source)).items():
        warning = f"split {split} has {COUNTS[source][split]} images, the published data set has {count}"
        assert warning in caplog.text


def test_cameras_are_those_of_the_names(tmp_path):
    for source, cameras in {
        "veri776": {"c001", "c002", "c003"},
        "market1501": {"c1", "c2", "c3"},
        "msmt17": {"01", "02", "03"},
        "folder": {"cam1", "cam2", "cam3"},
        "csv": {"c1", "c2", "c3"},
        "inshop": {UNKNOWN},
    }.items():
        layouts.LAYOUTS[source](tmp_path / source, 2, 2)
        assert {item.camera for item in read(source, tmp_path / source).items} == cameras


def test_both_versions_of_msmt17_are_read(tmp_path):
    layouts.msmt17(tmp_path, 2, 1, version=2)
    items = read("msmt17", tmp_path).items
    assert {item.path.split("/")[0] for item in items} == {"mask_train_v2", "mask_test_v2"}
    assert {item.identity for item in items} == {"train-0", "train-1", "test-0"}
    with pytest.raises(FileNotFoundError, match="neither train nor mask_train_v2"):
        read("msmt17", tmp_path / "mask_train_v2")


def test_a_complete_data_set_gets_no_warning(tmp_path, monkeypatch, caplog):
    layouts.cub200(tmp_path, 2, 2)
    monkeypatch.setitem(LAYOUTS, "cub200", replace(LAYOUTS["cub200"], published=lambda _: {"train": 8, "query": 8}))
    read("cub200", tmp_path)
    assert "the published data set has" not in caplog.text


def test_in_shop_images_may_be_in_the_folder_img(tmp_path):
    layouts.inshop(tmp_path, 2, 1)
    (tmp_path / "Img").mkdir()
    (tmp_path / "img").rename(tmp_path / "Img" / "img")
    assert all((tmp_path / item.path).is_file() for item in read("inshop", tmp_path).items)


@pytest.mark.parametrize(
    ("source", "file", "text", "message"),
    [
        ("sop", "Ebay_train.txt", "head\n1 2 3\n", r"Ebay_train.txt, line 2: expected 4 words"),
        (
            "inshop",
            "Eval/list_eval_partition.txt",
            "1\nhead\na.jpg 1 val\n",
            "split must be train, query or gallery, got 'val'",
        ),
        ("cub200", "image_class_labels.txt", "1 1\n", "lacks image 2"),
        ("cub200", "image_class_labels.txt", "1 x\n", "class 'x' is not a number"),
        ("msmt17", "list_train.txt", "a/b.jpg 0\n", r"'a/b.jpg' does not have the form 0000/0000_000_01"),
    ],
)
def test_malformed_lists_are_refused_with_name_and_line(tmp_path, source, file, text, message):
    layouts.LAYOUTS[source](tmp_path, 2, 1)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read(source, tmp_path)


def test_a_list_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        list(lines(tmp_path / "list.txt", 1))


def test_files_that_are_not_images_of_an_identity_are_skipped_with_a_warning(tmp_path):
    layouts.folder(tmp_path, 2, 1)
    (tmp_path / "readme.txt").touch()
    (tmp_path / "thing 1" / "labels.json").touch()
    (tmp_path / "thing 1" / "more.zip").touch()
    os.close(os.open(bytes(tmp_path / "thing 1") + b"/\xff.png", os.O_CREAT))
    (tmp_path / ".git").mkdir()
    (tmp_path / "thing 1" / "Thumbs.db").touch()
    (tmp_path / "thing 1" / "cam1" / "._0.png").touch()
    (tmp_path / "thing 1" / "photo.HEIC").touch()
    os.mkfifo(tmp_path / "thing 1" / "pipe.png")
    listing = read("folder", tmp_path)
    assert len(listing.items) == 18
    assert {warning.path: warning.warning for warning in listing.warnings} == {
        "readme.txt": folders.NO_IMAGE,
        ".git": folders.HIDDEN,
        "thing 1/Thumbs.db": folders.LEFT_BEHIND,
        "thing 1/cam1/._0.png": folders.LEFT_BEHIND,
        "thing 1/labels.json": folders.NO_IMAGE,
        "thing 1/more.zip": folders.NO_IMAGE,
        "thing 1/\\udcff.png": folders.NOT_UTF8,
        "thing 1/photo.HEIC": folders.HEIC,
        "thing 1/pipe.png": folders.SPECIAL,
    }


def test_links_to_files_are_followed_and_others_are_named(tmp_path):
    layouts.folder(tmp_path / "cache", 3, 1)
    seen = tmp_path / "seen"
    for path in sorted((tmp_path / "cache").rglob("*.png")):
        link = seen / path.relative_to(tmp_path / "cache")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (seen / "thing 1" / "folder").symlink_to(tmp_path / "cache" / "thing 2")
    (seen / "thing 1" / "loop.png").symlink_to("loop.png")
    (seen / "thing 1" / "gone.png").symlink_to("nowhere.png")
    listing = read("folder", seen)
    assert len(listing.items) == len(read("folder", tmp_path / "cache").items) > 20
    assert {warning.path: warning.warning for warning in listing.warnings} == {
        "thing 1/folder": folders.LINK_TO_FOLDER,
        "thing 1/loop.png": folders.LINK_LOOP,
        "thing 1/gone.png": folders.DANGLING,
    }


def test_a_root_of_linked_folders_is_refused_with_the_reason(tmp_path):
    layouts.folder(tmp_path / "real", 2, 1)
    (tmp_path / "root").mkdir()
    for name in ("thing 1", "thing 2"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "real" / name)
    with pytest.raises(DataError, match=r"no images in folders of identities \(2 x skipped: a link to a folder"):
        read("folder", tmp_path / "root")


@pytest.mark.parametrize("source", layouts.LAYOUTS)
def test_files_that_systems_leave_behind_are_ignored_and_counted_in_every_layout(source, tmp_path):
    layouts.LAYOUTS[source](tmp_path, 5, 2)
    expected = read(source, tmp_path)
    left = 0
    for folder in sorted(path for path in tmp_path.rglob("*") if path.is_dir()):
        for name in ("._0002_c1s1_000451_03.jpg", ".DS_Store", "desktop.ini"):
            (folder / name).write_bytes(b"\0\5\x16\7junk")
            left += 1
        (folder / "@eaDir").mkdir()
        layouts.picture(folder / "@eaDir" / "1.jpg", 1)
        left += 1
    listing = read(source, tmp_path)
    assert listing.items == expected.items
    assert sum(warning.warning == folders.LEFT_BEHIND for warning in listing.warnings) == left + len(expected.warnings)


def test_cameras_of_a_flat_folder_come_from_the_pattern(tmp_path):
    for name in ("a_c1_0.jpg", "b_c2_0.jpg"):
        layouts.picture(tmp_path / "x" / name, 1)
    pattern = r"_(?P<camera>c\d+)_"
    assert [item.camera for item in read("folder", tmp_path, pattern=pattern).items] == ["c1", "c2"]
    assert [item.camera for item in read("folder", tmp_path).items] == [UNKNOWN, UNKNOWN]
    layouts.picture(tmp_path / "x" / "c.jpg", 1)
    with pytest.raises(DataError, match=r"x/c.jpg: `data.custom.pattern` .* finds no camera"):
        read("folder", tmp_path, pattern=pattern)
    for invalid, message in (("(", "no regular expression"), ("c", "must have a group")):
        with pytest.raises(ValidationError, match=message):
            Custom(table="t", pattern=invalid, test=0.5)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (
            ["train", "val", "query", "gallery"],
            {"train": 18, UNASSIGNED_VALIDATION: 18, "query": 18, "gallery": 18},
        ),
        (["Training", "VALID", "Test"], {"train": 18, UNASSIGNED_VALIDATION: 18, UNASSIGNED_TEST: 18}),
        (["train", "query", "test"], {"train": 18, "query": 18, "gallery": 18}),
        (["training", "validation", "testing"], {"train": 18, UNASSIGNED_VALIDATION: 18, UNASSIGNED_TEST: 18}),
    ],
)
def test_folders_named_as_splits_hold_the_identities(tmp_path, parts, expected):
    for part in parts:
        layouts.folder(tmp_path / part, 2, 0)
    listing = read("folder", tmp_path)
    counts = Counter(item.split for item in listing.items)
    assert counts == {split: count * counts["train"] // 18 for split, count in expected.items()}
    assert {item.identity for item in listing.items} == {"thing 1", "thing 2"}
    assert {item.camera for item in listing.items} == {"cam1", "cam2", "cam3"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["train", "car 7"], "has a folder `train` beside car 7: folders in `data.root` are either all splits"),
        (["val", "Validation", "train"], "has the folders Validation and val, which are the same split; join them"),
        (["my data"], "all images in .* are in one folder, `my data`, and so of one identity; point `data.root`"),
    ],
)
def test_folders_that_are_neither_all_splits_nor_all_identities_are_refused(tmp_path, parts, message):
    for part in parts:
        layouts.folder(tmp_path / part, 2, 0)
    with pytest.raises(DataError, match=message):
        read("folder", tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no images in folders"):
        read("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="with one folder for each identity"):
        read("folder", tmp_path / "gone")


def test_a_table_keeps_text_unchanged_and_may_have_splits(tmp_path):
    (tmp_path / "images.csv").write_text(
        '\ufeffpath,identity,split\n"a, b.jpg",007,train\nü.jpg,7,query\nc.jpg,7,gallery\n', encoding="utf-8"
    )
    assert read("csv", tmp_path).items == [
        Item("a, b.jpg", "007", UNKNOWN, "train"),
        Item("ü.jpg", "7", UNKNOWN, "query"),
        Item("c.jpg", "7", UNKNOWN, "gallery"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,name\na,b\n", "first line must name the columns path, identity .* got path, name"),
        ("path,identity,Path\na,b,c\n", "has two columns path"),
        ("path,identity,x,y,w\na,b,1,2,3\n", "has the columns x, y, w: a box is x, y, width, height or x1, y1, x2, y2"),
        ("path,identity,XMin,ymin\na,b,1,2\n", "has the columns XMin, ymin: a box is"),
        ("path,identity,x_center,y_center,width,height\na,b,1,2,3,4\n", "has the columns x_center: a box is"),
        ('path,identity,bbox\na,b,"1 2 3 4"\n', "has the columns bbox: a box is x, y, width, height"),
        ("path,identity,x,y,width,height\na,b,1,2,3,\n", "box of a must be four numbers of pixels, got .*height ''"),
        ("path,identity,x,y,width,height\na,b,1,2,3,nan\n", "box of a must be four numbers of pixels"),
        (
            "path,identity,x,y,w,h\na,b,0.1,0.2,0.3,0.4\n",
            "no side of most boxes exceeds 0.4; boxes are in pixels",
        ),
        ("path,identity\na\n", "line 2: expected 2 fields"),
        ("path,identity\na,b,c\n", "line 2: expected 2 fields"),
        (
            "path,identity,split\na,b,fold 1\n",
            "line 2: split must be train, validation, .* or unlabelled, got 'fold 1'",
        ),
        ("path,identity,split\na,b,train\nc,d,\n", "give all one, or none"),
        ("path,identity,split\na,b,test\nc,d,gallery\n", "splits test and gallery are both given"),
        ("path,identity\n", "lists no images"),
        ("", "got an empty file"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, text, message):
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        custom.table(tmp_path, section("csv"))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("cars.csv is missing; `data.custom.table`")):
        read("csv", tmp_path, table="cars.csv")


def test_the_file_that_keeps_the_data_folder_in_git_is_no_warning(tmp_path):
    layouts.folder(tmp_path, 2, 1)
    (tmp_path / ".gitkeep").touch()
    assert read("folder", tmp_path).warnings == []
