"""What a flow run leaves in Prefect for people and for other automations. Nothing of it may make a run fail."""

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
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.runtime import deployment
from prefect.states import Cancelled

from pipeline.config import Params
from pipeline.files import Files
from pipeline.registry.publish import Published
from pipeline.tracking import metrics

log = logging.getLogger(__name__)

EPOCH = re.compile(r"epoch (\d+) of (\d+)\b")
"""How a training says how far it has come."""
TOLD = 5.0
"""Seconds between two words about progress at least."""


@contextmanager
def _best_effort(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of a server that is gone, whatever it is
        log.warning("Prefect was not told %s (%s)", what, str(error).splitlines()[0] if str(error) else error)


def skip_stale_runs(now: datetime) -> None:
    """End the runs of this deployment that were due before now and still wait, such as fifty after a holiday.

    Each would end by itself as soon as it began, but a worker takes seconds for each.
    """
    if not deployment.id:
        return
    with _best_effort("what was overtaken"), get_client(sync_client=True) as client:
        waiting = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=[UUID(deployment.id)]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
                expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": now}),
            )
        )
        for run in waiting:
            if run.parameters.get("force"):
                continue
            client.set_flow_run_state(
                run.id, Cancelled(name="Skipped", message=f"a run that began at {now:%H:%M} did it")
            )


class Progress:
    """How far a stage has come, as an artefact of its task run.

    Args:
        stage: Its name.
    """

    def __init__(self, stage: str) -> None:
        self._stage, self._told, self._share = stage, time.monotonic(), 0.0
        self._artifact: UUID | None = None

    def read(self, line: str) -> None:
        """Look at a line of the stage's output."""
        if found := EPOCH.search(line):
            self._share = 100.0 * (int(found[1]) - 1) / int(found[2])
            if time.monotonic() - self._told >= TOLD:
                self._tell()

    def done(self) -> None:
        """It is up to date."""
        self._share = 100.0
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        with _best_effort("how far it is"):
            if self._artifact is None:
                made = create_progress_artifact(self._share, description=f"Stage {self._stage}")
                self._artifact = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(self._artifact, self._share)


def results(files: Files) -> None:
    """What each stage led to, as a table; mAP against MACs, as a picture."""
    with _best_effort("the results"):
        create_table_artifact(table=metrics.table(files), key="result", description="What each stage led to.")
        picture = files.report / "pareto.png"
        if picture.is_file():
            content = base64.b64encode(picture.read_bytes()).decode()
            create_image_artifact(f"data:image/png;base64,{content}", key="pareto", description="mAP and cost.")


def promotion(files: Files, params: Params, found: Published) -> None:
    """What the gate said, as Markdown, and as an event that automations can wait for."""
    outcome = "promoted" if found.decision.passed else "rejected"
    name = params.tracking.model_name
    with _best_effort("the decision"):
        rows = metrics.table(files)
        lines = ["| " + " | ".join(row) + " |" for row in ([*rows[0]], ["---"] * len(rows[0]), *map(dict.values, rows))]
        text = (
            f"## {name}, version {found.version}: {outcome}\n\n{found.sentence[0].upper()}{found.sentence[1:]}.\n\n"
            + "\n".join(lines)
        )
        create_markdown_artifact(text, key="verdict", description="What the gate said.")
        emit_event(
            event=f"model.{outcome}",
            resource={"prefect.resource.id": f"smaller-student.model.{name}", "prefect.resource.name": name},
            payload={"version": found.version, "reason": found.decision.reason, "digest": found.digest},
        )
