"""The report's tables about time, memory and size."""

from collections.abc import Mapping, Sequence

from pipeline.benchmark.footprint import Footprint
from pipeline.benchmark.table import HEADLINE, STUDENT, gains, setting
from pipeline.inference.timing import Gain, Timing
from pipeline.report.html import Table
from pipeline.report.numbers import percent, times

INCONCLUSIVE = "inconclusive"
MIB = 2**20


def speedups(timings: Sequence[Timing], ideal: float) -> Table:
    """How much faster than the teacher, setting by setting.

    Args:
        timings: Of all files.
        ideal: Ratio of MACs.
    """
    compared = gains(timings)
    settings = dict.fromkeys((timing.batch, timing.threads) for timing in timings)
    table = []
    for batch, threads in settings:
        found = {file: by_setting[setting(batch, threads)] for file, by_setting in compared.items()}
        student = found[STUDENT]
        realised = percent(student.ratio / ideal) if student.conclusive else ""
        cells = [cell for file in found for cell in (told(found[file]), interval(found[file]))]
        table.append((f"batch {batch}, {_threads(threads)}", *cells, times(ideal), realised))
    header = [heading for file in compared for heading in (file, "95 % interval")]
    return Table(
        "Times as fast as the teacher; the student realises a share of the ratio of MACs",
        ("", *header, "ratio of MACs", "realised"),
        table,
    )


def latencies(timings: Sequence[Timing]) -> Table:
    """What was measured."""
    return Table(
        "Milliseconds a call. Spread: the middle four fifths of the calls lie this far apart, as a share of p50",
        ("", "p50", "p90", "p99", "spread", "images / s"),
        [
            (
                f"{timing.file}, batch {timing.batch}, {_threads(timing.threads)}",
                *(f"{value:.2f}" for value in (timing.p50_ms, timing.p90_ms, timing.p99_ms)),
                percent(timing.spread),
                f"{timing.images_per_second:,.0f}",
            )
            for timing in timings
        ],
    )


def sizes(footprints: Mapping[str, Footprint], batch: int) -> Table:
    """What the files cost besides time."""
    return Table(
        f"Memory: peak of loading a file and one call with batch {batch}. Slow layout: convolutions in floats that "
        "ONNX Runtime does not run on blocks of channels on this machine",
        ("", "file", "memory", "slow layout"),
        [
            (
                name,
                f"{found.bytes / MIB:.2f} MiB",
                "unknown" if found.memory is None else f"{found.memory / MIB:.0f} MiB",
                ", ".join(found.plain_layers) or "none",
            )
            for name, found in footprints.items()
        ],
    )


def told(gain: Gain) -> str:
    """A ratio, if the machine was quiet enough to tell one."""
    return times(gain.ratio) if gain.conclusive else INCONCLUSIVE


def interval(gain: Gain) -> str:
    """Where the ratio lies."""
    return f"{gain.low:.2f} to {gain.high:.2f}"


def headline(timings: Sequence[Timing]) -> Gain:
    """Student against teacher, one image, all threads."""
    return gains(timings)[STUDENT][HEADLINE]


def _threads(number: int) -> str:
    return {0: "all threads", 1: "1 thread"}.get(number, f"{number} threads")
