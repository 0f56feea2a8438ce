"""The journal: whole lines or none, in order, whatever happens to whoever writes them."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.files import Files
from pipeline.ops.execution import Execution
from pipeline.ops.journal import Journal, journals, tidy


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, tmp_path)


def mine(files: Files) -> Journal:
    return Journal.of(files, Execution.of("flow", psutil.Process()))


def opened(files: Files, owner: Execution) -> Journal:
    journal = Journal.of(files, owner)
    journal.open("a run", {}, {})
    return journal


def test_half_a_line_of_a_crash_counts_as_none_and_hides_no_later_one(files: Files) -> None:
    journal = opened(files, Execution("dvc", 1, 1))
    with (journal.folder / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "begin", "time": 1, "sta')
    assert [event.kind for _, event in journal.events()] == ["open"]
    journal.append("begin", stage="teacher")
    expected = [(0, "open"), (2, "begin")]
    assert [(number, event.kind) for number, event in journal.events()] == expected
    assert [(number, event.kind) for number, event in Journal(journal.folder).events()] == expected


WRITER = """
import sys
from pathlib import Path
from pipeline.ops.journal import Journal
journal = Journal(Path(sys.argv[1]))
for step in range(50):
    journal.append("curve", stage=sys.argv[2], step=step, values={"x": float("nan")})
"""


def test_several_may_write_at_once(files: Files) -> None:
    journal = opened(files, Execution("dvc", 1, 1))
    words = [sys.executable, "-c", WRITER, str(journal.folder)]
    writers = [subprocess.Popen([*words, name]) for name in ("a", "b", "c")]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for name in ("a", "b", "c"):
        assert [event.step for _, event in journal.events() if event.stage == name] == list(range(50))


def test_an_execution_that_was_closed_makes_room_for_another_of_the_same_process(files: Files) -> None:
    owner = Execution.of("flow", psutil.Process())
    first = opened(files, owner)
    assert not first.over
    assert Journal.of(files, owner).folder == first.folder
    first.close()
    assert first.over
    second = opened(files, owner)
    assert second.folder != first.folder
    assert second.owner == owner
    assert second.id != first.id
    assert [one.folder for one in journals(files)] == [first.folder, second.folder]


def test_a_stage_whose_process_is_gone_was_killed(files: Files) -> None:
    journal = opened(files, Execution("dvc", 1, 1))
    journal.append("begin", stage="prepare")
    journal.append("end", stage="prepare", status="FINISHED")
    journal.append("begin", stage="teacher", pid=os.getpid(), started=int(psutil.Process().create_time()))
    assert journal.running()
    assert journal.outcomes() == {"prepare": "FINISHED", "teacher": "RUNNING"}
    journal.append("end", stage="teacher", status="FINISHED")
    journal.append("begin", stage="student", pid=os.getpid(), started=1)
    assert not journal.running()
    assert journal.outcomes() == {"prepare": "FINISHED", "teacher": "FINISHED", "student": "KILLED"}


def test_copies_go_once_they_were_uploaded_and_old_journals_once_they_were_told(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ops.journal.KEPT", 2)
    (files.root / "left").mkdir()
    (files.root / "left" / "model.onnx").write_text("onnx")
    made = [opened(files, Execution("dvc", 1, number)) for number in range(4)]
    for journal in made:
        journal.append("tag", folder=journal.keep((files.root / "left").iterdir(), "export"))
    for journal in made[1:]:
        journal.settle()
    tidy(files)
    assert [journal.folder.is_dir() for journal in made] == [True, False, True, True]
    assert [journal.kept.is_dir() for journal in made] == [True, False, False, False]
    assert (files.root / "left" / "model.onnx").read_text() == "onnx"
    made[3].append("tag")
    assert not made[3].settled
