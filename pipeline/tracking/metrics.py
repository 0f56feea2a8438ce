"""MLflow metric keys of the numbers in metrics/ and plots/, and the table of results.

A quantity has the same key in every stage, so MLflow charts teacher, student and ONNX file together. The text before
the `/` is the section of the chart.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.files import Files, read_json
from pipeline.protocols import conditions
from pipeline.records import RECORDS

SHARED = {
    "map": "eval/mAP",
    "rank1": "eval/rank1",
    "rank5": "eval/rank5",
    "rank10": "eval/rank10",
    "minp": "eval/mINP",
    "queries": "eval/queries",
    "dropped": "eval/dropped",
    "params": "model/params",
    "macs": "model/macs",
    "params_reduction": "model/params_reduction",
    "macs_reduction": "model/flops_reduction",
    "params_reduction_to_teacher": "model/params_reduction_to_teacher",
    "macs_reduction_to_teacher": "model/flops_reduction_to_teacher",
    "bytes": "model/bytes",
}
"""Metric key of each field of metrics/<stage>.json that means the same in every stage."""

CURVES = {
    "validation_map": "validation/mAP",
    "macs_reduction": "capacity/macs_reduction",
    "params_reduction": "capacity/params_reduction",
    "latency_reduction": "capacity/latency_reduction",
    "target_reduction": "capacity/target_reduction",
    "masked_rows": "capacity/masked_rows",
    "norm_of_masked_rows": "capacity/norm_of_masked_rows",
    "norm_of_other_rows": "capacity/norm_of_other_rows",
}
"""Metric key of each column of plots/<stage>.csv; all other columns are losses."""

SECTIONS = {"prepare": "data", "benchmark": "latency"}
"""Section of the other fields, if it is not the name of the stage."""


def load_metrics(files: Files, stage: str) -> dict[str, float]:
    """Load metrics/<stage>.json by dotted name.

    Raises:
        FileNotFoundError: If the stage has not run.
        ValueError: If the content does not have the stage's fields.
    """
    return RECORDS[stage].model_validate(read_json(files.metrics(stage))).flat()


def final_metrics(files: Files, stage: str) -> dict[str, float]:
    """Return the final metrics of a stage by metric key, without the widths of layers.

    Those of `benchmark` include the quality and size of the exported file that it times.
    """
    values = final_metrics(files, "export") if stage == "benchmark" and files.metrics("export").is_file() else {}
    values = {key: value for key, value in values.items() if key.startswith(("eval/", "model/"))}
    if stage == "teacher":
        values |= {"model/params_reduction": 0.0, "model/flops_reduction": 0.0}
    section = SECTIONS.get(stage, stage)
    for name, value in load_metrics(files, stage).items():
        if not name.startswith("widths."):
            values[SHARED.get(name) or f"{section}/{name.replace('.', '_')}"] = value
    return values


def summary(files: Files) -> dict[str, float]:
    """Return the metrics of the parent run: final values of the student, and mAP, params and MACs of the teacher."""
    values: dict[str, float] = {}
    for stage in ("student", "surgery", "export", "benchmark"):
        if files.metrics(stage).is_file():
            shared = ("eval/", "model/", "latency/")
            values |= {key: value for key, value in final_metrics(files, stage).items() if key.startswith(shared)}
    if files.metrics("teacher").is_file():
        teacher = final_metrics(files, "teacher")
        kept = ("eval/mAP", "model/params", "model/macs")
        values |= {f"teacher/{key.partition('/')[2]}": teacher[key] for key in kept if key in teacher}
    return values


def curve_metrics(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row of plots/<stage>.csv by metric key, without the epoch."""
    return {CURVES.get(name, f"train/{name}"): value for name, value in row.items() if name != "epoch"}


def load_curves(path: Path) -> list[dict[str, float]]:
    """Load the rows of plots/<stage>.csv without empty cells; [] if there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


# --- result table -----------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, str, float]] = {
    "eval/mAP": ("mAP", "{:.4f}", 1),
    "eval/rank1": ("rank-1", "{:.4f}", 1),
    "model/params": ("params", "{:.2f} M", 1e6),
    "model/macs": ("MACs", "{:.1f} M", 1e6),
    "model/params_reduction": ("params cut", "{:.1%}", 1),
    "model/flops_reduction": ("MACs cut", "{:.1%}", 1),
}
"""Metric key -> heading, format and divisor; short enough for a terminal of 80 columns."""


def result_table(files: Files) -> list[dict[str, str]]:
    """Return one formatted row for the network of each stage that has run."""
    stages = [stage for stage in ("teacher", "student", "surgery", "export") if files.metrics(stage).is_file()]
    return [
        {"stage": stage, **cells(final_metrics(files, stage), COLUMNS), "p50": _latency(files, stage)}
        for stage in stages
    ]


def teacher_note(files: Files) -> str:
    """Return what the student saves compared with its teacher, if the table's figures are not that; else nothing."""
    values = final_metrics(files, "export") if files.metrics("export").is_file() else {}
    own = values.get("model/params_reduction")
    params, macs = (values.get(f"model/{name}_reduction_to_teacher") for name in ("params", "flops"))
    if params is None or params == own:
        return ""
    saved = f"{params:.1%} of the params, " + ("MACs unknown" if macs is None else f"{macs:.1%} of the MACs")
    return f"cut: compared with the student before it shrank; compared with the teacher: {saved}"


def cells(values: Mapping[str, float], columns: Mapping[str, tuple[str, str, float]]) -> dict[str, str]:
    """Format values by heading; missing ones are empty."""
    return {
        heading: form.format(values[key] / divisor) if key in values else ""
        for key, (heading, form, divisor) in columns.items()
    }


def _latency(files: Files, stage: str) -> str:
    """Format the p50 latency at `timed_batch`: of teacher.onnx for `teacher`, of model.onnx for `export`."""
    network = {"teacher": "teacher", "export": "student"}.get(stage)
    if network is None or not files.metrics("benchmark").is_file():
        return ""
    return f"{load_metrics(files, 'benchmark')[f'{network}.batch{timed_batch(files)}_threadsall.p50']:.2f} ms"


def timed_batch(files: Files) -> int:
    """Return the smallest batch size that was timed: 1, unless the files fix another; 1 if none was timed yet."""
    if not files.metrics("benchmark").is_file():
        return 1
    found = (re.match(r"student\.batch(\d+)_threadsall\.", key) for key in load_metrics(files, "benchmark"))
    return min(int(match[1]) for match in found if match)


def last_conditions(files: Files) -> str | None:
    """Return the protocol of the last run as shown, by dvc.lock, since params.yaml may have changed; or None."""
    path = files.root / "dvc.lock"
    lock = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    params = lock.get("stages", {}).get("teacher", {}).get("params", {}).get("params.yaml", {})
    protocol = params.get("data.protocol") if isinstance(params, dict) else None
    return shown_protocol(files, protocol) if protocol else None


def shown_protocol(files: Files, protocol: str) -> str:
    """Return a protocol as figures of this checkout show it: with a note on test identities that were trained on."""
    counts = load_metrics(files, "prepare") if files.metrics("prepare").is_file() else {}
    return conditions(protocol, int(counts.get("seen_identities", 0)), int(counts.get("test_identities", 0)))
