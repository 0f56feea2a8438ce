"""Images without labels: listed last, never counted as identities, and never images of the test or validation set."""

import csv
import os
import re
from collections import Counter
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pydantic import ValidationError

from pipeline.config import Custom, Data, Vehicles
from pipeline.data.images import open_images
from pipeline.data.inspection import (
    DecodedImage,
    Inspection,
    near_duplicates,
    unlabelled_copies,
    unlabelled_overlaps,
)
from pipeline.data.manifest import UNLABELLED, DataError, Item, Manifest
from pipeline.data.requirements import problems, warnings
from pipeline.data.unlabelled import is_in, unlabelled_item
from pipeline.protocols import PROTOCOLS
from pipeline.stage.params_file import ParamsError, load
from pipeline.stage.presets import preset_text
from stages.prepare import OVERLAP, prepare
from tests import layouts
from tests.data.test_prepare import Run
from tests.data.test_toy_vehicles import digests
from tests.imports import ROOT

LEFT_OUT = "unlabelled image is left out: it looks like a test or validation image"
COPY = "unlabelled image is left out: a test or validation image has its pixels"


def street(root, count=6, first=500):
    """Write pictures of things that no layout has, in folders of any depth."""
    for number in range(first, first + count):
        layouts.picture(root / f"day {number % 2}" / "a" / f"{number}.png", number)


def rows(run):
    """Return the lines of the manifest below its header."""
    return run.files.manifest.read_text().splitlines()[1:]


def warned(run):
    with run.files.warnings.open(newline="") as file:
        return [(row["path"], row["warning"], row["detail"]) for row in csv.DictReader(file)]


def unlabelled_paths(run):
    manifest, _ = open_images(run.files, run.params)
    return [manifest.items[index].path for index in manifest.indices(UNLABELLED)]


@pytest.mark.parametrize("source", layouts.LAYOUTS)
def test_all_other_rows_and_pixels_are_the_same_with_and_without_unlabelled_images(tmp_path, source):
    layouts.LAYOUTS[source](tmp_path / "data", 8, 6)
    settings_ = {"source": source, "protocol": layouts.PROTOCOLS.get(source, "market"), "near_duplicate_bits": -1}
    run = Run(tmp_path, **settings_, validation=0.25)
    without = prepare(run).model_dump()
    rows_before, pixels_before, warned_before = rows(run), np.load(run.files.image_cache), warned(run)

    street(tmp_path / "data" / "0 more" / "street")  # sorted before all others
    run = Run(tmp_path, **settings_, validation=0.25, unlabelled=["0 more/street/"])
    assert prepare(run).model_dump() == without | {"unlabelled": 6}
    assert rows(run)[: len(rows_before)] == rows_before
    names = [f"0 more/street/day {day}/a/{number}.png" for day in (0, 1) for number in range(500 + day, 506, 2)]
    assert rows(run)[len(rows_before) :] == [f"{name},unlabelled,unknown,unlabelled" for name in names]
    manifest, images = open_images(run.files, run.params)
    assert manifest.indices(UNLABELLED).tolist() == list(range(len(rows_before), len(rows_before) + 6))
    np.testing.assert_array_equal(np.load(run.files.image_cache)[: len(rows_before)], pixels_before)
    assert images.batch(manifest.indices(UNLABELLED)).std() > 5
    assert warned(run) == warned_before


def test_further_rendered_vehicles_change_no_other_file(tmp_path):
    size = {"train_identities": 4, "test_identities": 2, "views": 2, "size": 16}
    before = Run(tmp_path / "a", near_duplicate_bits=-1)
    without = prepare(before).model_dump()
    run = Run(tmp_path / "b", near_duplicate_bits=-1, vehicles=Vehicles(**size, unlabelled_identities=3))
    assert prepare(run).model_dump() == without | {"unlabelled": 36}
    old, new = digests(before.files.vehicles), digests(run.files.vehicles)
    added = {name for name in new if name not in old}
    assert {name: new[name] for name in old} == old
    assert {name.split("/")[0] for name in added} == {"image_unlabelled"}
    assert Counter(name.split("/")[1][:9] for name in added) == {
        f"{identity:04}_c00{camera}": 2 for identity in (7, 8, 9) for camera in range(1, 7)
    }
    assert rows(run)[:72] == rows(before) and len(rows(run)) == 72 + 36
    # A vehicle is the same one in whatever split it is.
    more = Run(tmp_path / "c", vehicles=Vehicles(**(size | {"test_identities": 5}), unlabelled_identities=0))
    prepare(more)
    assert {digest for name, digest in new.items() if name in added} <= set(digests(more.files.vehicles).values())


@pytest.fixture
def custom_set(tmp_path):
    """A folder with 12 identities that are split by their names, and a run of it with unlabelled images."""
    layouts.folder(tmp_path / "data", 12, 0)
    street(tmp_path / "data" / "street")
    return lambda **changes: Run(tmp_path, source="folder", **{"validation": 0.2, "unlabelled": ["street"], **changes})


def of_split(run, name):
    manifest, _ = open_images(run.files, run.params)
    return manifest.root / manifest.items[manifest.indices(name)[0]].path


@pytest.mark.parametrize("protocol", ["market", "query-gallery", "loo"])
@pytest.mark.parametrize("closed_set", [False, True])
def test_images_of_test_and_validation_are_removed_whatever_was_done_to_them(
    tmp_path, custom_set, protocol, closed_set
):
    run = custom_set(protocol=protocol, closed_set=closed_set)
    without = prepare(run)
    assert (without.unlabelled, without.unlabelled_removed) == (6, 0)
    rows_before, target = rows(run), tmp_path / "data" / "street" / "new"
    target.mkdir()
    query, validation, trained = (of_split(run, name) for name in ("query", "validation-query", "train"))
    (target / "copied.png").write_bytes(query.read_bytes())
    image = Image.open(query)
    image.save(target / "as bitmap\n.bmp")
    ImageOps.mirror(image).save(target / "mirrored.png")
    image.save(target / "compressed.jpg", quality=80)
    image.resize((300, 300), Image.Resampling.BICUBIC).save(target / "larger.png")
    ImageOps.mirror(Image.open(validation)).save(target / "validation.jpg", quality=90)
    (target / "linked.png").symlink_to(validation)
    (target / "training.png").write_bytes(trained.read_bytes())
    (target / "twice.png").write_bytes((tmp_path / "data/street/day 0/a/500.png").read_bytes())

    record = prepare(run)
    counts = {"unlabelled": 8, "unlabelled_removed": 7}
    assert record.model_dump() == without.model_dump() | counts
    assert record.leaked == 0
    alike = {path: detail for path, warning, detail in warned(run) if warning == LEFT_OUT}
    exact = {path: detail for path, warning, detail in warned(run) if warning == COPY}
    assert exact.keys() == {f"street/new/{name}" for name in ("copied.png", "as bitmap\n.bmp", "linked.png")}
    assert alike.keys() == {
        f"street/new/{name}" for name in ("mirrored.png", "compressed.jpg", "larger.png", "validation.jpg")
    }
    root = tmp_path / "data"
    assert exact["street/new/copied.png"] == str(query.relative_to(root))
    assert exact["street/new/linked.png"] == str(validation.relative_to(root))
    assert all(re.search(", [0-4] of 64 bits differ$", detail) for detail in alike.values())
    kept, removed = set(unlabelled_paths(run)), exact.keys() | alike.keys()
    assert {"street/new/training.png", "street/new/twice.png"} < kept and not removed & kept
    assert rows(run)[: len(rows_before) - 6] == rows_before[:-6]

    only_exact = prepare(custom_set(protocol=protocol, closed_set=closed_set, near_duplicate_bits=-1))
    assert (only_exact.unlabelled, only_exact.unlabelled_removed) == (12, 3)


def test_unlabelled_images_that_are_all_removed_or_unreadable_stop_the_stage(tmp_path, custom_set):
    run = custom_set()
    prepare(run)
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "other" / "1.png").write_bytes(of_split(run, "gallery").read_bytes())
    (tmp_path / "data" / "other" / "2.png").write_bytes(b"half")
    run.files.manifest.unlink()
    text = "none of the 2 unlabelled images can be used: 1 left out because of test .* 1 unreadable .*quarantine.csv"
    run = custom_set(unlabelled=["other", "street"], max_quarantined=0.5)
    assert prepare(run).unlabelled == 6
    (tmp_path / "data" / "street").rename(tmp_path / "street")
    with pytest.raises(DataError, match=text):
        prepare(custom_set(unlabelled=["other"], max_quarantined=0.5))
    assert ("other/1.png", COPY) in [warning[:2] for warning in warned(run)]


def test_unreadable_images_count_among_those_of_their_kind(tmp_path, custom_set):
    """A thousand good street images do not allow broken labelled ones, nor the other way round."""
    broken = tmp_path / "data" / "street" / "day 0" / "a" / "500.png"
    broken.write_bytes(broken.read_bytes()[:100])
    text = r"1 of 6 unlabelled images are unusable, more than `data.max_quarantined` \(0.1\): street/day 0/a/500.png"
    with pytest.raises(DataError, match=text):
        prepare(custom_set(max_quarantined=0.1))
    record = prepare(custom_set(max_quarantined=0.2))
    assert (record.quarantined, record.unlabelled, record.images) == (1, 5, 72)
    labelled = tmp_path / "data" / "thing 1" / "cam1" / "0.png"
    labelled.write_bytes(labelled.read_bytes()[:100])
    with pytest.raises(DataError, match="1 of 72 images are unusable"):
        prepare(custom_set(max_quarantined=1 / 78))


def test_a_copy_of_a_training_image_is_no_image_of_two_identities(tmp_path, custom_set):
    run = custom_set()
    before = prepare(run)
    trained = of_split(run, "train")
    for number in range(2):
        (tmp_path / "data" / "street" / f"copy {number}.png").write_bytes(trained.read_bytes())
    assert prepare(run).model_dump() == before.model_dump() | {"unlabelled": 8}
    assert not (tmp_path / "artifacts/prepare/quarantine.csv").read_text().splitlines()[1:]


def test_skipped_files_are_those_of_other_folders_and_are_named_once(tmp_path, custom_set):
    folder = tmp_path / "data" / "street"
    for name in (".DS_Store", "notes.txt", ".hidden.png", "._1.png"):
        (folder / name).touch()
    (tmp_path / "elsewhere").mkdir()
    layouts.picture(tmp_path / "elsewhere" / "1.png", 900)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "nowhere.png").symlink_to("gone.png")
    with open(os.fsencode(folder / "caf") + b"\xe9.png", "wb"):
        pass
    layouts.picture(folder / "two\nlines, \u4e16.png", 901)
    run = custom_set()
    assert prepare(run).unlabelled == 7
    assert "street/two\nlines, \u4e16.png" in unlabelled_paths(run)
    skipped = {
        "street/.DS_Store": "skipped: left behind by an operating system",
        "street/._1.png": "skipped: left behind by an operating system",
        "street/.hidden.png": "skipped: hidden",
        "street/notes.txt": "skipped: the suffix is not one of an image",
        "street/linked": "skipped: a link to a folder (DVC does not track what is in it; link or copy its files)",
        "street/nowhere.png": "skipped: a link to nothing",
        "street/caf\\udce9.png": "skipped: the name is not UTF-8 (rename it, for example with convmv)",
    }
    assert sorted(warned(run)) == sorted((path, warning, "") for path, warning in skipped.items())


@pytest.mark.parametrize("source", ["csv", "market1501"])
def test_what_systems_leave_behind_is_named_once_for_other_sources_too(tmp_path, source):
    layouts.LAYOUTS[source](tmp_path / "data", 8, 6)
    for name in ("Thumbs.db", "@eaDir"):
        for leftover in (tmp_path / "data").rglob(name):
            leftover.unlink()
    street(tmp_path / "data" / "street")
    (tmp_path / "data" / "street" / ".DS_Store").touch()
    (tmp_path / "data" / ".DS_Store").touch()
    run = Run(tmp_path, source=source, unlabelled=["street"])
    prepare(run)
    assert sorted(path for path, *_ in warned(run)) == [".DS_Store", "street/.DS_Store"]


@pytest.mark.parametrize(
    ("folders", "problem"),
    [
        ([""], "must list folders inside of `data.root`, .* got ''"),
        (["."], "must list folders inside of"),
        (["/srv/street"], "must list folders inside of"),
        (["../street"], "must list folders inside of"),
        (["a/../../street"], "must list folders inside of"),
        (["a\\b"], "must list folders inside of"),
        (["a\0"], "must list folders inside of"),
        (["a", "b", "./a/"], "lists 'a' twice, remove one"),
        (["a/b", "c", "a"], "lists 'a' and a folder in it, 'a/b', remove the inner one"),
        (["a", "a/b/c"], "lists 'a' and a folder in it, 'a/b/c', remove the inner one"),
        ("street", "valid list"),
        ([7], "valid string"),
    ],
)
def test_folders_that_cannot_be_meant_are_refused_with_the_params(tmp_path, folders, problem):
    content = Run(tmp_path, source="folder").params.data.model_dump()
    with pytest.raises(ValidationError, match=problem):
        Data.model_validate(content | {"unlabelled": folders})


def test_folders_with_similar_names_are_different_ones_and_normalised(tmp_path):
    content = Run(tmp_path, source="folder").params.data.model_dump()
    folders = ["./street", "street 2//north/", "street.old"]
    assert Data.model_validate(content | {"unlabelled": folders}).unlabelled == [
        "street",
        "street 2/north",
        "street.old",
    ]


def test_the_rendered_set_takes_no_folders(tmp_path):
    params = Run(tmp_path).params
    content = params.model_dump()
    content["data"]["unlabelled"] = ["street"]
    with pytest.raises(ValidationError, match=r"`data.unlabelled` must be \[\] for source vehicles, .*unlabelled_iden"):
        type(params).model_validate(content)


def test_each_refusal_is_one_sentence(tmp_path):
    """Sentences of one section are divided at semicolons."""
    text = preset_text(ROOT, "smoke")
    for changed in (
        text.replace("unlabelled: []", "unlabelled: [street]"),
        text.replace("unlabelled: []", "unlabelled: [a, a/b]").replace("source: vehicles", "source: folder"),
        text.replace("unlabelled: []", "unlabelled: [a, ./a]").replace("source: vehicles", "source: folder"),
        text.replace("unlabelled: []", "unlabelled: [/a]").replace("source: vehicles", "source: folder"),
        text.replace("unlabelled_identities: 4", "unlabelled_identities: 20001"),
    ):
        (tmp_path / "params.yaml").write_text(changed)
        with pytest.raises(ParamsError) as error:
            load(tmp_path / "params.yaml")
        (problem,) = error.value.problems
        assert "unlabelled" in problem


def test_folders_that_cannot_be_read_are_refused_with_one_sentence(tmp_path, custom_set):
    root = tmp_path / "data"
    (root / "empty" / "deeper").mkdir(parents=True)
    (root / "empty" / "notes.txt").touch()
    (root / "file.png").touch()
    street(tmp_path / "outside")
    (root / "linked").symlink_to(tmp_path / "outside")
    for folder, error, text in (
        ("gone", FileNotFoundError, "data/gone is missing; entries are folders relative to `data.root`"),
        ("empty", DataError, "data/empty holds no images; add some or remove the entry"),
        ("file.png", DataError, "data/file.png is a file; list the folder that it is in"),
        ("linked", DataError, "data/linked is a link, and DVC tracks nothing in a linked folder; copy its files"),
        ("linked/day 0", DataError, "data/linked is a link"),
    ):
        with pytest.raises(error, match=f"`data.unlabelled`: .*{text}") as raised:
            prepare(custom_set(unlabelled=["street", folder]))
        assert "\n" not in str(raised.value)


def test_a_folder_may_be_inside_of_an_identity_and_in_another_unicode_form(tmp_path, custom_set):
    street(tmp_path / "data" / "thing 1" / "u\u0308bung", first=600)
    run = custom_set(unlabelled=["thing 1/\u00fcbung"])
    (tmp_path / "data" / "street").rename(tmp_path / "street")
    assert prepare(run).unlabelled == 6
    assert prepare(run).images == 72


def test_images_that_a_table_lists_keep_their_labels_and_the_others_are_unlabelled(tmp_path):
    layouts.table(tmp_path / "data", 12, 0)
    before = Run(tmp_path, source="csv")
    labelled = prepare(before)
    rows_before = [row.replace(path, f"all/{path}") for row in rows(before) for path in [row.split(",")[0]]]
    (tmp_path / "data" / "all").mkdir()
    for path in (tmp_path / "data").glob("*.webp"):
        path.rename(tmp_path / "data" / "all" / path.name)
    table = tmp_path / "data" / "images.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *(f"all/{line}" for line in lines)]))
    with pytest.raises(DataError, match="all holds no images that the data set does not list itself; add some or rem"):
        prepare(Run(tmp_path, source="csv", unlabelled=["all"]))
    street(tmp_path / "data" / "all")
    run = Run(tmp_path, source="csv", unlabelled=["all"], near_duplicate_bits=-1)
    record = prepare(run)
    assert (record.images, record.identities, record.unlabelled) == (labelled.images, labelled.identities, 6)
    assert len(rows(run)) == labelled.images + 6 and {row.split(",")[0] for row in rows(run)[: labelled.images]} == {
        row.split(",")[0] for row in rows_before
    }


def test_a_picture_whose_parts_have_labels_is_not_used_as_a_whole(tmp_path):
    root = tmp_path / "data"
    lines = ["path,identity,camera,split,x,y,width,height"]
    for number in range(12):
        layouts.picture(root / "street" / f"{number}.png", number, size=(40, 80))
        for part in range(2):
            split = "train" if number < 8 else ("query", "gallery")[part]
            identity = number // 2 if number < 8 else 10 + number
            lines.append(f"street/{number}.png,{identity},c{part},{split},{40 * part},0,40,40")
    layouts.picture(root / "street" / "more.png", 77, size=(40, 80))
    query = Image.open(root / "street" / "9.png").crop((0, 0, 40, 40))
    query.save(root / "street" / "part.png")
    lines += ["street/8.png,,,unlabelled,3,3,20,20", "street/0.png,,,unlabelled,3,3,20,20"]  # of a query; of training
    (root / "images.csv").write_text("\n".join(lines))
    run = Run(tmp_path, source="csv", unlabelled=["street"])
    record = prepare(run)
    assert (record.unlabelled, record.unlabelled_removed) == (2, 2)
    assert sorted(rows(run)[-2:]) == [
        "street/0.png,unlabelled,unknown,unlabelled,3 3 23 23",
        "street/more.png,unlabelled,unknown,unlabelled,",
    ]
    assert ("street/part.png", COPY, "street/9.png [0 0 40 40]") in warned(run)
    assert ("street/8.png [3 3 23 23]", OVERLAP, "street/8.png [0 0 40 40]") in warned(run)


def test_a_folder_is_found_in_any_unicode_form():
    path, folder = "über/b.png", "über"
    for one, other in (("NFC", "NFD"), ("NFD", "NFC")):
        assert is_in(normalize(one, path), [normalize(other, folder)])
    assert not is_in("over/b.png", ["ov"])


@given(
    *2
    * [
        st.none()
        | st.tuples(*4 * [st.integers(0, 6)]).map(lambda b: (*map(min, b[:2], b[2:]), *map(max, b[:2], b[2:])))
    ]
)
def test_parts_of_a_file_overlap_if_they_share_a_pixel(first, second):
    def pixels(box):
        left, top, right, bottom = box or (0, 0, 9, 9)
        return {(x, y) for x in range(left, right) for y in range(top, bottom)}

    boxes = [box for box in (first, second) if box]
    if all(box[0] < box[2] and box[1] < box[3] for box in boxes):  # as the inspection ensures
        items = [Item("a", "1", "c", "query", first), unlabelled_item("a", second), unlabelled_item("b", second)]
        expected = [(items[0].name, items[1].name)] if pixels(first) & pixels(second) else []
        assert unlabelled_overlaps(Inspection(items, [], [])) == expected


@pytest.mark.parametrize("given_splits", [True, False])
def test_rows_of_a_table_may_be_unlabelled_and_their_labels_are_ignored(tmp_path, given_splits):
    root = tmp_path / "data"
    lines = ["path,identity,camera,split"]
    for identity, camera, view in layouts.views(1, 12, 2, 2):
        path = f"{identity}-{camera}-{view}.png"
        layouts.picture(root / path, identity, camera, view)
        split = ("train" if identity < 7 else ("query", "gallery")[view]) if given_splits else ""
        lines.insert(1, f"{path},{identity},c{camera},{split}")
        if identity < 4:
            layouts.picture(root / "more" / path, 100 + identity, camera, view)
            label, word = ("", "13", "nan")[identity - 1], ("unlabelled", "Unlabeled ", "UNLABELLED")[identity - 1]
            lines.insert(1, f"more/{path},{label},c9,{word}")
    (root / "images.csv").write_text("\n".join(lines))
    run = Run(tmp_path, source="csv")
    record = prepare(run)
    assert (record.images, record.identities, record.cameras, record.unlabelled) == (48, 12, 2, 12)
    assert {row.split(",", 1)[1] for row in rows(run)[-12:]} == {"unlabelled,unknown,unlabelled"}
    assert [warning for warning in warned(run) if "label" in warning[1] and warning[1] != LEFT_OUT] == []


def test_a_folder_of_unlabelled_images_may_stand_beside_folders_of_splits(tmp_path):
    root = tmp_path / "data"
    for identity, camera, view in layouts.views(1, 12, 2, 2):
        split = "Train" if identity < 7 else ("query", "gallery")[view]
        layouts.picture(root / split / str(identity) / f"c{camera}" / f"{view}.png", identity, camera, view)
    before = Run(tmp_path, source="folder")
    prepare(before)
    rows_before = rows(before)
    street(root / "Unlabelled")
    layouts.picture(root / "Unlabelled" / "top.png", 700)
    run = Run(tmp_path, source="folder")
    assert prepare(run).unlabelled == 7
    assert rows(run)[:-7] == rows_before
    assert {row.split(",", 1)[1] for row in rows(run)[-7:]} == {"unlabelled,unknown,unlabelled"}
    run = Run(tmp_path, source="folder", unlabelled=["Unlabelled/day 0"])
    assert prepare(run).unlabelled == 7


def test_an_identity_called_unlabelled_is_refused(tmp_path, custom_set):
    street(tmp_path / "data" / "unlabelled")
    text = r"a folder `unlabelled` beside street, thing 1 and 11 more: list it in `data.unlabelled` if its images have"
    with pytest.raises(DataError, match=text):
        prepare(custom_set(unlabelled=[]))
    assert prepare(custom_set(unlabelled=["unlabelled", "street"])).unlabelled == 12
    layouts.table(tmp_path / "data", 12, 0)
    table = tmp_path / "data" / "images.csv"
    table.write_text(table.read_text().replace(",003,", ", unlabelled,"))
    with pytest.raises(DataError, match=r"identity `unlabelled` stands for images without labels, but not for '3-1-0"):
        prepare(Run(tmp_path, source="csv", custom=Custom(table="images.csv", pattern="", test=0.5)))


def manifest_items(count=4):
    labelled = [Item(f"{n}.jpg", str(n), "c1", split) for n, split in enumerate(("train", "train", "query", "gallery"))]
    return [*labelled, *(Item(f"u{n}.jpg", UNLABELLED, "unknown", UNLABELLED) for n in range(count))]


def test_a_manifest_keeps_unlabelled_images_apart(tmp_path):
    manifest = Manifest(manifest_items(), tmp_path)
    assert manifest.indices(UNLABELLED).tolist() == [4, 5, 6, 7]
    assert manifest.train_identities == ("0", "1") and manifest.test_identities == {"2", "3"}
    assert manifest.known_identities == {"0", "1", "2", "3"}
    manifest.write(tmp_path / "m.csv")
    assert Manifest.read(tmp_path / "m.csv", tmp_path).items == manifest.items
    assert manifest.digest != Manifest(manifest_items(3), tmp_path).digest


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (Item("x.jpg", "7", "c1", "train"), "images of split unlabelled must come last"),
        (Item("x.jpg", "7", "c1", UNLABELLED), "stands for images without labels, but not for 'x.jpg'"),
        (Item("x.jpg", UNLABELLED, "c1", "train"), "stands for images without labels, but not for 'x.jpg'"),
        (Item("u1.jpg", UNLABELLED, "unknown", UNLABELLED), "listed more than once: u1.jpg"),
        (Item("3.jpg", UNLABELLED, "unknown", UNLABELLED), "listed more than once: 3.jpg"),
        (Item("../x.jpg", UNLABELLED, "unknown", UNLABELLED), "must be relative"),
    ],
)
def test_a_manifest_refuses_confused_unlabelled_images(item, problem, tmp_path):
    with pytest.raises(DataError, match=problem):
        Manifest([*manifest_items(), item], tmp_path)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("12345"), st.sampled_from(["c1", "c2", "unknown"]),
            st.sampled_from(["train", "validation-query", "validation-gallery", "query", "gallery"]),
        ),
        max_size=25,
    ),
    st.sampled_from(list(PROTOCOLS)),
)  # fmt: skip
def test_unlabelled_images_change_no_requirement(tmp_path_factory, labels, protocol):
    params = Run(tmp_path_factory.getbasetemp(), source="folder", protocol=protocol).params
    items = [Item(f"{number}.png", *label) for number, label in enumerate(labels)]
    more = [Item(f"u{number}.png", UNLABELLED, "unknown", UNLABELLED) for number in range(3)]
    assert list(problems([*items, *more], params)) == list(problems(items, params))
    assert list(warnings([*items, *more], params)) == list(warnings(items, params))


def of_hashes(split, hashes):
    return [
        (
            Item(f"{split}{number}.png", split, "unknown", split),
            DecodedImage(f"{pair} {flat}", pair, None, flat, ()),
        )
        for number, (pair, flat) in enumerate(hashes)
    ]


HASHES = st.lists(
    st.tuples(st.tuples(st.integers(0, 200), st.integers(2**64 - 99, 2**64 - 1)), st.booleans()), max_size=9
)


@settings(deadline=None, max_examples=100)
@given(HASHES, HASHES, HASHES, st.integers(-1, 6))
def test_look_alikes_are_those_of_a_slow_search(training, tested, without_labels, bits):
    pairs = [*of_hashes("train", training), *of_hashes("query", tested), *of_hashes(UNLABELLED, without_labels)]
    inspection = Inspection([item for item, _ in pairs], [image for _, image in pairs], [])

    def slow(references, images, equal):
        found = {}
        for item, image in images:
            equals = [other.name for other, known in references if known.pixels == image.pixels]
            distances = [
                min((known.hashes[0] ^ own).bit_count() for own in image.hashes)
                for _, known in references
                if not known.flat
            ]
            if equals:
                found |= {item.name: None} if equal else {}
            elif not image.flat and distances and min(distances) <= bits:
                found[item.name] = min(distances)
        return found

    by_split = [[pair for pair in pairs if pair[0].split == split] for split in ("train", "query", UNLABELLED)]
    near = {name: distance for _, name, distance in near_duplicates(inspection, bits)}
    textured = [(item, image) for item, image in by_split[0] if not image.flat]
    assert near == slow(textured, by_split[1], equal=False)
    copies = unlabelled_copies(inspection, bits)
    assert {name: distance for _, name, distance in copies} == slow(by_split[1], by_split[2], equal=True)
    assert len({name for _, name, _ in copies}) == len(copies)
