"""The page of the comparison: arithmetic, table and chart."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence.page import Result, paired, plot, render_page


def results() -> list[Result]:
    collected = []
    for seed in (0, 1, 2):
        for target in (0.65, 0.8):
            for method, gain in (("budget", 0.02), ("static-magnitude", 0.0), ("static-random", -0.1)):
                score = 0.7 + 0.01 * seed + gain * (1 + 0.1 * seed) - 0.1 * (target - 0.65)
                collected.append(result(method, target, seed, score, target, target - 0.05, 2.0))
        collected.append(result("none", None, seed, 0.75, 0.0, 0.0, 1.0))
    return collected


def result(
    method: str, target: float | None, seed: int, score: float, macs: float, params: float, speedup: float
) -> Result:
    return Result(
        method=method,
        target=target,
        seed=seed,
        map=score,
        rank1=0.8,
        teacher_map=0.7 + 0.01 * seed,
        macs_reduction=macs,
        params_reduction=params,
        widths={},
        speedup=speedup,
    )


def test_paired_differences_have_students_t_intervals() -> None:
    mean, half = paired([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-6)  # t table, 2 degrees of freedom
    assert paired([0.5], [0.4]) == (pytest.approx(0.1), float("inf"))


def test_the_page_shows_means_and_paired_differences() -> None:
    text = render_page(results(), "vehicles")
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 7
    assert rows[0].startswith("|  | not compressed |")
    ours, magnitude, scratch = rows[1:4]
    assert "-65 %" in ours
    assert "-60.0 %" in ours
    assert "0.7320 ± 0.0120" in ours
    assert "+0.0220 ± 0.0050" in ours  # against the teacher
    assert magnitude.endswith("| +0.0000 ± 0.0000 | +0.0220 ± 0.0050 |")
    assert "-0.1100 ± 0.0248" in scratch
    assert ours.endswith("|  |")


def test_an_inconclusive_speed_up_is_not_shown_as_a_number(tmp_path: Path) -> None:
    inconclusive = [r.model_copy(update={"speedup": None}) if r.seed == 1 else r for r in results()]
    rows = [line for line in render_page(inconclusive, "vehicles").splitlines() if line.startswith("|")][2:]
    assert all("| inconclusive |" in row for row in rows)
    assert inconclusive[-1].row()["speedup"] != "" and inconclusive[len(inconclusive) // 2].row()["speedup"] == ""
    for shown in (inconclusive, [r for r in inconclusive if r.seed == 1]):
        plot(shown, tmp_path / "pareto.png")
        assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_gives_neither_deviation_nor_interval() -> None:
    text = render_page([result for result in results() if result.seed == 0], "vehicles")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert not any("±" in line for line in table)
    assert "Only seed 0 was run" in text
    assert "deviation over" not in text


def test_the_chart_is_written(tmp_path: Path) -> None:
    plot(results(), tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
