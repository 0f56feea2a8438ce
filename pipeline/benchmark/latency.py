"""How long ONNX files take, measured so that they can be compared."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.inference.session import open_session
from pipeline.progress import track

log = logging.getLogger(__name__)

WARM_UP = 5
"""Calls of each file before anything counts: memory arenas and clock frequency settle."""

BURST, SETTLE = 5, 2
"""Timed calls in a row before it is the next file's turn, and untimed ones before them.

Where files took turns call by call, the threads of one session were still spinning when the next was timed: a file of
43 % of the MACs came out 3.8 times as fast at batch 1 and 1.8 times at batch 32, where timing each alone gave 1.7 and
2.2. Calls in a row are also how a file is used.
"""

PAUSE = 0.1
"""Seconds before each turn: the threads of the sessions that ran before spin on for some time, and with four files on
two cores a call took three times as long as alone.
"""

COMPARED = 40
"""Timed calls of each file where only one is to be chosen."""

NOISY = 0.5
"""Spread above which a timing means little: something else used the machine."""


@dataclass(frozen=True)
class Timing:
    """One file at one setting.

    Attributes:
        file: Its key in `measure`'s argument.
        batch: Images a call.
        threads: Intra-op threads, 0 for all.
        p50_ms: Median time of a call, milliseconds.
        p90_ms: Nine calls in ten took at most this, milliseconds.
        spread: (p90 - p10) / p50; how far the middle four fifths of the calls lie apart.
    """

    file: str
    batch: int
    threads: int
    p50_ms: float
    p90_ms: float
    spread: float

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return 1000 * self.batch / self.p50_ms

    @property
    def noisy(self) -> bool:
        """Whether the calls differ too much for a conclusion."""
        return self.spread > NOISY


def measure(
    files: Mapping[str, Path],
    image_size: tuple[int, int],
    batches: Sequence[int],
    threads: Sequence[int],
    repeats: int,
) -> list[Timing]:
    """Time calls of ONNX files on the CPU.

    At each setting the files take turns of a few calls, each round begun by another file, so that a drift of the
    machine meets all of them alike. A turn begins with untimed calls (see `BURST`).

    Args:
        files: ONNX files by the name that the result has for them; each takes one float32 (B, 3, h, w).
        image_size: Height and width, pixels.
        batches: Images a call.
        threads: Intra-op threads, 0 for all that this process may use.
        repeats: Timed calls of each file at each setting.

    Returns:
        A timing for each setting and file: by threads, then batch, then file, in the order of the arguments.
    """
    settings = [(count, batch) for count in threads for batch in batches]
    pixels = np.random.default_rng(0).standard_normal((max(batches), 3, *image_size), dtype=np.float32)
    timings = []
    for count, batch in track(settings, total=len(settings), label="timing"):
        sessions = {name: open_session(path, count) for name, path in files.items()}
        feeds = {name: {session.get_inputs()[0].name: pixels[:batch]} for name, session in sessions.items()}
        names = list(files)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            _calls(sessions[name], feeds[name], WARM_UP)
        for turn, done in enumerate(range(0, repeats, BURST)):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                sleep(PAUSE)
                _calls(sessions[name], feeds[name], SETTLE)
                seconds[name] += _calls(sessions[name], feeds[name], min(BURST, repeats - done))
        timings += [summarise(name, batch, count, seconds[name]) for name in names]
    return timings


def speedups(files: Mapping[str, bytes], of: str, image_size: tuple[int, int]) -> dict[str, float]:
    """How much faster than one of some files the others are: ratio of p50, one image, all threads.

    Args:
        files: Content by name.
        of: Name of the one to compare with.
        image_size: As in `measure`.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(files)}
        for name, path in paths.items():
            path.write_bytes(files[name])
        timings = {timing.file: timing for timing in measure(paths, image_size, [1], [0], COMPARED)}
    return {name: timings[of].p50_ms / timings[name].p50_ms for name in files}


def _calls(session: Any, feed: Mapping[str, npt.NDArray[np.float32]], number: int) -> list[float]:
    """Seconds of each of some calls in a row."""
    seconds = []
    for _ in range(number):
        start = perf_counter()
        session.run(None, feed)
        seconds.append(perf_counter() - start)
    return seconds


def summarise(file: str, batch: int, threads: int, seconds: Sequence[float]) -> Timing:
    """Boil the calls of one file at one setting down.

    Args:
        file: Name of the file.
        batch: Images a call.
        threads: Intra-op threads, 0 for all.
        seconds: Time of each call, at least one.
    """
    p10, p50, p90 = 1000 * np.quantile(np.asarray(seconds, dtype=np.float64), (0.1, 0.5, 0.9))
    timing = Timing(file, batch, threads, float(p50), float(p90), float((p90 - p10) / p50))
    if timing.noisy:
        log.warning("%s, batch %d: calls differ by %.0f %%; is the machine busy?", file, batch, 100 * timing.spread)
    return timing
