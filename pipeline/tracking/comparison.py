"""Table of the executions in MLflow."""

from collections.abc import Sequence
from datetime import datetime

from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.protocols import SEEN
from pipeline.tracking.errors import TrackingError
from pipeline.tracking.metrics import cells

COLUMNS: dict[str, tuple[str, str, float]] = {
    "teacher/mAP": ("teacher", "{:.4f}", 1),
    "eval/mAP": ("mAP", "{:.4f}", 1),
    "model/params_reduction": ("params", "{:.1%}", -1),
    "model/flops_reduction": ("MACs", "{:.1%}", -1),
    "latency/speedup": ("speed", "{:.2f}x", 1),
}
"""Metric key of a parent run -> heading, format and divisor; short enough for a terminal of 80 columns."""


class UnknownRunError(TrackingError):
    """MLflow has no such execution, or several."""

    exit_code = 3


def executions_table(client: MlflowClient, experiment: str, ids: Sequence[str], last: int) -> list[dict[str, str]]:
    """Return one formatted row for each execution in `ids` (run ids or prefixes), or for the `last` latest ones.

    Raises:
        UnknownRunError: If there are no executions, the experiment was deleted, or an id matches none or several.
    """
    found = client.get_experiment_by_name(experiment)
    if found and found.lifecycle_stage != "active":
        raise UnknownRunError(f"experiment {experiment} was deleted in MLflow; restore it or set `tracking.experiment`")
    runs = _parent_runs(client, found.experiment_id) if found else []
    if not runs:
        raise UnknownRunError(f"MLflow has no execution in experiment {experiment}; run `dvc repro` first")
    selected = [_find(runs, prefix) for prefix in ids] if ids else runs[:last]
    rows = [_row(run) for run in selected]
    seen = [run.data.tags.get("protocol", "").endswith(SEEN) for run in selected]
    if any(seen):
        rows = [{**row, "test ids": "seen" if s else "unseen"} for row, s in zip(rows, seen, strict=True)]
    return rows


def _parent_runs(client: MlflowClient, experiment: str) -> list[Run]:
    """Return the parent runs of all executions, the latest first."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment], order_by=["attributes.start_time DESC"], page_token=token)
        runs += [run for run in page if "execution_id" in run.data.tags and "stage" not in run.data.tags]
        token = page.token
        if not token:
            return runs


def _find(runs: Sequence[Run], prefix: str) -> Run:
    matching = [run for run in runs if run.info.run_id.startswith(prefix)]
    if len(matching) == 1:
        return matching[0]
    several = ", ".join(run.info.run_id[:12] for run in matching[:4])
    raise UnknownRunError(
        f"`{prefix}` matches several executions ({several}); give more digits of the id"
        if matching
        else f"MLflow has no execution `{prefix}`; `smaller-student compare --last 20` lists them"
    )


def _row(run: Run) -> dict[str, str]:
    tags = run.data.tags
    commit = tags.get("git_commit", "")[:7] + ("+" if tags.get("git_dirty") == "true" else "")
    start = datetime.fromtimestamp(run.info.start_time / 1000).astimezone()
    return {
        "run": run.info.run_id[:8],
        "start": f"{start:%m-%d %H:%M}",
        "status": run.info.status.lower(),
        **cells(run.data.metrics, COLUMNS),
        "commit": commit,
    }
