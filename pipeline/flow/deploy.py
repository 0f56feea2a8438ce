"""`make deploy`: create the work pool, the deployments of prefect.yaml, and an automation for runs whose machine died.

Repeated calls are safe.
"""

import logging
import re
import subprocess
import sys
from contextlib import suppress
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
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.flow.server import check_server
from pipeline.stage.run import log_to_stderr, run_guarded

log = logging.getLogger(__name__)

FLOW = "retrain"
POOL = "smaller-student"
AUTOMATION = "smaller-student: runs whose machine died"
HEARTBEAT = "prefect.flow-run.heartbeat"
LOST = "no heartbeat for ten minutes; the next run resumes after the last finished epoch"
HEARTBEAT_TIMEOUT = timedelta(minutes=10)
"""A run without a heartbeat for so long counts as crashed; they come every 30 s, or 180 s if started by hand."""


class DeployError(RuntimeError):
    """The deployments cannot be created."""


def deploy() -> None:
    """Create everything on the server of PREFECT_API_URL or of the active Prefect profile.

    Raises:
        DeployError: If no server is configured, it rejects a request, or its worker uses another checkout.
        ServerError: If the server does not respond, or is too old.
    """
    if not (url := check_server(deploys=True)):
        raise DeployError("no Prefect server is configured; set PREFECT_API_URL (`make stack` starts a server)")
    pools = work_pools(Path.cwd())
    with get_client(sync_client=True) as client:
        _check_worker_checkout(client, pools, Path.cwd().resolve())
        if POOL in pools:  # the user creates other pools
            with suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
                log.info("created work pool %s", POOL)
        _create_automation(client)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DeployError(f"`prefect deploy --all` failed: {(done.stderr or done.stdout).strip()[-800:]}")
    log.info("created or updated the deployments of prefect.yaml at %s", url)


def work_pools(root: Path) -> list[str]:
    """Return the work pools of the flow's deployments in prefect.yaml.

    Raises:
        DeployError: If the file cannot be read, or has no deployment of the flow.
    """
    path = root / "prefect.yaml"
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        ours = [entry for entry in content["deployments"] if re.split("[.:]", entry["entrypoint"])[-1] == FLOW]
        pools = dict.fromkeys(entry["work_pool"]["name"] for entry in ours)
    except (OSError, YAMLError) as error:
        raise DeployError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    except (KeyError, TypeError) as error:
        reason = f" ({error} is missing)" if isinstance(error, KeyError) else ""
        raise DeployError(f"{path} has no valid `deployments`{reason}; compare the repository's file") from error
    if not pools:
        raise DeployError(f"{path} has no deployment of the flow `{FLOW}`; compare the repository's file")
    return list(pools)


def deployments(client: SyncPrefectClient, pools: list[str]) -> list[DeploymentResponse]:
    """Return the deployments of this flow in the work pools of prefect.yaml."""
    return client.read_deployments(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=pools)),
    )


def working_directory(deployment: DeploymentResponse) -> Path | None:
    """Return the checkout in which a deployment's runs work; None if they clone one."""
    steps = deployment.pull_steps or []
    folders = [options["directory"] for step in steps for options in step.values() if "directory" in options]
    return Path(folders[-1]) if folders else None


def workers_online(client: SyncPrefectClient, pool: str) -> int:
    """Return the number of online workers of a work pool."""
    return sum(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool))


def _check_worker_checkout(client: SyncPrefectClient, pools: list[str], here: Path) -> None:
    """Check that no online worker uses another checkout: deployments hold one path, which only one of them can have.

    Raises:
        DeployError: If one does.
    """
    for deployment in deployments(client, pools):
        folder, pool = working_directory(deployment), str(deployment.work_pool_name)
        if folder not in (None, here) and workers_online(client, pool):
            raise DeployError(
                f"a worker of pool {pool} works in {folder}, not in {here}; deploy from there, or stop that worker and "
                "wait two minutes"
            )


def _create_automation(client: SyncPrefectClient) -> None:
    """Create the automation that marks lost runs as crashed; they would stay Running and block all later runs."""
    final = ("Completed", "Failed", "Cancelled", "Crashed")
    automation = AutomationCore(
        name=AUTOMATION,
        description="Marks runs without a heartbeat as Crashed; they would stay Running. Created by `make deploy`.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{state}" for state in final)},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(  # other flows on this server may send heartbeats less often
                {"prefect.resource.role": ["flow"], "prefect.resource.name": [FLOW]}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=HEARTBEAT_TIMEOUT,
        ),
        actions=[ChangeFlowRunState(name=None, force=False, state=StateType.CRASHED, message=LOST)],
    )
    existing = client.read_automations_by_name(AUTOMATION)
    if existing:
        client.update_automation(existing[0].id, automation)
    else:
        client.create_automation(automation)
        log.info("created automation `%s`", AUTOMATION)


def main() -> None:
    """Entry point of `make deploy`."""
    log_to_stderr("deploy")
    sys.exit(run_guarded("deploy", deploy))


if __name__ == "__main__":
    main()
