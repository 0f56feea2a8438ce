"""Timing ONNX files, on a clock of its own."""

import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.benchmark import latency
from pipeline.benchmark.latency import BURST, SETTLE, WARM_UP, measure, summarise

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
    monkeypatch.setattr(latency, "perf_counter", machine.perf_counter)
    monkeypatch.setattr(latency, "open_session", machine.open_session)
    return machine


def test_every_file_is_timed_at_every_setting_in_order(machine):
    timings = measure(FILES, (8, 6), batches=[1, 3], threads=[0, 2], repeats=4)
    assert [(t.threads, t.batch, t.file) for t in timings] == [
        (threads, batch, name) for threads in (0, 2) for batch in (1, 3) for name in FILES
    ]
    for timing in timings:
        expected = MILLISECONDS[timing.file] * timing.batch
        assert (timing.p50_ms, timing.p90_ms) == (pytest.approx(expected), pytest.approx(expected))
        assert timing.spread == pytest.approx(0, abs=1e-9)
        assert timing.images_per_second == pytest.approx(1000 / MILLISECONDS[timing.file])
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


def test_only_the_asked_number_of_calls_counts(machine, monkeypatch):
    counted = Counter()
    monkeypatch.setattr(
        latency, "summarise", lambda file, batch, threads, seconds: counted.update({file: len(seconds)})
    )
    monkeypatch.setattr(latency, "WARM_UP", 40)
    measure(FILES, (4, 4), batches=[1], threads=[0], repeats=13)
    assert counted == {"teacher": 13, "student": 13}


def test_p50_p90_and_spread_of_one_to_eleven_milliseconds():
    timing = summarise("f", 2, 0, [n / 1000 for n in (7, 1, 11, 3, 5, 9, 2, 10, 4, 8, 6)])
    # eleven values: the q-quantile is the value at place 10 q, so 1 + 10 q
    assert timing.p50_ms == pytest.approx(6)
    assert timing.p90_ms == pytest.approx(10)
    assert timing.spread == pytest.approx((10 - 2) / 6)
    assert timing.images_per_second == pytest.approx(2 * 1000 / 6)


def test_a_noisy_setting_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        summarise("teacher.onnx", 1, 0, [0.010] * 10)
        assert not caplog.records
        assert summarise("teacher.onnx", 1, 0, [0.010] * 5 + [0.030] * 5).noisy
    assert "teacher.onnx" in caplog.text
