"""New data come in whole, once, and in nobody's place."""

import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.files import Files
from pipeline.ops import refresh as room
from pipeline.ops.params import load
from pipeline.ops.refresh import RefreshError, refresh, take_in


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


def test_files_are_moved_under_their_names_and_empty_folders_go(here: Files) -> None:
    arrive(here, "car 1/c1/é.jpg", "car 2/0.jpg")
    assert refresh(here, load(here.params)) == ["car 1/c1/é.jpg", "car 2/0.jpg"]
    assert content(here.root / "data") == {"car 1/c1/é.jpg": b"new", "car 2/0.jpg": b"new"}
    assert not list((here.root / "incoming").iterdir())
    assert refresh(here, load(here.params)) == []


def test_what_is_not_whole_waits_and_what_is_no_file_stays(here: Files) -> None:
    arrive(here, "a.jpg.part", ".hidden/b.jpg", "c.jpg")
    (here.root / "incoming" / "link.jpg").symlink_to(here.params)
    (here.root / "elsewhere").mkdir()
    (here.root / "incoming" / "folder").symlink_to(here.root / "elsewhere")
    assert refresh(here, load(here.params)) == ["c.jpg"]
    left = {path.name for path in (here.root / "incoming").rglob("*") if path.is_symlink() or not path.is_dir()}
    assert left == {"a.jpg.part", "b.jpg", "link.jpg", "folder"}


def test_young_files_are_waited_for_and_those_that_grow_are_left(
    here: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An event comes right after the last file; what it does not find would lie there until next Monday."""
    monkeypatch.setattr(room, "SETTLED", 1.0)
    monkeypatch.setattr(room, "PATIENCE", 2.5)
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
    assert f"{grows} stays where it is: still written" in caplog.text
    assert refresh(here, load(here.params)) == ["grows.jpg"]


def test_nothing_is_moved_if_one_would_take_anothers_place(here: Files) -> None:
    arrive(here, "0.jpg", "1.jpg")
    (here.root / "data").mkdir()
    (here.root / "data" / "1.jpg").write_bytes(b"old")
    with pytest.raises(
        RefreshError, match=r"data/1\.jpg exists with another content \(1 such files\); nothing was moved"
    ):
        refresh(here, load(here.params))
    assert content(here.root / "data") == {"1.jpg": b"old"}
    assert len(content(here.root / "incoming")) == 2


def test_a_crash_between_two_files_loses_and_doubles_nothing(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive(here, "0.jpg", "1.jpg", "2.jpg")
    move, moved = room._move, []

    def dies(path: Path, place: Path) -> None:
        if len(moved) == 1:
            place.write_bytes(path.read_bytes())  # copied, not yet taken away
            raise KeyboardInterrupt
        moved.append(path)
        move(path, place)

    monkeypatch.setattr(room, "_move", dies)
    with pytest.raises(KeyboardInterrupt):
        refresh(here, load(here.params))
    monkeypatch.setattr(room, "_move", move)
    assert refresh(here, load(here.params)) == ["2.jpg"]
    assert content(here.root / "data") == dict.fromkeys(("0.jpg", "1.jpg", "2.jpg"), b"new")
    assert not content(here.root / "incoming")


def test_another_file_system_is_copied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(room.os, "rename", elsewhere)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    assert take_in([tmp_path / "in" / "a.jpg"], tmp_path / "in", tmp_path / "data") == ["a.jpg"]
    assert (content(tmp_path / "data"), content(tmp_path / "in")) == ({"a.jpg": b"x"}, {})


def test_images_for_the_rendered_set_are_refused(checkout: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout.root)
    assert refresh(checkout, load(checkout.params)) == []
    arrive(checkout, "a.jpg")
    with pytest.raises(RefreshError, match=r"holds 1 files, but `data\.source` vehicles renders its own"):
        refresh(checkout, load(checkout.params))


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("python -c 'import sys; print(\"no network\"); sys.exit(7)'", r"`retrain\.refresh` ended with 7: no network"),
        ("no-such-program", r"`retrain\.refresh` ended with \d+"),
    ],
)
def test_a_command_that_fails_says_how(here: Files, command: str, why: str) -> None:
    params = load(here.params)
    params = params.model_copy(update={"retrain": params.retrain.model_copy(update={"refresh": command})})
    arrive(here, "a.jpg")
    with pytest.raises(RefreshError, match=why):
        refresh(here, params)
    assert not (here.root / "data").exists()


def test_a_command_that_hangs_is_ended(here: Files) -> None:
    params = load(here.params)
    command = "python -c \"import time; print('fetching', flush=True); time.sleep(600)\""
    retrain = params.retrain.model_copy(update={"refresh": command, "limit_hours": 2 / 3600})
    with pytest.raises(RefreshError, match=r"did not end within .* hours .*limit_hours"):
        refresh(here, params.model_copy(update={"retrain": retrain}))


def test_what_the_command_fetches_is_taken_in(here: Files, caplog: pytest.LogCaptureFixture) -> None:
    script = "import os, pathlib; p = pathlib.Path('incoming/x.jpg'); p.parent.mkdir(); p.touch(); os.utime(p, (1, 1))"
    params = load(here.params)
    command = f'python -c "{script}; print(3)"'
    with caplog.at_level("INFO"):
        found = refresh(
            here, params.model_copy(update={"retrain": params.retrain.model_copy(update={"refresh": command})})
        )
    assert found == ["x.jpg"]
    assert "3" in caplog.messages
