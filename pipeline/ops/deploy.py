"""`make deploy`: work pool, deployments of prefect.yaml, and the automation that notices runs whose machine died.

Doing it again changes nothing that is as it should be.
"""

import logging
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings

from pipeline.ops.stage import guarded, log_to_stderr

log = logging.getLogger(__name__)

FLOW = "retrain"
POOL = "smaller-student"
ZOMBIES = "smaller-student: runs whose machine died"
BEAT = "prefect.flow-run.heartbeat"
LOST = "no sign of life; the next run goes on from there"
SILENCE = timedelta(minutes=10)
"""Without a heartbeat for so long a run counts as crashed; one beats every 30 s, or every 180 s if started by hand."""


class DeployError(RuntimeError):
    """Prefect cannot be told."""


def deploy() -> None:
    """Tell the server that PREFECT_API_URL, or the profile in use, names.

    Raises:
        DeployError: If there is no server, or it refuses.
    """
    settings = get_current_settings()
    if not settings.api.url:
        raise DeployError("there is no Prefect server: set PREFECT_API_URL (`make stack` starts one)")
    with get_client(sync_client=True) as client:
        _not_anothers(client, Path.cwd().resolve())
        try:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
            log.info("work pool %s is there", POOL)
        except ObjectAlreadyExists:
            pass
        _watch_for_zombies(client)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DeployError(f"`prefect deploy --all` failed: {(done.stderr or done.stdout).strip()[-800:]}")
    log.info("deployments of prefect.yaml are at %s", settings.api.url)


def deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """Those of this flow and this work pool; others on the server are none of ours."""
    return client.read_deployments(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
    )


def folder_of(deployment: DeploymentResponse) -> Path | None:
    """The checkout that a deployment's runs work in, as the worker knows it; None where they fetch one."""
    steps = deployment.pull_steps or []
    found = [step["directory"] for one in steps for step in one.values() if "directory" in step]
    return Path(found[-1]) if found else None


def online(client: SyncPrefectClient) -> list[str]:
    """Names of the workers that work for the pool."""
    return [one.name for one in client.read_workers_for_work_pool(POOL) if one.status == WorkerStatus.ONLINE]


def _not_anothers(client: SyncPrefectClient, here: Path) -> None:
    """Deployments name one checkout: a worker elsewhere, such as in a container, would not find this one."""
    others = sorted({str(folder) for one in deployments(client) if (folder := folder_of(one)) not in (None, here)})
    if others and online(client):
        raise DeployError(
            f"a worker of pool {POOL} works in {', '.join(others)}, not in {here}: run this there, or end it first "
            "(two minutes later it counts as gone)"
        )


def _watch_for_zombies(client: SyncPrefectClient) -> None:
    """Prefect leaves runs whose machine died in state Running for ever, and then starts no other one."""
    wanted = AutomationCore(
        name=ZOMBIES,
        description="Without it such a run stays in state Running for ever. Kept by `make deploy`.",
        trigger=EventTrigger(
            after={BEAT},
            expect={BEAT, *(f"prefect.flow-run.{kind}" for kind in ("Completed", "Failed", "Cancelled", "Crashed"))},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(  # others on this server may say so more rarely
                {"prefect.resource.role": ["flow"], "prefect.resource.name": [FLOW]}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(name=None, force=False, state=StateType.CRASHED, message=LOST)],
    )
    there = client.read_automations_by_name(ZOMBIES)
    if there:
        client.update_automation(there[0].id, wanted)
    else:
        client.create_automation(wanted)
        log.info("automation `%s` is there", ZOMBIES)


def main() -> None:
    """Entry point of `make deploy`."""
    log_to_stderr("deploy")
    sys.exit(guarded("deploy", deploy))


if __name__ == "__main__":
    main()
