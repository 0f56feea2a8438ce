"""New data are ingested completely, once, and without replacing files."""

import errno
import io
import os
import stat
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Params
from pipeline.data import custom
from pipeline.data.manifest import Item
from pipeline.files import Files, write_text
from pipeline.flow import incoming
from pipeline.flow.incoming import RefreshError, RefusedError, ingest
from pipeline.flow.refresh import check_incoming, refresh
from pipeline.stage.params_file import load


def picture(color: int = 0) -> bytes:
    """Return a small PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (color, 100, 0)).save(file, "PNG")
    return file.getvalue()


NEW = picture()


@pytest.fixture
def here(checkout: Files, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(checkout.root)
    text = checkout.params.read_text().replace("source: vehicles", "source: folder")
    checkout.params.write_text(text)
    return checkout


def arrive(files: Files, *names: str, age: float = 60, content: bytes = NEW) -> None:
    for name in names:
        path = files.root / "incoming" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (time.time() - age,) * 2)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(files: Files, source: str, root: str = "data") -> Params:
    params = load(files.params)
    return params.model_copy(update={"data": params.data.model_copy(update={"source": source, "root": root})})


def test_files_keep_their_relative_paths_and_empty_folders_are_removed(here: Files) -> None:
    arrive(here, "car 1/c1/é.jpg", "car 2/0.jpg")
    assert refresh(here, load(here.params)) == ["car 1/c1/é.jpg", "car 2/0.jpg"]
    assert content(here.root / "data") == {"car 1/c1/é.jpg": NEW, "car 2/0.jpg": NEW}
    assert not list((here.root / "incoming").iterdir())
    assert refresh(here, load(here.params)) == []


def test_partial_hidden_and_irregular_files_are_not_ingested(here: Files) -> None:
    arrive(here, "a.jpg.part", ".hidden/b.jpg", "c.jpg")
    (here.root / "incoming" / "link.jpg").symlink_to(here.params)
    (here.root / "elsewhere").mkdir()
    (here.root / "incoming" / "folder").symlink_to(here.root / "elsewhere")
    assert refresh(here, load(here.params)) == ["c.jpg"]
    left = {path.name for path in (here.root / "incoming").rglob("*") if path.is_symlink() or not path.is_dir()}
    assert left == {"a.jpg.part", "b.jpg", "link.jpg", "folder"}


def test_refresh_waits_for_new_files_and_skips_growing_ones(
    here: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An event is sent right after the last file; a file missed by its run would wait until next Monday."""
    monkeypatch.setattr(incoming, "MIN_AGE", 1.0)
    monkeypatch.setattr(incoming, "MAX_WAIT", 2.5)
    arrive(here, "young.jpg", age=0)
    arrive(here, "future.jpg", age=-3600)  # another machine's clock
    grows, ended = here.root / "incoming" / "grows.jpg", threading.Event()

    def grow() -> None:
        with grows.open("ab", buffering=0) as file:
            file.write(NEW)
            while not ended.wait(0.1):
                file.write(b"x")

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        assert refresh(here, load(here.params)) == ["future.jpg", "young.jpg"]
    finally:
        ended.set()
        writer.join()
    assert f"1 file stays in {grows.parent}, such as grows.jpg: it is incomplete" in caplog.text
    assert refresh(here, load(here.params)) == ["grows.jpg"]


def test_nothing_is_moved_if_a_file_with_other_content_exists(here: Files) -> None:
    arrive(here, "0.jpg", "1.jpg")
    (here.root / "data").mkdir()
    (here.root / "data" / "1.jpg").write_bytes(b"old")
    with pytest.raises(
        RefreshError, match=r"data/1\.jpg exists with different content \(1 such files\), so nothing was moved"
    ):
        refresh(here, load(here.params))
    assert content(here.root / "data") == {"1.jpg": b"old"}
    assert len(content(here.root / "incoming")) == 2


def test_a_crash_between_two_files_loses_and_duplicates_nothing(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive(here, "0.jpg", "1.jpg", "2.jpg")
    move, moved = incoming._move, []

    def dies(old: Path, new: Path) -> None:
        if len(moved) == 1:
            new.write_bytes(old.read_bytes())  # copied, not yet deleted
            raise KeyboardInterrupt
        moved.append(old)
        move(old, new)

    monkeypatch.setattr(incoming, "_move", dies)
    with pytest.raises(KeyboardInterrupt):
        refresh(here, load(here.params))
    monkeypatch.setattr(incoming, "_move", move)
    assert refresh(here, load(here.params)) == ["2.jpg"]
    assert content(here.root / "data") == dict.fromkeys(("0.jpg", "1.jpg", "2.jpg"), NEW)
    assert not content(here.root / "incoming")


def test_files_are_copied_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(incoming.os, "rename", elsewhere)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    assert ingest([tmp_path / "in" / "a.jpg"], tmp_path / "in", tmp_path / "data") == ["a.jpg"]
    assert (content(tmp_path / "data"), content(tmp_path / "in")) == ({"a.jpg": b"x"}, {})


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.EACCES])
def test_files_are_moved_on_a_file_system_that_cannot_flush_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    assert ingest([tmp_path / "in" / "a.jpg"], tmp_path / "in", tmp_path / "data") == ["a.jpg"]
    write_text(tmp_path / "data" / "b.txt", "b")
    assert content(tmp_path / "data") == {"a.jpg": b"x", "b.txt": b"b"}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("vehicles", r"vehicles renders its own images; move them away, or set `data\.source` to folder or csv"),
        ("market1501", r"market1501 has a published list of its images; move them away"),
        ("veri776", r"veri776 has a published list"),
    ],
)
def test_new_images_for_a_fixed_data_set_are_rejected_before_anything_runs(
    checkout: Files, monkeypatch: pytest.MonkeyPatch, source: str, why: str
) -> None:
    monkeypatch.chdir(checkout.root)
    params = changed(checkout, source)
    check_incoming(checkout, params)
    assert refresh(checkout, params) == []
    arrive(checkout, "a.jpg")
    for call in (check_incoming, refresh):
        with pytest.raises(RefusedError, match=rf"holds 1 new files, but `data\.source` {why}"):
            call(checkout, params)
    check_incoming(checkout, changed(checkout, "folder"))
    check_incoming(checkout, changed(checkout, "csv"))
    assert set(content(checkout.root / "incoming")) == {"a.jpg"}


@pytest.mark.parametrize("root", ["incoming", "incoming/things"])
def test_a_data_root_inside_the_incoming_folder_is_rejected(here: Files, root: str) -> None:
    arrive(here, "things/1/a.jpg")
    params = changed(here, "folder", root=root)
    for call in (check_incoming, refresh):
        with pytest.raises(RefusedError, match=r"`data\.root` .* is in `retrain\.incoming`"):
            call(here, params)
    assert set(content(here.root / "incoming")) == {"things/1/a.jpg"}


TABLE = "path,identity,camera\r\n1.jpg,007,c1\r\n"
"""Table of the data set before; rewriting it would change its line endings."""


@pytest.fixture
def listed(checkout: Files, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Source csv with one image, and two new images with a table that lists the first one again."""
    monkeypatch.chdir(checkout.root)
    checkout.params.write_text(checkout.params.read_text().replace("source: vehicles", "source: csv"))
    (checkout.root / "data").mkdir()
    (checkout.root / "data" / "1.jpg").write_bytes(b"old")
    (checkout.root / "data" / "images.csv").write_bytes(TABLE.encode())
    arrive(checkout, "2.jpg", "more/a, b.jpg")
    rows = b'camera,path,identity\nc1,1.jpg,007\nc2,2.jpg,7\n,"more/a, b.jpg",8\n'
    arrive(checkout, "images.csv", content=rows)
    return checkout


def check_all_is_ingested(files: Files) -> None:
    data = content(files.root / "data")
    table = data.pop("images.csv").decode()
    assert table == TABLE + '2.jpg,7,c2\n"more/a, b.jpg",8,\n'
    assert data == {"1.jpg": b"old", "2.jpg": NEW, "more/a, b.jpg": NEW}
    assert custom.table(files.root / "data", load(files.params).data).items[1:] == [
        Item("2.jpg", "7", "c2", "unsplit"),
        Item("more/a, b.jpg", "8", "unknown", "unsplit"),
    ]
    assert not list((files.root / "incoming").iterdir())


def test_images_are_ingested_with_their_table_rows(listed: Files) -> None:
    assert refresh(listed, load(listed.params)) == ["2.jpg", "more/a, b.jpg"]
    check_all_is_ingested(listed)
    assert refresh(listed, load(listed.params)) == []


def interrupted(action: Callable[[], object], step: int, stop: Callable[[], object]) -> bool:
    """Stop `action` before (even) or after (odd) a change of the file system; return whether it got that far."""
    steps = count()
    originals = {name: getattr(os, name) for name in ("rename", "replace", "unlink")}

    def wrapped(name: str) -> Callable[..., None]:
        def change(*arguments: object, **options: object) -> None:
            if next(steps) == step:
                stop()
            originals[name](*arguments, **options)
            if next(steps) == step:
                stop()

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in originals:
            patch.setattr(os, name, wrapped(name))
        try:
            action()
        except KeyboardInterrupt:
            return True
    return False


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", range(10))
def test_an_interruption_at_any_step_loses_and_duplicates_nothing(listed: Files, step: int) -> None:
    def act() -> None:
        refresh(listed, load(listed.params))

    interrupted_there = interrupted(act, step, interrupt)
    assert interrupted_there is (step < 9)  # two images, the rows, a deleted temporary file, the new table
    refresh(listed, load(listed.params))
    check_all_is_ingested(listed)


@pytest.mark.parametrize("step", range(9))
def test_a_kill_at_any_step_loses_and_duplicates_nothing(listed: Files, step: int) -> None:
    if not (child := os.fork()):
        interrupted(lambda: refresh(listed, load(listed.params)), step, lambda: os._exit(9))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    refresh(listed, load(listed.params))
    for path in (listed.root / "data").glob(".images.csv.*.tmp"):
        path.unlink()
    check_all_is_ingested(listed)


def test_a_table_waits_for_incomplete_images(listed: Files, caplog: pytest.LogCaptureFixture) -> None:
    image = listed.root / "incoming" / "2.jpg"
    image.rename(image.with_name("2.jpg.part"))
    assert refresh(listed, load(listed.params)) == []
    assert "2.jpg is incomplete" in caplog.text
    assert (listed.root / "data" / "images.csv").read_bytes() == TABLE.encode()
    image.with_name("2.jpg.part").rename(image)
    os.utime(image, (1, 1))
    refresh(listed, load(listed.params))
    check_all_is_ingested(listed)


def test_the_first_table_becomes_the_table_of_the_data_set(listed: Files) -> None:
    for name in ("1.jpg", "images.csv"):
        (listed.root / "data" / name).unlink()
    arrive(listed, "1.jpg")
    rows = b'1.jpg,1,train\n2.jpg,2,query\n"more/a, b.jpg",2,gallery\n'
    arrive(listed, "images.csv", content=b"path,identity,split\n" + rows)
    assert refresh(listed, load(listed.params)) == ["1.jpg", "2.jpg", "more/a, b.jpg"]
    assert [item.split for item in custom.table(listed.root / "data", load(listed.params).data).items] == [
        "train",
        "query",
        "gallery",
    ]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("c1,1.jpg,8\n", r"1\.jpg is listed already, as 007, c1"),
        ("c1,2.jpg,7\nc1,2.jpg,8\n", r"2\.jpg is listed already, as 7, c1"),
        ("c1,2.jpg,7\nc1,3.jpg,7\n", r"the image of row c1,3\.jpg,7 is missing"),
        ("c1,../params.yaml,7\n", r"the image of row c1,\.\./params\.yaml,7 is missing"),
        ("c1,2.jpg\n", r"line 2: expected 3 fields"),
        ("c1,2.jpg,\n", r"line 2: path or identity is empty"),
    ],
)
def test_contradicting_rows_are_rejected_before_anything_is_moved(listed: Files, rows: str, why: str) -> None:
    arrive(listed, "images.csv", content=b"camera,path,identity\n" + rows.encode())
    before = content(listed.root)
    with pytest.raises(RefusedError, match=why + r".*; nothing was moved"):
        refresh(listed, load(listed.params))
    assert content(listed.root) == before


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (
            b"path,identity\n2.jpg,7\n",
            r"has the columns path, identity, but .*data/images\.csv has path, identity, camera",
        ),
        (b"path,identity,camera,split\n2.jpg,7,c1,train\n", r"has the columns"),
    ],
)
def test_a_table_with_other_columns_is_rejected(listed: Files, header: bytes, why: str) -> None:
    arrive(listed, "images.csv", content=header)
    with pytest.raises(RefusedError, match=why):
        refresh(listed, load(listed.params))
    assert (listed.root / "data" / "images.csv").read_bytes() == TABLE.encode()


def test_a_table_needs_a_split_for_all_images_or_none(listed: Files) -> None:
    (listed.root / "data" / "images.csv").write_text("path,identity,split\n1.jpg,7,train\n")
    arrive(listed, "images.csv", content=b"path,identity,split\n2.jpg,8,\n")
    with pytest.raises(RefusedError, match="give all one, or none; nothing was moved"):
        refresh(listed, load(listed.params))
    arrive(listed, "images.csv", content=b"path,identity,split\n2.jpg,8,query\n")
    assert refresh(listed, load(listed.params)) == ["2.jpg"]


def test_unlabelled_rows_are_ingested_whatever_their_identity(listed: Files) -> None:
    (listed.root / "data" / "images.csv").write_text("path,identity,split\n1.jpg,7,test\n")
    arrive(listed, "images.csv", content=b'path,identity,split\n2.jpg,7,unlabelled\n"more/a, b.jpg",,unlabelled\n')
    assert refresh(listed, load(listed.params)) == ["2.jpg", "more/a, b.jpg"]
    items = custom.table(listed.root / "data", load(listed.params).data).items[1:]
    assert {(item.identity, item.split) for item in items} == {("unlabelled", "unlabelled")}


def test_new_unlabelled_images_belong_to_no_identity(here: Files) -> None:
    arrive(here, "street/1.jpg", "street/north/2.jpg", "unlabelled/3.jpg", "car 1/c1/0.jpg", "car 2/c1/0.jpg")
    params = load(here.params)
    data = params.data.model_copy(update={"unlabelled": ["street", "unlabelled"]})
    assert len(refresh(here, params.model_copy(update={"data": data}))) == 5
    arrive(here, "unlabelled/4.jpg")
    with pytest.raises(
        RefusedError, match=r"beside car 1, car 2 and 1 more: list it in `data.unlabelled` if its images have "
    ):
        refresh(here, params)


def test_images_without_a_row_stay_and_are_reported(listed: Files, caplog: pytest.LogCaptureFixture) -> None:
    rows = (listed.root / "incoming" / "images.csv").read_bytes()
    (listed.root / "incoming" / "images.csv").unlink()
    assert refresh(listed, load(listed.params)) == []
    assert "2 files stay in" in caplog.text and "is missing or incomplete" in caplog.text
    arrive(listed, "3.jpg")
    arrive(listed, "images.csv", content=rows)
    assert refresh(listed, load(listed.params)) == ["2.jpg", "more/a, b.jpg"]
    assert "1 file stays in" in caplog.text and "such as 3.jpg: the table does not list it" in caplog.text
    assert set(content(listed.root / "incoming")) == {"3.jpg"}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("half.png", NEW[: len(NEW) // 2], "cannot be used"),
        ("empty.jpg", b"", "cannot be used"),
        ("notes.txt", b"hello", "cannot be used"),
        ("x\udcefy.png", NEW, "its name is not UTF-8, which DVC cannot store; rename it"),
    ],
)
def test_a_file_that_would_stop_later_stages_stays_and_is_reported_once(
    here: Files, caplog: pytest.LogCaptureFixture, name: str, content: bytes, why: str
) -> None:
    arrive(here, f"car 1/{name}", content=content)
    arrive(here, "car 1/good.png")
    for moved in (["car 1/good.png"], []):  # the next retraining goes on, too
        caplog.clear()
        assert refresh(here, load(here.params)) == moved
        (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
        shown = os.fsencode(name).decode(errors="backslashreplace")
        assert (
            warning.startswith(f"1 file stays in {here.root / 'incoming'}, such as car 1/{shown}: ") and why in warning
        )
    assert os.listdir(here.root / "incoming" / "car 1") == [name]
    assert os.listdir(here.root / "data" / "car 1") == ["good.png"]


def test_a_picture_moves_once_it_was_written_completely(here: Files) -> None:
    arrive(here, "1/a.png", content=NEW[:40])
    assert refresh(here, load(here.params)) == []
    arrive(here, "1/a.png")
    assert refresh(here, load(here.params)) == ["1/a.png"]


def test_broken_pictures_are_counted_by_reason(here: Files, caplog: pytest.LogCaptureFixture) -> None:
    noise = Image.effect_noise((64, 64), 50)
    noise.save(here.root / "whole.jpg")
    for number in range(20):  # the decoder's message has the number of bytes
        arrive(here, f"1/{number}.jpg", content=(here.root / "whole.jpg").read_bytes()[: 700 + 10 * number])
    arrive(here, "1/link.jpg")
    (here.root / "incoming" / "1" / "link.jpg").unlink()
    (here.root / "incoming" / "1" / "link.jpg").symlink_to(here.params)
    assert refresh(here, load(here.params)) == []
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "1 file stays" in warnings[0] and "it is a link; move the file itself there" in warnings[0]
    assert warnings[1].startswith("20 files stay in") and warnings[1].endswith("; replace or delete it")


def test_files_that_systems_leave_behind_stay_unmentioned(
    here: Files, checkout: Files, caplog: pytest.LogCaptureFixture
) -> None:
    left = ("._a.png", ".DS_Store", "1/Thumbs.db", "1/desktop.ini", "@eaDir/1/a.png", "__MACOSX/1/._a.png")
    arrive(here, *left, content=b"x")
    arrive(here, "1/a.png")
    assert refresh(here, load(here.params)) == ["1/a.png"]
    assert not caplog.text
    assert set(content(here.root / "incoming")) == set(left)
    check_incoming(here, changed(here, "vehicles"))  # they are no new images


def test_folders_of_the_system_stay_in_the_incoming_folder(here: Files) -> None:
    arrive(here, "1/a.png")
    (here.root / "incoming" / "lost+found").mkdir()  # the incoming folder may be a disk of its own
    (here.root / "incoming" / "2").mkdir()
    assert refresh(here, load(here.params)) == ["1/a.png"]
    assert [path.name for path in (here.root / "incoming").iterdir()] == ["lost+found"]


def test_the_same_name_in_another_unicode_normal_form_is_the_same_file(here: Files) -> None:
    composed, decomposed = "\u00e9/1.png", "e\u0301/1.png"  # as Linux and as macOS write it
    arrive(here, composed)
    assert refresh(here, load(here.params)) == [composed]
    arrive(here, decomposed)
    assert refresh(here, load(here.params)) == []
    assert set(content(here.root / "data")) == {composed}
    arrive(here, decomposed, content=picture(9))
    with pytest.raises(RefusedError, match="exists with different content"):
        refresh(here, load(here.params))
    arrive(here, composed, content=picture(9))
    arrive(here, "e\u0301/2.png", "\u00e9/2.png")
    (here.root / "data" / composed).unlink()
    with pytest.raises(RefusedError, match="twice, in two Unicode normal forms, so nothing was moved; rename one"):
        refresh(here, load(here.params))


def test_labels_of_unlabelled_rows_are_ignored(listed: Files) -> None:
    (listed.root / "data" / "3.png").write_bytes(picture(3))
    text = "path,identity,split\n1.jpg,7,train\n3.png,13,unlabelled\n"
    (listed.root / "data" / "images.csv").write_text(text)
    arrive(listed, "3.png", content=picture(3))
    arrive(listed, "images.csv", content=b"path,identity,split\n3.png,,unlabelled\n")
    assert refresh(listed, load(listed.params)) == []
    assert (listed.root / "data" / "images.csv").read_text() == text


@pytest.mark.parametrize(("there", "again"), [("\u00e9.png", "e\u0301.png"), ("e\u0301.png", "\u00e9.png")])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_row_in_another_unicode_normal_form_is_the_same_row(
    listed: Files, there: str, again: str, deleted: bool
) -> None:
    (listed.root / "data" / there).write_bytes(NEW)
    text = f"path,identity\n1.jpg,7\n{there},8\n"
    (listed.root / "data" / "images.csv").write_text(text)
    if deleted:
        (listed.root / "data" / there).unlink()
    arrive(listed, again)
    arrive(listed, "images.csv", content=f"path,identity\n{again},8\n".encode())
    assert refresh(listed, load(listed.params)) == ([again] if deleted else [])
    assert (listed.root / "data" / "images.csv").read_text() == text
    assert [item.identity for item in custom.table(listed.root / "data", changed(listed, "csv").data).items] == [
        "7",
        "8",
    ]
    assert set(content(listed.root / "incoming")) == {"2.jpg", "more/a, b.jpg"}  # no row lists them
    arrive(listed, "images.csv", content=f"path,identity\n{again},9\n".encode())
    with pytest.raises(RefusedError, match="is listed already, as 8"):
        refresh(listed, load(listed.params))


def test_a_new_row_has_the_spelling_of_the_file_that_is_there(listed: Files) -> None:
    composed, decomposed = "\u00e9.png", "e\u0301.png"
    (listed.root / "data" / composed).write_bytes(NEW)  # moved before an interruption, or not listed yet
    (listed.root / "data" / "images.csv").write_text("path,identity\n1.jpg,7\n")
    arrive(listed, decomposed)
    rows = f"path,identity\n{decomposed},8\n{composed},8\n"
    arrive(listed, "images.csv", content=rows.encode())
    assert refresh(listed, load(listed.params)) == []
    assert (listed.root / "data" / "images.csv").read_text() == f"path,identity\n1.jpg,7\n{composed},8\n"
    assert not (listed.root / "incoming" / decomposed).exists()


def test_a_label_with_a_space_keeps_its_folder(here: Files) -> None:
    arrive(here, "car1 /a.png", "car1/b.png")
    refresh(here, load(here.params))
    assert set(content(here.root / "data")) == {"car1 /a.png", "car1/b.png"}  # stage prepare trims labels


def test_a_folder_in_the_place_of_a_file_is_one_sentence(here: Files) -> None:
    (here.root / "data" / "1.png").mkdir(parents=True)
    arrive(here, "1.png")
    with pytest.raises(RefusedError, match=r"1\.png exists with different content"):
        refresh(here, load(here.params))
    (here.root / "data" / "2").write_bytes(b"")
    (here.root / "incoming" / "1.png").unlink()
    arrive(here, "2/a.png")
    with pytest.raises(RefreshError, match=r"new files could not be moved to .*data \((Not a directory|File exists)"):
        refresh(here, load(here.params))


def test_a_data_set_that_is_only_in_dvc_is_not_replaced_by_the_new_files(here: Files) -> None:
    (here.root / "data.dvc").write_text("outs:\n- md5: a.dir\n  path: data\n")
    arrive(here, "1/a.png")
    with pytest.raises(RefusedError, match=r"data is in DVC, but not in this checkout; run `dvc pull data\.dvc`"):
        refresh(here, load(here.params))
    assert set(content(here.root / "incoming")) == {"1/a.png"}


def test_a_table_waits_for_broken_pictures(listed: Files, caplog: pytest.LogCaptureFixture) -> None:
    arrive(listed, "2.jpg", content=NEW[:30])
    for _ in range(2):
        assert refresh(listed, load(listed.params)) == []
    assert "such as 2.jpg: it cannot be used" in caplog.text and "images.csv waits for the pictures" in caplog.text
    assert (listed.root / "data" / "images.csv").read_bytes() == TABLE.encode()
    arrive(listed, "2.jpg")
    refresh(listed, load(listed.params))
    check_all_is_ingested(listed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,identity,camera\n1.jpg,007,c1\n", "2.jpg,8,c2\n"),
        ("\ufeffsep=;\r\nPath;Identity;Camera\r\n1.jpg;007;c1", "\n2.jpg;8;c2\n"),  # Excel
        ("path\tidentity\tcamera\n1.jpg\t007\tc1\n", "2.jpg\t8\tc2\n"),
        (",path,identity,camera,colour\n0,1.jpg,007,c1,red\n", ",2.jpg,8,c2,\n"),  # pandas
    ],
    ids=["plain", "Excel", "tabs", "pandas"],
)
def test_rows_are_appended_in_the_form_of_the_table(listed: Files, text: str, expected: str) -> None:
    (listed.root / "data" / "images.csv").write_bytes(text.encode())
    arrive(listed, "2.jpg")
    arrive(listed, "images.csv", content=b"Camera;Path;Identity\r\nc2;2.jpg;8\r\n")
    assert refresh(listed, load(listed.params)) == ["2.jpg"]
    assert (listed.root / "data" / "images.csv").read_bytes().decode() == text + expected


def test_boxes_of_one_picture_are_rows_of_their_own(listed: Files) -> None:
    head = "path,identity,x,y,width,height\n"
    Image.new("RGB", (20, 20)).save(listed.root / "data" / "1.jpg")
    (listed.root / "data" / "images.csv").write_text(head + "1.jpg,7,0,0,9,9\n")
    arrive(listed, "images.csv", content=(head + "1.jpg,8,5,0,9,9\n1.jpg,7, 0,0,9,9\n").encode())
    assert refresh(listed, load(listed.params)) == []
    assert (listed.root / "data" / "images.csv").read_text() == head + "1.jpg,7,0,0,9,9\n1.jpg,8,5,0,9,9\n"
    arrive(listed, "images.csv", content=(head + "1.jpg,9,5,0,9,9\n").encode())
    with pytest.raises(RefusedError, match=r"1\.jpg is listed already, as 8; nothing was moved"):
        refresh(listed, load(listed.params))


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (
            "python -c 'import sys; print(\"no network\"); sys.exit(7)'",
            r"`retrain\.refresh` failed with exit code 7: no network",
        ),
        ("no-such-program", r"`retrain\.refresh` failed with exit code \d+"),
    ],
)
def test_the_error_of_a_failed_command_has_its_exit_code_and_last_line(here: Files, command: str, why: str) -> None:
    params = load(here.params)
    params = params.model_copy(update={"retrain": params.retrain.model_copy(update={"refresh": command})})
    arrive(here, "a.jpg")
    with pytest.raises(RefreshError, match=why):
        refresh(here, params)
    assert not (here.root / "data").exists()


def test_a_command_is_ended_at_the_time_limit(here: Files) -> None:
    params = load(here.params)
    command = "python -c \"import time; print('fetching', flush=True); time.sleep(600)\""
    retrain = params.retrain.model_copy(update={"refresh": command, "limit_hours": 2 / 3600})
    with pytest.raises(RefreshError, match=r"did not end within .* hours; raise .*limit_hours"):
        refresh(here, params.model_copy(update={"retrain": retrain}))


def test_files_fetched_by_the_command_are_ingested(here: Files, caplog: pytest.LogCaptureFixture) -> None:
    arrive(here, "1/x.png")
    (here.root / "incoming").rename(here.root / "elsewhere")
    script = "import os; os.rename('elsewhere', 'incoming')"
    params = load(here.params)
    command = f'python -c "{script}; print(3)"'
    with caplog.at_level("INFO"):
        found = refresh(
            here, params.model_copy(update={"retrain": params.retrain.model_copy(update={"refresh": command})})
        )
    assert found == ["1/x.png"]
    assert "3" in caplog.messages
