"""Timing ONNX files, on a clock of its own."""

from collections import Counter
from itertools import pairwise
from math import comb
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis.strategies import floats, lists

from pipeline.inference import timing
from pipeline.inference.timing import BURST, LEAST_TURNS, SETTLE, WARM_UP, Timing, gain, gains, measure, summarise

MILLISECONDS = {"teacher": 4.0, "student": 1.5}
FILES = {name: Path(f"{name}.onnx") for name in MILLISECONDS}


class Machine:
    """Time stands still but in calls, which take what `MILLISECONDS` says, an image."""

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
    for found in timings:
        expected = MILLISECONDS[found.file] * found.batch
        assert (found.p50_ms, found.p90_ms) == (pytest.approx(expected), pytest.approx(expected))
        assert found.spread == pytest.approx(0, abs=1e-9)
        assert found.images_per_second == pytest.approx(1000 / MILLISECONDS[found.file])
    assert {shape for _, _, shape in machine.calls} == {(1, 3, 8, 6), (3, 3, 8, 6)}
    assert set(machine.opened) == {(name, threads) for name in FILES for threads in (0, 2)}


def test_files_take_turns_and_no_turn_begins_with_a_timed_call(machine):
    repeats = BURST + 2
    measure(FILES, (4, 4), batches=[1], threads=[0], repeats=repeats)
    names = [name for name, _, _ in machine.calls]
    # warm-up; first round: teacher, student; second round, two timed calls left: student, teacher
    expected = ["teacher"] * WARM_UP + ["student"] * WARM_UP
    expected += ["teacher"] * (SETTLE + BURST) + ["student"] * (SETTLE + BURST)
    expected += ["student"] * (SETTLE + 2) + ["teacher"] * (SETTLE + 2)
    assert names == expected


def test_each_begins_as_often_and_each_pair_goes_both_ways_as_often():
    orders = [timing._order("abc", turn) for turn in range(6)]
    assert Counter(order[0] for order in orders) == dict.fromkeys("abc", 2)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert all(pairs[one, other] == pairs[other, one] for one, other in pairs)


def test_only_the_asked_number_of_calls_counts(machine, monkeypatch):
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


def test_an_interval_is_from_order_statistics_of_the_ratios_turn_by_turn():
    """Of twelve turns, the third and the tenth: in 79 of 2^12 cases at most two ratios lie below the median."""
    ratios = [2.0, 2.2, 1.9, 2.1, 2.05, 1.95, 2.15, 1.85, 2.3, 1.8, 2.0, 2.1]
    slow = timed(*(4 * (1 + 0.5 * (number % 3)) * ratio for number, ratio in enumerate(ratios)))
    fast = timed(*(4 * (1 + 0.5 * (number % 3)) for number in range(12)))
    found = gain(slow, fast)
    ordered = sorted(ratios)
    covered = 1 - 2 * sum(comb(12, below) for below in range(3)) / 2**12
    assert covered > 0.95
    assert (found.low, found.high) == (pytest.approx(ordered[2]), pytest.approx(ordered[9]))
    assert found.ratio == slow.p50_ms / fast.p50_ms
    assert found.conclusive


@given(lists(floats(0.5, 20), min_size=1, max_size=60), floats(0.1, 10))
def test_the_interval_holds_the_ratio_and_a_constant_factor_is_certain(turns, factor):
    found = gain(timed(*(factor * turn for turn in turns)), timed(*turns))
    assert found.low <= found.ratio <= found.high
    assert (found.low, found.high) == (pytest.approx(factor), pytest.approx(factor))
    assert found.conclusive is (len(turns) >= LEAST_TURNS)


def test_a_machine_that_does_something_else_half_of_the_time_leaves_it_open():
    slow = timed(*[4.0, 9.0] * 6)
    assert not gain(slow, timed(*[2.0, 2.0, 5.0] * 4)).conclusive
    assert gain(slow, timed(*[2.0, 4.5] * 6)).conclusive  # both met the same


def test_files_are_compared_by_content(machine, monkeypatch):
    monkeypatch.setitem(MILLISECONDS, "0", 4.0)
    monkeypatch.setitem(MILLISECONDS, "1", 1.6)
    found = gains({"floats": b"one", "bytes": b"two"}, "floats", (8, 8))
    assert found["bytes"].ratio == pytest.approx(2.5)
    assert found["floats"].ratio == pytest.approx(1)
    assert found["bytes"].conclusive
