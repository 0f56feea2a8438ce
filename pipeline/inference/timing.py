"""Latency of ONNX files, measured in turns so that the files can be compared."""

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
"""Untimed calls of each file at the start, until memory arenas and clock frequency are stable."""

TURN_CALLS, TURN_WARM_UP = 5, 2
"""Timed calls in each turn of a file, and untimed calls before them.

With turns of a single call, the threads of one session were still spinning while the next session was timed: a file
with 43 % of the MACs measured 3.8 times as fast at batch 1 and 1.8 times at batch 32, but 1.7 and 2.2 times if each
file was timed alone. Consecutive calls are also how a file is used.
"""

PAUSE = 0.1
"""Seconds before each turn: threads of the other sessions keep spinning for a while, and with four files on two cores a
call took three times as long as alone.
"""

COMPARISON_CALLS = 100
"""Timed calls of each file in `gains`."""

CONFIDENCE = 0.95
"""Confidence level of the interval of a speedup."""
MIN_TURNS = 6
"""Turns that the interval needs: the range of five ratios covers the median with a probability of 94 % only."""
MAX_WIDTH = 0.2
"""Largest width of the interval of a speedup, as a share of the speedup; if it is wider, the machine was too noisy."""


@dataclass(frozen=True)
class Timing:
    """The latency of one file at one setting.

    Attributes:
        file: Name of the file in the argument of `measure`.
        batch: Images per call.
        threads: Intra-op threads, 0 for all.
        p50_ms: Median time of a call, milliseconds.
        p90_ms: 90th percentile, milliseconds.
        p99_ms: 99th percentile, milliseconds.
        spread: (p90 - p10) / p50.
        turns_ms: Median of each turn, in order; the turns of the same number of two files ran next to each other.
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
        """Throughput at the median latency."""
        return 1000 * self.batch / self.p50_ms


@dataclass(frozen=True)
class Gain:
    """The speedup of one file over another.

    Attributes:
        ratio: Ratio of the median latencies; above 1 if the file is faster.
        low: Lower end of the confidence interval (`CONFIDENCE`) of the median ratio over turns.
        high: Upper end.
        turns: Number of compared turns; with fewer than `MIN_TURNS` the interval is the range of all ratios.
    """

    ratio: float
    low: float
    high: float
    turns: int

    @property
    def conclusive(self) -> bool:
        """Whether the interval is narrow enough to report the speedup."""
        return self.turns >= MIN_TURNS and self.high - self.low <= MAX_WIDTH * self.ratio


def gain(slow: Timing, fast: Timing) -> Gain:
    """Compute the speedup of `fast` over `slow` at one setting, turn by turn.

    The interval is that of the sign test, from order statistics of the ratios, which needs no assumption about the
    distribution of the noise (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    ratios = sorted(before / after for before, after in zip(slow.turns_ms, fast.turns_ms, strict=True))
    index = max(int(binom.ppf((1 - CONFIDENCE) / 2, len(ratios), 0.5)) - 1, 0)
    ratio = slow.p50_ms / fast.p50_ms
    return Gain(ratio, min(ratios[index], ratio), max(ratios[-1 - index], ratio), len(ratios))


def measure(
    files: Mapping[str, Path],
    image_size: tuple[int, int],
    batches: Sequence[int],
    threads: Sequence[int],
    repeats: int,
) -> list[Timing]:
    """Time calls of ONNX files on the CPU.

    At each setting the files take turns of a few calls (see `TURN_CALLS`). The first file changes from round to round,
    and every second round runs in reverse, so a drift of the machine and the effect of the file before are the same for
    all files.

    Args:
        files: ONNX files by name, each with one input of float32 (B, 3, h, w).
        image_size: Height and width, pixels.
        batches: Images per call.
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
        for turn, done in enumerate(range(0, repeats, TURN_CALLS)):
            for name in _order(names, turn):
                sleep(PAUSE)
                _calls(sessions[name], feeds[name], TURN_WARM_UP)
                seconds[name].append(_calls(sessions[name], feeds[name], min(TURN_CALLS, repeats - done)))
        timings += [summarise(name, batch, count, seconds[name]) for name in names]
    return timings


def _order(names: Sequence[str], turn: int) -> list[str]:
    """Return the order of the files in a round: over all rounds, first places and orders of pairs are balanced."""
    first = turn // 2 % len(names)
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn % 2 else order


def gains(files: Mapping[str, bytes], reference: str, image_size: tuple[int, int], batch: int = 1) -> dict[str, Gain]:
    """Return the speedup of each file over a reference, for one batch with all threads.

    Args:
        files: Contents of the ONNX files by name.
        reference: Name of the file to compare with.
        image_size: Height and width, pixels.
        batch: Images per call.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(files)}
        for name, path in paths.items():
            path.write_bytes(files[name])
        timings = {timing.file: timing for timing in measure(paths, image_size, [batch], [0], COMPARISON_CALLS)}
    return {name: gain(timings[reference], timings[name]) for name in files}


def _calls(session: Any, feed: Mapping[str, npt.NDArray[np.float32]], number: int) -> list[float]:
    """Return the seconds that each of some consecutive calls took."""
    seconds = []
    for _ in range(number):
        start = perf_counter()
        session.run(None, feed)
        seconds.append(perf_counter() - start)
    return seconds


def summarise(file: str, batch: int, threads: int, turns: Sequence[Sequence[float]]) -> Timing:
    """Summarise the calls of one file at one setting; `turns` are the seconds of each call, by turn."""
    milliseconds = 1000 * np.concatenate([np.asarray(turn, np.float64) for turn in turns])
    p10, p50, p90, p99 = np.quantile(milliseconds, (0.1, 0.5, 0.9, 0.99)).tolist()
    medians = tuple(float(1000 * np.median(turn)) for turn in turns)
    return Timing(file, batch, threads, p50, p90, p99, (p90 - p10) / p50, medians)
