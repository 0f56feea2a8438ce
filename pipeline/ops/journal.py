"""What happened, on disk first: a folder an execution, a line an event.

Stages append to it whatever becomes of MLflow; `delivery` tells MLflow, at once or later, and as often as it likes: an
event names its run by the execution's id and the number of its line, so nothing is told twice.
"""

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.files import Files, read_json, write_json
from pipeline.ops import execution
from pipeline.ops.execution import Execution
from pipeline.ops.locks import locked

DELIVERED, SETTLED = "delivered.json", "settled"
TICK = 0.002
"""Seconds between two events at least: MLflow lists runs by their start, in milliseconds."""
KEPT = 200
"""Executions whose journals are kept, the latest ones; older ones only until they are delivered."""


class Event(BaseModel):
    """One line.

    Attributes:
        kind: `open` an execution, `begin` or `end` a stage, a `curve`'s point, `tag` or summarise the execution.
        time: Seconds since 1970.
        stage: Whose; empty for the execution's own.
        name: Of the execution.
        root: Checkout that it ran in; MLflow is not told.
        tags: Of the run.
        params: Flattened, all of them.
        values: Figures by metric key.
        step: Of a curve's point.
        status: How a stage ended: FINISHED, FAILED or KILLED.
        folder: What a stage leaves for people, below `Journal.kept`.
        dataset: What the execution learned from.
        pid: Process that writes this.
        started: Its start, whole seconds since 1970.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["open", "begin", "curve", "end", "tag"]
    time: float
    stage: str = ""
    name: str = ""
    root: str = ""
    tags: dict[str, str] = {}
    params: dict[str, str] = {}
    values: dict[str, float] = {}
    step: int = 0
    status: str = ""
    folder: str = ""
    dataset: dict[str, str] = {}
    pid: int = 0
    started: int = 0


class Journal:
    """Events of one execution.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "events.jsonl"
        self._events: list[tuple[int, Event]] = []
        self._read = self._lines = 0
        self._reading = threading.Lock()

    @classmethod
    def of(cls, files: Files, owner: Execution) -> "Journal":
        """The one that an execution writes at present; a process may have had others before."""
        number = 1
        while (_home(files) / f"{owner.key}.{number}" / "closed").exists():
            number += 1
        return cls(_home(files) / f"{owner.key}.{number}")

    @property
    def owner(self) -> Execution:
        """The process that it belongs to."""
        return Execution.parse(self.folder.name.partition(".")[0])

    def append(self, kind: str, **content: Any) -> None:
        """Write one event, so that even after a power cut it is there in full or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "append.lock", "a journal's entry"), self._path.open("ab+") as file:
            events = self.events()
            moment = max(time.time(), events[-1][1].time + TICK if events else 0.0)
            event = Event.model_validate({"kind": kind, "time": moment, **content})
            line = json.dumps(event.model_dump(exclude_defaults=True)) + "\n"
            if file.tell() and not self._ends_whole(file):
                line = "\n" + line  # after what a crash left of a line, which then counts as none
            file.write(line.encode())
            file.flush()
            (self.folder / SETTLED).unlink(missing_ok=True)
            os.fsync(file.fileno())

    @staticmethod
    def _ends_whole(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return bool(file.read(1) == b"\n")

    def events(self) -> list[tuple[int, Event]]:
        """All events with the numbers of their lines."""
        with self._reading:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._read)
                    new = file.read()
            except FileNotFoundError:
                return []
            whole = new[: new.rfind(b"\n") + 1]
            for line in whole.split(b"\n")[:-1]:
                if (event := _parsed(line)) is not None:
                    self._events.append((self._lines, event))
                self._lines += 1
            self._read += len(whole)
            return list(self._events)

    @property
    def opening(self) -> Event | None:
        """Its first event; of a long journal nothing else is read."""
        try:
            with self._path.open("rb") as file:
                return _parsed(file.readline())
        except FileNotFoundError:
            return None

    @property
    def id(self) -> str:
        """Names the execution among all of the world."""
        return self.events()[0][1].tags["execution_id"]

    def open(self, name: str, tags: dict[str, str], params: dict[str, str], root: Path = Path()) -> None:
        """Begin it, if nobody has."""
        if not self.events():
            tags = {**tags, "execution_id": uuid.uuid4().hex}
            self.append("open", name=name, tags=tags, params=params, root=str(root))

    def close(self) -> None:
        """Nothing more belongs to this execution, though its process lives on."""
        if self.events():
            (self.folder / "closed").touch()

    @property
    def over(self) -> bool:
        """Whether nothing more will be written."""
        return (self.folder / "closed").exists() or not self.owner.alive

    # --- stages -------------------------------------------------------------------------------------------------------

    def outcomes(self) -> dict[str, str]:
        """How each stage ended in this execution, RUNNING where it has not."""
        found: dict[str, str] = {}
        for _, event in self.events():
            if event.kind in ("begin", "end"):
                found[event.stage] = event.status or "RUNNING"
        return found

    def running(self) -> bool:
        """Whether a stage is under way; ends those whose process is gone."""
        open_ones: dict[str, Event] = {}
        for _, event in self.events():
            if event.kind == "begin":
                open_ones[event.stage] = event
            elif event.kind == "end":
                open_ones.pop(event.stage, None)
        living = False
        for stage, begun in open_ones.items():
            if execution.alive(begun.pid, begun.started):
                living = True
            else:
                self.append("end", stage=stage, status="KILLED", tags={"error": "its process is gone"})
        return living

    def keep(self, files: Iterable[Path], name: str) -> str:
        """Hold on to what a stage left: a later run writes other files in its place.

        Args:
            files: What to hold on to.
            name: Of the folder below `kept`, and of that in the run's artifacts.

        Returns:
            The name.
        """
        target = self.kept / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in files:
            _link(file, target / file.name)
        return name

    @property
    def kept(self) -> Path:
        """Folder of what is to be uploaded."""
        return self.folder / "files"

    # --- what was delivered -------------------------------------------------------------------------------------------

    def delivered(self, uri: str) -> "Delivered":
        """How far a server was told."""
        try:
            found = Delivered.model_validate(read_json(self.folder / DELIVERED))
        except (OSError, ValueError):
            return Delivered(uri=uri)
        return found if found.uri == uri else Delivered(uri=uri)

    def note(self, delivered: "Delivered") -> None:
        """Remember that."""
        write_json(self.folder / DELIVERED, delivered.model_dump())

    @property
    def settled(self) -> bool:
        """Whether it was over and told, as far as anyone looked; whatever is written later unsettles it."""
        return (self.folder / SETTLED).exists()

    def settle(self) -> None:
        """Nobody needs to look at it again."""
        (self.folder / SETTLED).touch()

    def pending(self, uri: str) -> bool:
        """Whether there is something that a server was not told."""
        events = self.events()
        return bool(events) and events[-1][0] >= self.delivered(uri).lines


class Delivered(BaseModel):
    """What a server was told.

    Attributes:
        uri: Of the server.
        lines: Lines that were dealt with.
        runs: Run ids by number of the line that opened or began them.
    """

    uri: str
    lines: int = 0
    runs: dict[int, str] = {}


def journals(files: Files) -> Iterator[Journal]:
    """Those of all executions, the oldest first."""
    found = [Journal(path.parent) for path in _home(files).glob("*/events.jsonl")]
    begun = [(opening.time, number) for number, one in enumerate(found) if (opening := one.opening)]
    yield from (found[number] for _, number in sorted(begun))


def tidy(files: Files) -> None:
    """Drop the copies that were uploaded, and old journals that were delivered."""
    for number, journal in enumerate(reversed(list(journals(files)))):
        if journal.settled:
            shutil.rmtree(journal.folder if number >= KEPT else journal.kept, ignore_errors=True)


def _home(files: Files) -> Path:
    return files.tracking / "journal"


def _parsed(line: bytes) -> Event | None:
    try:
        return Event.model_validate(json.loads(line))
    except ValueError:  # half a line, or another version's
        return None


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is never written in place, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
