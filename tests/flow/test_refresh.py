"""New data are ingested completely, once, and without replacing files."""

import os
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from pipeline.config import Params
from pipeline.data import custom
from pipeline.data.manifest import Item
from pipeline.files import Files
from pipeline.flow import refresh as refresh_module
from pipeline.flow.refresh import RefreshError, RefusedError, check_incoming, ingest, refresh
from pipeline.stage.params_file import load


@pytest.fixture
def here(checkout: Files, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(checkout.root)
    text = checkout.params.read_text().replace("source: vehicles", "source: folder")
    checkout.params.write_text(text)
    return checkout


def arrive(files: Files, *names: str, age: float = 60, content: bytes = b"new") -> None:
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
    assert content(here.root / "data") == {"car 1/c1/é.jpg": b"new", "car 2/0.jpg": b"new"}
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
    monkeypatch.setattr(refresh_module, "MIN_AGE", 1.0)
    monkeypatch.setattr(refresh_module, "MAX_WAIT", 2.5)
    arrive(here, "young.jpg", age=0)
    arrive(here, "future.jpg", age=-3600)  # another machine's clock
    grows, ended = here.root / "incoming" / "grows.jpg", threading.Event()

    def grow() -> None:
        with grows.open("ab", buffering=0) as file:
            while not ended.wait(0.1):
                file.write(b"x")

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        assert refresh(here, load(here.params)) == ["future.jpg", "young.jpg"]
    finally:
        ended.set()
        writer.join()
    assert f"{grows} is not ingested: it is incomplete" in caplog.text
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
    move, moved = refresh_module._move, []

    def dies(old: Path, new: Path) -> None:
        if len(moved) == 1:
            new.write_bytes(old.read_bytes())  # copied, not yet deleted
            raise KeyboardInterrupt
        moved.append(old)
        move(old, new)

    monkeypatch.setattr(refresh_module, "_move", dies)
    with pytest.raises(KeyboardInterrupt):
        refresh(here, load(here.params))
    monkeypatch.setattr(refresh_module, "_move", move)
    assert refresh(here, load(here.params)) == ["2.jpg"]
    assert content(here.root / "data") == dict.fromkeys(("0.jpg", "1.jpg", "2.jpg"), b"new")
    assert not content(here.root / "incoming")


def test_files_are_copied_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(refresh_module.os, "rename", elsewhere)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    assert ingest([tmp_path / "in" / "a.jpg"], tmp_path / "in", tmp_path / "data") == ["a.jpg"]
    assert (content(tmp_path / "data"), content(tmp_path / "in")) == ({"a.jpg": b"x"}, {})


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
    assert data == {"1.jpg": b"old", "2.jpg": b"new", "more/a, b.jpg": b"new"}
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
        (listed.root / "data" / name).rename(listed.root / "incoming" / name)
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
        ("c1,1.jpg,8\n", r"1\.jpg is listed already, as 1\.jpg,007,c1"),
        ("c1,2.jpg,7\nc1,2.jpg,8\n", r"2\.jpg is listed already, as c1,2\.jpg,7"),
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
        (b"path,identity\n2.jpg,7\n", r"has the columns \['path', 'identity'\], but .*data/images\.csv has \['path'"),
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


def test_images_without_a_row_stay_and_are_reported(listed: Files, caplog: pytest.LogCaptureFixture) -> None:
    rows = (listed.root / "incoming" / "images.csv").read_bytes()
    (listed.root / "incoming" / "images.csv").unlink()
    assert refresh(listed, load(listed.params)) == []
    assert "2 files stay in" in caplog.text and "is missing or incomplete" in caplog.text
    arrive(listed, "3.jpg")
    arrive(listed, "images.csv", content=rows)
    assert refresh(listed, load(listed.params)) == ["2.jpg", "more/a, b.jpg"]
    assert "1 files stay in" in caplog.text and "the table does not list them, such as 3.jpg" in caplog.text
    assert set(content(listed.root / "incoming")) == {"3.jpg"}


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
    script = "import os, pathlib; p = pathlib.Path('incoming/x.jpg'); p.parent.mkdir(); p.touch(); os.utime(p, (1, 1))"
    params = load(here.params)
    command = f'python -c "{script}; print(3)"'
    with caplog.at_level("INFO"):
        found = refresh(
            here, params.model_copy(update={"retrain": params.retrain.model_copy(update={"refresh": command})})
        )
    assert found == ["x.jpg"]
    assert "3" in caplog.messages
