"""Artifacts and events of a flow run in Prefect; errors here never fail the run."""

import base64
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.events import emit_event
from prefect.runtime import deployment
from prefect.states import Cancelled

from pipeline.config import Params
from pipeline.files import Files
from pipeline.registry.publish import Published
from pipeline.tracking import metrics

log = logging.getLogger(__name__)

EPOCH = re.compile(r"epoch (\d+) of (\d+)\b")
"""Log line of a training from which progress is read."""
PROGRESS_INTERVAL = 5.0
"""Minimum seconds between two updates of a progress artifact."""


@contextmanager
def _best_effort(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # any error of an unreachable server
        log.warning("%s could not be sent to Prefect (%s)", what, str(error).splitlines()[0] if str(error) else error)


def skip_stale_runs(now: datetime) -> None:
    """Cancel the waiting runs of this deployment that were due before `now`, except forced ones.

    Each would end by itself with nothing to do, but a worker needs seconds to start each, and after a holiday there may
    be fifty.
    """
    if not deployment.id:
        return
    with _best_effort("the end of overdue runs"), get_client(sync_client=True) as client:
        waiting = {
            "deployment_id": {"any_": [deployment.id]},
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"before_": now},
        }
        message = f"the run that began at {now:%H:%M} has done its work"
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(waiting)):
            if not run.parameters.get("force"):
                client.set_flow_run_state(run.id, Cancelled(name="Skipped", message=message))


class Progress:
    """Progress artifact of a stage's task run, in percent of its epochs."""

    def __init__(self, stage: str) -> None:
        self._stage, self._updated, self._percent = stage, time.monotonic(), 0.0
        self._artifact: UUID | None = None

    def read(self, line: str) -> None:
        """Update the progress from a line of the stage's output."""
        if found := EPOCH.search(line):
            self._percent = 100.0 * (int(found[1]) - 1) / int(found[2])
            if time.monotonic() - self._updated >= PROGRESS_INTERVAL:
                self._update()

    def done(self) -> None:
        self._percent = 100.0
        self._update()

    def _update(self) -> None:
        self._updated = time.monotonic()
        with _best_effort("the progress"):
            if self._artifact is None:
                artifact = create_progress_artifact(self._percent, description=f"Stage {self._stage}: epochs, %")
                self._artifact = artifact if isinstance(artifact, UUID) else None
            else:
                update_progress_artifact(self._artifact, self._percent)


def results(files: Files) -> None:
    """Create artifacts: a table of the stages' results, and a plot of mAP against MACs."""
    with _best_effort("the results"):
        create_table_artifact(
            table=metrics.result_table(files),
            key="result",
            description=f"Results of each stage, protocol {metrics.last_conditions(files)}.",
        )
        picture = files.report / "pareto.png"
        if picture.is_file():
            content = base64.b64encode(picture.read_bytes()).decode()
            create_image_artifact(f"data:image/png;base64,{content}", key="pareto", description="mAP against MACs.")


def promotion(files: Files, params: Params, published: Published) -> None:
    """Create a Markdown artifact with the decision of the promotion rule, and emit it as an event for automations."""
    outcome = "promoted" if published.decision.passed else "rejected"
    name = params.tracking.model_name
    with _best_effort("the decision"):
        rows = metrics.result_table(files)
        lines = ["| " + " | ".join(row) + " |" for row in ([*rows[0]], ["---"] * len(rows[0]), *map(dict.values, rows))]
        text = (
            f"## {name}, version {published.version}: {outcome}\n\n"
            f"{published.sentence[0].upper()}{published.sentence[1:]}.\n\n" + "\n".join(lines)
        )
        create_markdown_artifact(text, key="verdict", description="Decision of the promotion rule.")
        emit_event(
            event=f"model.{outcome}",
            resource={"prefect.resource.id": f"smaller-student.model.{name}", "prefect.resource.name": name},
            payload={"version": published.version, "reason": published.decision.reason, "digest": published.digest},
        )
