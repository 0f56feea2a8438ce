"""How long ONNX files take, measured so that they can be compared."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from pipeline.inference.session import open_session
from pipeline.progress import track

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

COMPARED = 100
"""Timed calls of each file where only one is to be chosen."""

CONFIDENCE = 0.95
"""Of the interval of a ratio."""
UNCERTAIN = 0.2
"""Share of a ratio that its interval may span; where it is wider, the machine was too noisy for a number."""


@dataclass(frozen=True)
class Timing:
    """One file at one setting.

    Attributes:
        file: Its key in `measure`'s argument.
        batch: Images a call.
        threads: Intra-op threads, 0 for all.
        p50_ms: Median time of a call, milliseconds.
        p90_ms: Nine calls in ten took at most this, milliseconds.
        p99_ms: Likewise 99 in a hundred.
        spread: (p90 - p10) / p50; how far the middle four fifths of the calls lie apart.
        turns_ms: Median of each turn, in order; another file's turn of the same number met the same state of the
            machine.
    """

    file: str
    batch: int
    threads: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    spread: float
    turns_ms: tuple[float, ...]

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return 1000 * self.batch / self.p50_ms


@dataclass(frozen=True)
class Gain:
    """How many times as fast one file is as another.

    Attributes:
        ratio: Of their p50.
        low: Lower end of an interval for the median ratio of turns (`CONFIDENCE`).
        high: Upper end.
        turns: That were compared; fewer than six allow no such interval, which is from least to greatest then.
    """

    ratio: float
    low: float
    high: float
    turns: int

    @property
    def conclusive(self) -> bool:
        """Whether the ratio is known well enough to be told."""
        return self.turns >= LEAST_TURNS and self.high - self.low <= UNCERTAIN * self.ratio


def gain(slow: Timing, fast: Timing) -> Gain:
    """Compare two files at one setting, turn by turn.

    The interval is that of the sign test, from order statistics of the ratios: it assumes nothing about how noise is
    distributed (Conover, Practical Nonparametric Statistics, 3.2).

    Args:
        slow: What is compared with.
        fast: What may be faster.
    """
    ratios = sorted(left / right for left, right in zip(slow.turns_ms, fast.turns_ms, strict=True))
    cut = max(int(binom.ppf((1 - CONFIDENCE) / 2, len(ratios), 0.5)) - 1, 0)
    ratio = slow.p50_ms / fast.p50_ms
    return Gain(ratio, min(ratios[cut], ratio), max(ratios[-1 - cut], ratio), len(ratios))


LEAST_TURNS = 6
"""With five, least and greatest ratio hold the median in 94 % of the cases."""


def measure(
    files: Mapping[str, Path],
    image_size: tuple[int, int],
    batches: Sequence[int],
    threads: Sequence[int],
    repeats: int,
) -> list[Timing]:
    """Time calls of ONNX files on the CPU.

    At each setting the files take turns of a few calls, each round begun by another file and every other round the
    other way about, so that a drift of the machine, and what a file leaves to the next one, meets all of them alike.
    A turn begins with untimed calls (see `BURST`).

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
        seconds: dict[str, list[list[float]]] = {name: [] for name in names}
        for name in names:
            _calls(sessions[name], feeds[name], WARM_UP)
        for turn, done in enumerate(range(0, repeats, BURST)):
            for name in _order(names, turn):
                sleep(PAUSE)
                _calls(sessions[name], feeds[name], SETTLE)
                seconds[name].append(_calls(sessions[name], feeds[name], min(BURST, repeats - done)))
        timings += [summarise(name, batch, count, seconds[name]) for name in names]
    return timings


def _order(names: Sequence[str], turn: int) -> list[str]:
    """Whose turn it is in one round: each begins equally often, and each pair goes both ways equally often."""
    first = turn // 2 % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn % 2 else order


def gains(files: Mapping[str, bytes], of: str, image_size: tuple[int, int]) -> dict[str, Gain]:
    """How much faster than one of some files each of them is, on one image with all threads.

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
    return {name: gain(timings[of], timings[name]) for name in files}


def _calls(session: Any, feed: Mapping[str, npt.NDArray[np.float32]], number: int) -> list[float]:
    """Seconds of each of some calls in a row."""
    seconds = []
    for _ in range(number):
        start = perf_counter()
        session.run(None, feed)
        seconds.append(perf_counter() - start)
    return seconds


def summarise(file: str, batch: int, threads: int, turns: Sequence[Sequence[float]]) -> Timing:
    """Boil the calls of one file at one setting down.

    Args:
        file: Name of the file.
        batch: Images a call.
        threads: Intra-op threads, 0 for all.
        turns: Seconds of each call, by turn; at least one.
    """
    milliseconds = 1000 * np.concatenate([np.asarray(turn, np.float64) for turn in turns])
    p10, p50, p90, p99 = np.quantile(milliseconds, (0.1, 0.5, 0.9, 0.99)).tolist()
    medians = tuple(float(1000 * np.median(turn)) for turn in turns)
    return Timing(file, batch, threads, p50, p90, p99, (p90 - p10) / p50, medians)
