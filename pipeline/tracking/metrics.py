"""Names of the figures: from records and curves to the metric keys of MLflow and the result table.

One quantity has one key in every stage, so that MLflow lays teacher, student and ONNX file over each other. The text
before the `/` becomes the section of the chart.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.files import Files, read_json
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
    "bytes": "model/bytes",
}
"""Fields of records that mean the same in every stage."""

CURVES = {
    "validation_map": "validation/mAP",
    "macs_reduction": "capacity/macs_reduction",
    "params_reduction": "capacity/params_reduction",
    "latency_reduction": "capacity/latency_reduction",
    "target_reduction": "capacity/target_reduction",
}
"""Columns of plots/<stage>.csv; all others are losses."""

SECTIONS = {"prepare": "data", "benchmark": "latency"}
"""Section of what only one stage reports, where it is not the stage's name."""


def record(files: Files, stage: str) -> dict[str, float]:
    """The numbers of metrics/<stage>.json under dotted names.

    Raises:
        FileNotFoundError: Where the stage has not run.
        ValueError: If the file is not what the stage writes.
    """
    return RECORDS[stage].model_validate(read_json(files.metrics(stage))).flat()


def final_metrics(files: Files, stage: str) -> dict[str, float]:
    """Final figures of a stage by metric key; widths are left to the plan.

    The benchmark times the exported file, so it carries that file's figures beside its own.
    """
    figures = final_metrics(files, "export") if stage == "benchmark" and files.metrics("export").is_file() else {}
    figures = {key: value for key, value in figures.items() if key.startswith(("eval/", "model/"))}
    if stage == "teacher":
        figures |= {"model/params_reduction": 0.0, "model/flops_reduction": 0.0}
    section = SECTIONS.get(stage, stage)
    for name, value in record(files, stage).items():
        if not name.startswith("widths."):
            figures[SHARED.get(name) or f"{section}/{name.replace('.', '_')}"] = value
    return figures


def summary(files: Files) -> dict[str, float]:
    """What an execution led to: the student's final figures, and its teacher's beside them."""
    figures: dict[str, float] = {}
    for stage in ("student", "surgery", "export", "benchmark"):
        if files.metrics(stage).is_file():
            shared = ("eval/", "model/", "latency/")
            figures |= {key: value for key, value in final_metrics(files, stage).items() if key.startswith(shared)}
    if files.metrics("teacher").is_file():
        teacher = final_metrics(files, "teacher")
        kept = ("eval/mAP", "model/params", "model/macs")
        figures |= {f"teacher/{key.partition('/')[2]}": teacher[key] for key in kept}
    return figures


def curve(row: Mapping[str, float]) -> dict[str, float]:
    """One row of a curve by metric key, without its epoch."""
    return {CURVES.get(name, f"train/{name}"): value for name, value in row.items() if name != "epoch"}


def curves(path: Path) -> list[dict[str, float]]:
    """Indices of plots/<stage>.csv; a cell that is empty is left out."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


# --- result table -----------------------------------------------------------------------------------------------------

COLUMNS = {
    "eval/mAP": ("mAP", "{:.4f}", 1),
    "eval/rank1": ("rank-1", "{:.4f}", 1),
    "model/params": ("params", "{:.2f} M", 1e6),
    "model/macs": ("MACs", "{:.1f} M", 1e6),
    "model/params_reduction": ("params cut", "{:.1%}", 1),
    "model/flops_reduction": ("MACs cut", "{:.1%}", 1),
}
"""Metric key: heading, format and unit; short enough for a terminal of 80 columns."""


def table(files: Files) -> list[dict[str, str]]:
    """The stages that have run and what came out of each, a row a network, ready to print."""
    rows = []
    for stage in ("teacher", "student", "surgery", "export"):
        if files.metrics(stage).is_file():
            figures = final_metrics(files, stage)
            cells = {
                title: form.format(figures[key] / unit) if key in figures else ""
                for key, (title, form, unit) in COLUMNS.items()
            }
            rows.append({"stage": stage, **cells, "p50": _latency(files, stage)})
    return rows


def _latency(files: Files, stage: str) -> str:
    """Milliseconds of one image with all threads; teacher.onnx stands in the teacher's row, model.onnx in export's."""
    network = {"teacher": "teacher", "export": "student"}.get(stage)
    if network is None or not files.metrics("benchmark").is_file():
        return ""
    return f"{record(files, 'benchmark')[f'{network}.batch1_threadsall.p50']:.2f} ms"


def protocol(files: Files) -> str | None:
    """Protocol that the last run was scored by, as dvc.lock has it; None where it has none.

    Args:
        files: Of the repository; params.yaml may say another one by now.
    """
    path = files.root / "dvc.lock"
    lock = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    params = lock.get("stages", {}).get("teacher", {}).get("params", {}).get("params.yaml", {})
    return params.get("data.protocol") if isinstance(params, dict) else None
