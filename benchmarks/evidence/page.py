"""The page of the comparison: a table of means and paired differences, and a chart of mAP against cost."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from pipeline.records import Record
from pipeline.report.style import OTHER_COLORS, STUDENT_COLOR, TEACHER_COLOR, new_figure, percent, save, styled

NAMES = {
    "budget": "pruned during training (ours)",
    "static-magnitude": "pruned once by magnitude",
    "static-random": "small network from scratch",
    "paper": "the method of the paper",
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
    """The result of one experiment.

    Attributes:
        method: `student.method`.
        target: `student.budget.reduction`; None for methods without a target.
        seed: Seed of data, teacher and student.
        map: Test mAP of the student, in [0, 1].
        teacher_map: Test mAP of the teacher with this seed, in [0, 1].
        macs_reduction: Fraction of the teacher's multiply-accumulates that was removed.
        params_reduction: Fraction of the teacher's parameters that was removed.
        widths: Remaining channels by dimension name.
        speedup: Latency of the teacher for one image, divided by that of the student; None if it varied too much.
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
        """Format as a row of results.csv."""
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
    """Compute the mean difference of paired measurements, and half its 95 % confidence interval (Student's t).

    Args:
        first: (n,) measurements, one per seed, n >= 1.
        second: (n,) measurements with the same seeds.

    Returns:
        Mean of `first` - `second`, and half the width of the interval, infinite for n = 1.
    """
    differences = np.asarray(first) - np.asarray(second)
    count = len(differences)
    if count < 2:
        return float(differences.mean()), float("inf")
    half = student_t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count)
    return float(differences.mean()), float(half)


def _groups(results: Sequence[Result]) -> Iterator[tuple[str, float | None, list[Result]]]:
    """Group results by target and method, seeds ascending; methods without a target come first."""
    for target in sorted({result.target for result in results}, key=lambda value: value or 0):
        for method in NAMES:
            group = [result for result in results if (result.method, result.target) == (method, target)]
            if group:
                yield method, target, sorted(group, key=lambda result: result.seed)


def render_page(results: Sequence[Result], data: str) -> str:
    """Render evidence/README.md from at least one result.

    Args:
        results: At least one.
        data: Name and image size of the data set, as shown to the reader.
    """
    seeds = sorted({result.seed for result in results})
    teachers = [next(result.teacher_map for result in results if result.seed == seed) for seed in seeds]
    lines = [
        "# Which compression method keeps the most mAP?",
        "",
        f"`{COMMAND}` wrote this page, with the settings of `presets/evidence.yaml` on {data}. The teacher reaches mAP "
        f"{_spread(teachers)}.",
        "",
        "![mAP against cost](pareto.png)",
        "",
        "| target | method | MACs | params | speed-up | mAP | mAP - teacher's | ours - this method's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = [
        "",
        f"- {_seeds(seeds)}. A value without ± comes from one seed.",
        "- All students of a seed have the same teacher, losses, epochs and channel multiples. Each method with a "
        "target uses the learning rate, of several, with the best validation mAP.",
        "- Speed-up over the teacher: ONNX Runtime, one image, all threads, all networks timed in turns; inconclusive "
        "if the latency of a network varied too much.",
        "",
    ]
    groups = list(_groups(results))
    ours = {target: group for method, target, group in groups if method == "budget"}
    for method, target, group in groups:
        scores = [result.map for result in group]
        to_teacher = _difference(scores, [result.teacher_map for result in group])
        our_scores = {result.seed: result.map for result in ours.get(target, [])}
        pairs = [(our_scores[result.seed], result.map) for result in group if result.seed in our_scores]
        to_ours = _difference(*zip(*pairs, strict=True)) if pairs and method != "budget" else ""
        lines.append(
            f"| {'' if target is None else f'-{target:.0%}'.replace('%', ' %')} | {NAMES[method]} "
            f"| {_change(group, 'macs_reduction')} | {_change(group, 'params_reduction')} "
            f"| {_speedup(group)} | {_spread(scores)} | {to_teacher} | {to_ours} |"
        )
    return "\n".join([*lines, *notes])


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"


def _difference(first: Sequence[float], second: Sequence[float]) -> str:
    mean, half = paired(first, second)
    return f"{mean:+.4f}" + (f" ± {half:.4f}" if np.isfinite(half) else "")


def _change(results: Sequence[Result], field: str) -> str:
    return f"{-100 * np.mean([getattr(result, field) for result in results]) + 0.0:.1f} %"


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"Only seed {seeds[0]} was run, so the spread between seeds is unknown"
    return (
        f"Seeds {', '.join(map(str, seeds))}, each with its data, teacher and students. mAP is the mean ± standard "
        "deviation over the seeds; differences are paired by seed, with 95 % confidence intervals (Student's t)"
    )


def _speedup(results: Sequence[Result]) -> str:
    conclusive = [result.speedup for result in results if result.speedup is not None]
    return f"{np.mean(conclusive):.2f}x" if len(conclusive) == len(results) else "inconclusive"


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot mAP against the remaining MACs, params and latency, with standard deviations over the seeds, to a PNG file.

    Groups with an inconclusive latency are not shown in the chart of latency.
    """
    axes: dict[str, Callable[[Result], float]] = {
        "remaining MACs": lambda result: 1 - result.macs_reduction,
        "remaining params": lambda result: 1 - result.params_reduction,
        "remaining latency": lambda result: 1 / result.speedup if result.speedup else np.nan,
    }
    with styled():
        figure = new_figure(4.9, width=11.0)
        charts = figure.subplots(1, len(axes), sharey=True)
        for chart, (axis, cost) in zip(charts, axes.items(), strict=True):
            for method, label in NAMES.items():
                groups = [group for name, _, group in _groups(results) if name == method]
                if not groups:
                    continue
                scores = [[result.map for result in group] for group in groups]
                chart.errorbar(
                    [np.mean([cost(result) for result in group]) for group in groups],
                    [np.mean(values) for values in scores],
                    yerr=[np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in scores],
                    marker=MARKERS[method], color=COLOURS[method], label=label, capsize=3, markersize=7,
                )  # fmt: skip
            teachers = {result.seed: result.teacher_map for result in results}
            chart.axhline(float(np.mean(list(teachers.values()))), color=TEACHER_COLOR, linestyle=":", label="teacher")
            widest = float(np.nanmax([1.0, *(cost(result) for result in results)]))
            chart.set(xlabel=f"{axis} (left is cheaper)", xlim=(0, widest + 0.08), xticks=[0, 0.25, 0.5, 0.75, 1])
            percent(chart, "x")
            if not np.isfinite([cost(result) for result in results]).any():
                chart.text(0.5, 0.5, "inconclusive", transform=chart.transAxes, ha="center", va="center")
        charts[0].set_ylabel("mAP (up is better)")
        figure.legend(*charts[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    save(figure, path)
