"""Timing of ONNX files, with a fake clock and fake sessions."""

from collections import Counter
from itertools import pairwise
from math import comb
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis.strategies import floats, lists

from pipeline.inference import timing
from pipeline.inference.timing import (
    MIN_TURNS,
    TURN_CALLS,
    TURN_WARM_UP,
    WARM_UP,
    Timing,
    gain,
    gains,
    measure,
    summarise,
)

MILLISECONDS = {"teacher": 4.0, "student": 1.5}
FILES = {name: Path(f"{name}.onnx") for name in MILLISECONDS}


class Machine:
    """A clock that advances in calls only, by `MILLISECONDS` per image."""

    def __init__(self):
        self.now = 0.0
        self.calls = []
        self.opened = []

    def perf_counter(self):
        return self.now

    def open_session(self, path, threads=0):
        self.opened.append((path.stem, threads))

        def run(outputs, feed):
            (pixels,) = feed.values()
            assert list(feed) == ["image"]
            assert pixels.dtype == "float32"
            self.calls.append((path.stem, threads, pixels.shape))
            self.now += MILLISECONDS[path.stem] * len(pixels) / 1000

        return SimpleNamespace(run=run, get_inputs=lambda: [SimpleNamespace(name="image")])


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(timing, "perf_counter", machine.perf_counter)
    monkeypatch.setattr(timing, "open_session", machine.open_session)
    return machine


def test_every_file_is_timed_at_every_setting_in_order(machine):
    timings = measure(FILES, (8, 6), batches=[1, 3], threads=[0, 2], repeats=4)
    assert [(t.threads, t.batch, t.file) for t in timings] == [
        (threads, batch, name) for threads in (0, 2) for batch in (1, 3) for name in FILES
    ]
    for result in timings:
        expected = MILLISECONDS[result.file] * result.batch
        assert (result.p50_ms, result.p90_ms) == (pytest.approx(expected), pytest.approx(expected))
        assert result.spread == pytest.approx(0, abs=1e-9)
        assert result.images_per_second == pytest.approx(1000 / MILLISECONDS[result.file])
    assert {shape for _, _, shape in machine.calls} == {(1, 3, 8, 6), (3, 3, 8, 6)}
    assert set(machine.opened) == {(name, threads) for name in FILES for threads in (0, 2)}


def test_files_take_turns_that_begin_with_untimed_calls(machine):
    repeats = TURN_CALLS + 2
    measure(FILES, (4, 4), batches=[1], threads=[0], repeats=repeats)
    names = [name for name, _, _ in machine.calls]
    # warm-up; first round: teacher, student; second round, two timed calls left: student, teacher
    expected = ["teacher"] * WARM_UP + ["student"] * WARM_UP
    expected += ["teacher"] * (TURN_WARM_UP + TURN_CALLS) + ["student"] * (TURN_WARM_UP + TURN_CALLS)
    expected += ["student"] * (TURN_WARM_UP + 2) + ["teacher"] * (TURN_WARM_UP + 2)
    assert names == expected


def test_first_places_and_orders_of_pairs_are_balanced():
    orders = [timing._order("abc", turn) for turn in range(6)]
    assert Counter(order[0] for order in orders) == dict.fromkeys("abc", 2)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert all(pairs[a, b] == pairs[b, a] for a, b in pairs)


def test_the_requested_number_of_calls_is_timed(machine, monkeypatch):
    counted = Counter()
    monkeypatch.setattr(
        timing, "summarise", lambda file, batch, threads, turns: counted.update({file: sum(map(len, turns))})
    )
    monkeypatch.setattr(timing, "WARM_UP", 40)
    measure(FILES, (4, 4), batches=[1], threads=[0], repeats=13)
    assert counted == {"teacher": 13, "student": 13}


def test_quantiles_spread_and_turns_of_one_to_eleven_milliseconds():
    timing = summarise("f", 2, 0, [[n / 1000 for n in (7, 1, 11, 3, 5, 9)], [n / 1000 for n in (2, 10, 4, 8, 6)]])
    # eleven values: the q-quantile is the value at place 10 q, so 1 + 10 q
    assert timing.p50_ms == pytest.approx(6)
    assert timing.p90_ms == pytest.approx(10)
    assert timing.p99_ms == pytest.approx(10.9)
    assert timing.spread == pytest.approx((10 - 2) / 6)
    assert timing.turns_ms == (pytest.approx(6), pytest.approx(6))
    assert timing.images_per_second == pytest.approx(2 * 1000 / 6)


def timed(*turns: float) -> Timing:
    return summarise("f", 1, 0, [[turn / 1000] for turn in turns])


def test_the_interval_consists_of_order_statistics_of_the_ratios_by_turn():
    """With twelve turns, the third and the tenth: at most two ratios are below the median in 79 of 2^12 cases."""
    ratios = [2.0, 2.2, 1.9, 2.1, 2.05, 1.95, 2.15, 1.85, 2.3, 1.8, 2.0, 2.1]
    slow = timed(*(4 * (1 + 0.5 * (number % 3)) * ratio for number, ratio in enumerate(ratios)))
    fast = timed(*(4 * (1 + 0.5 * (number % 3)) for number in range(12)))
    result = gain(slow, fast)
    ordered = sorted(ratios)
    covered = 1 - 2 * sum(comb(12, below) for below in range(3)) / 2**12
    assert covered > 0.95
    assert (result.low, result.high) == (pytest.approx(ordered[2]), pytest.approx(ordered[9]))
    assert result.ratio == slow.p50_ms / fast.p50_ms
    assert result.conclusive


@given(lists(floats(0.5, 20), min_size=1, max_size=60), floats(0.1, 10))
def test_the_interval_contains_the_ratio_and_is_a_point_for_a_constant_factor(turns, factor):
    result = gain(timed(*(factor * turn for turn in turns)), timed(*turns))
    assert result.low <= result.ratio <= result.high
    assert (result.low, result.high) == (pytest.approx(factor), pytest.approx(factor))
    assert result.conclusive is (len(turns) >= MIN_TURNS)


def test_a_machine_that_is_busy_in_some_turns_gives_no_conclusive_speedup():
    slow = timed(*[4.0, 9.0] * 6)
    assert not gain(slow, timed(*[2.0, 2.0, 5.0] * 4)).conclusive
    assert gain(slow, timed(*[2.0, 4.5] * 6)).conclusive  # both files are slowed in the same turns


def test_files_are_compared_by_content(machine, monkeypatch):
    monkeypatch.setitem(MILLISECONDS, "0", 4.0)
    monkeypatch.setitem(MILLISECONDS, "1", 1.6)
    result = gains({"floats": b"one", "bytes": b"two"}, "floats", (8, 8))
    assert result["bytes"].ratio == pytest.approx(2.5)
    assert result["floats"].ratio == pytest.approx(1)
    assert result["bytes"].conclusive
