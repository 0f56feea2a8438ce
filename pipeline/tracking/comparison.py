"""Executions side by side, as MLflow knows them."""

from collections.abc import Sequence
from datetime import datetime

from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.tracking.store import TrackingError

COLUMNS = {
    "teacher/mAP": ("teacher", "{:.4f}", 1),
    "eval/mAP": ("mAP", "{:.4f}", 1),
    "model/params_reduction": ("params", "{:.1%}", -1),
    "model/flops_reduction": ("MACs", "{:.1%}", -1),
    "latency/speedup": ("speed", "{:.2f}x", 1),
}
"""Metric key of a parent run: heading, format and unit; short enough for a terminal of 80 columns."""


class UnknownRunError(TrackingError):
    """MLflow has no such execution, or several."""

    exit_code = 3


def executions(client: MlflowClient, experiment: str, asked: Sequence[str], last: int) -> list[dict[str, str]]:
    """One row an execution, the latest first, ready to print.

    Args:
        client: Of MLflow.
        experiment: Name of the experiment.
        asked: Run ids of executions, or their beginnings; the latest ones where there are none.
        last: How many of those.

    Raises:
        UnknownRunError: If there are none, or an id is of none or of several.
    """
    found = client.get_experiment_by_name(experiment)
    runs = _parents(client, found.experiment_id) if found else []
    if not runs:
        raise UnknownRunError(f"MLflow knows no execution in experiment {experiment}; run `dvc repro` first")
    if asked:
        runs = [_one(runs, start) for start in asked]
    return [_row(run) for run in runs[: None if asked else last]]


def _parents(client: MlflowClient, experiment: str) -> list[Run]:
    """All executions, the latest first; their stages name a parent."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment], order_by=["attributes.start_time DESC"], page_token=token)
        runs += [run for run in page if "execution_id" in run.data.tags and "stage" not in run.data.tags]
        token = page.token
        if not token:
            return runs


def _one(runs: Sequence[Run], start: str) -> Run:
    matching = [run for run in runs if run.info.run_id.startswith(start)]
    if len(matching) == 1:
        return matching[0]
    several = ", ".join(run.info.run_id[:12] for run in matching[:4])
    raise UnknownRunError(
        f"`{start}` is of several executions ({several}); write more of its id"
        if matching
        else f"MLflow knows no execution `{start}`; `smaller-student compare --last 20` lists them"
    )


def _row(run: Run) -> dict[str, str]:
    metrics, tags = run.data.metrics, run.data.tags
    figures = {
        title: form.format(metrics[key] / unit) if key in metrics else ""
        for key, (title, form, unit) in COLUMNS.items()
    }
    commit = tags.get("git_commit", "")[:7] + ("+" if tags.get("git_dirty") == "true" else "")
    when = datetime.fromtimestamp(run.info.start_time / 1000).astimezone()
    return {
        "run": run.info.run_id[:8],
        "began": f"{when:%m-%d %H:%M}",
        "ended": run.info.status.lower(),
        **figures,
        "commit": commit,
    }
