"""Methods compared: a table of means, deviations and paired differences, and mAP against cost."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from pipeline.records import Record
from pipeline.report.style import OTHER_COLORS, STUDENT_COLOR, TEACHER_COLOR, new_figure, percent, save, styled

NAMES = {
    "budget": "shrinks while it learns (ours)",
    "static-magnitude": "cut once by magnitude",
    "static-random": "small from scratch",
    "paper": "as published",
    "none": "not compressed",
}
COLOURS = {
    "budget": STUDENT_COLOR,
    "static-magnitude": OTHER_COLORS[1],
    "static-random": OTHER_COLORS[0],
    "paper": OTHER_COLORS[3],
    "none": TEACHER_COLOR,
}
MARKERS = {"budget": "o", "static-magnitude": "s", "static-random": "^", "paper": "D", "none": "X"}
COMMAND = "make evidence"


class Result(Record):
    """One student.

    Attributes:
        method: Of stage `student`.
        target: Reduction that was asked for, None where the method takes none.
        seed: Of data, teacher and student.
        map: On query and gallery.
        rank1: On query and gallery.
        teacher_map: The teacher's mAP with this seed.
        macs_reduction: Share of the teacher's multiply-accumulates that is gone.
        params_reduction: Share of its parameters.
        widths: What is left, by dimension.
        speedup: The teacher's latency for one image, divided by the student's; None where calls of either differed too
            much to tell.
    """

    method: str
    target: float | None
    seed: int
    map: float
    rank1: float
    teacher_map: float
    macs_reduction: float
    params_reduction: float
    widths: dict[str, int]
    speedup: float | None = None

    def row(self) -> dict[str, str]:
        """A line of results.csv."""
        return {
            "method": self.method,
            "target": "" if self.target is None else f"{self.target:g}",
            "seed": str(self.seed),
            "map": f"{self.map:.6f}",
            "rank1": f"{self.rank1:.6f}",
            "teacher_map": f"{self.teacher_map:.6f}",
            "macs_reduction": f"{self.macs_reduction:.6f}",
            "params_reduction": f"{self.params_reduction:.6f}",
            "speedup": "" if self.speedup is None else f"{self.speedup:.3f}",
        }


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean difference of two measurements with the same seeds, and half of its 95 % interval (Student's t).

    Args:
        first: At least one.
        second: As many.
    """
    differences = np.asarray(first) - np.asarray(second)
    count = len(differences)
    if count < 2:
        return float(differences.mean()), float("inf")
    half = student_t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count)
    return float(differences.mean()), float(half)


def _groups(results: Sequence[Result]) -> Iterator[tuple[str, float | None, list[Result]]]:
    """Results by target and method, seeds ascending; what has no target comes first."""
    for target in sorted({result.target for result in results}, key=lambda value: value or 0):
        for method in NAMES:
            found = [result for result in results if (result.method, result.target) == (method, target)]
            if found:
                yield method, target, sorted(found, key=lambda result: result.seed)


def page(results: Sequence[Result], data: str) -> str:
    """README.md of evidence/, GitHub's Markdown.

    Args:
        results: At least one.
        data: What they were trained on.
    """
    seeds = sorted({result.seed for result in results})
    teachers = [next(result.teacher_map for result in results if result.seed == seed) for seed in seeds]
    lines = [
        "# Evidence",
        "",
        f"Made by `{COMMAND}` from `presets/evidence.yaml`: {data}; {_seeds(seeds)}. All students of a seed have "
        "the same teacher, losses, epochs and multiples, and each budgeted method the best of the learning rates that "
        "were tried, by validation. Speed-up: ONNX Runtime, one image, all threads, all networks timed side by side; "
        "inconclusive where the calls of a network differed too much. A figure without ± is of one seed.",
        "",
        f"Teacher: mAP {_spread(teachers)}.",
        "",
        "![mAP against cost](pareto.png)",
        "",
        "| asked | method | MACs | params | speed-up | mAP | against the teacher | ours against it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups = list(_groups(results))
    ours = {target: found for method, target, found in groups if method == "budget"}
    for method, target, found in groups:
        scores = [result.map for result in found]
        against = _difference(scores, [result.teacher_map for result in found])
        rival = {result.seed: result.map for result in ours.get(target, [])}
        both = [result for result in found if result.seed in rival]
        beaten = (
            _difference([rival[r.seed] for r in both], [r.map for r in both]) if both and method != "budget" else ""
        )
        lines.append(
            f"| {'' if target is None else f'-{target:.0%}'.replace('%', ' %')} | {NAMES[method]} "
            f"| {_cut(found, 'macs_reduction')} | {_cut(found, 'params_reduction')} "
            f"| {_speedup(found)} | {_spread(scores)} | {against} | {beaten} |"
        )
    return "\n".join([*lines, ""])


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"


def _difference(first: Sequence[float], second: Sequence[float]) -> str:
    mean, half = paired(first, second)
    return f"{mean:+.4f}" + (f" ± {half:.4f}" if np.isfinite(half) else "")


def _cut(results: Sequence[Result], field: str) -> str:
    return f"{-100 * np.mean([getattr(result, field) for result in results]) + 0.0:.1f} %"


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]} alone, so that nothing is known about deviations"
    return (
        f"seeds {', '.join(map(str, seeds))}, each with data, teacher and students of its own. mAP: mean and standard "
        "deviation over the seeds; differences are paired by seed, with 95 % intervals (Student's t)"
    )


def _speedup(results: Sequence[Result]) -> str:
    known = [result.speedup for result in results if result.speedup is not None]
    return f"{np.mean(known):.2f}x" if len(known) == len(results) else "inconclusive"


def draw(results: Sequence[Result], path: Path) -> None:
    """Plot mAP against what is left of MACs, params and latency: means with deviations over the seeds.

    A mean over an inconclusive latency is left out.

    Args:
        results: At least one.
        path: PNG to write.
    """
    axes: dict[str, Callable[[Result], float]] = {
        "MACs left": lambda result: 1 - result.macs_reduction,
        "params left": lambda result: 1 - result.params_reduction,
        "latency left": lambda result: 1 / result.speedup if result.speedup else np.nan,
    }
    with styled():
        figure = new_figure(4.9, width=11.0)
        charts = figure.subplots(1, len(axes), sharey=True)
        for chart, (label, cost) in zip(charts, axes.items(), strict=True):
            for method, name in NAMES.items():
                groups = [found for other, _, found in _groups(results) if other == method]
                if not groups:
                    continue
                scores = [[result.map for result in found] for found in groups]
                chart.errorbar(
                    [np.mean([cost(result) for result in found]) for found in groups],
                    [np.mean(values) for values in scores],
                    yerr=[np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in scores],
                    marker=MARKERS[method], color=COLOURS[method], label=name, capsize=3, markersize=7,
                )  # fmt: skip
            teachers = {result.seed: result.teacher_map for result in results}
            chart.axhline(float(np.mean(list(teachers.values()))), color=TEACHER_COLOR, linestyle=":", label="teacher")
            widest = float(np.nanmax([1.0, *(cost(result) for result in results)]))
            chart.set(xlabel=f"{label} (left is cheaper)", xlim=(0, widest + 0.08), xticks=[0, 0.25, 0.5, 0.75, 1])
            percent(chart, "x")
            if not np.isfinite([cost(result) for result in results]).any():
                chart.text(0.5, 0.5, "inconclusive", transform=chart.transAxes, ha="center", va="center")
        charts[0].set_ylabel("mAP (up is better)")
        figure.legend(*charts[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    save(figure, path)
