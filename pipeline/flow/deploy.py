"""`make deploy`: work pool, deployments of prefect.yaml, and the automation that notices runs whose machine died.

Doing it again changes nothing that is as it should be.
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
from prefect.settings import get_current_settings
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.stage.run import log_to_stderr, run_guarded

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
    named = pools(Path.cwd())
    with get_client(sync_client=True) as client:
        _not_anothers(client, named, Path.cwd().resolve())
        if POOL in named:  # pools of other kinds are made by hand
            with suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
                log.info("work pool %s is there", POOL)
        _watch_for_zombies(client)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DeployError(f"`prefect deploy --all` failed: {(done.stderr or done.stdout).strip()[-800:]}")
    log.info("deployments of prefect.yaml are at %s", settings.api.url)


def pools(root: Path) -> list[str]:
    """Work pools that prefect.yaml names for the flow.

    Raises:
        DeployError: If it cannot be read, or names none.
    """
    path = root / "prefect.yaml"
    try:
        said = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        ours = [one for one in said["deployments"] if re.split("[.:]", one["entrypoint"])[-1] == FLOW]
        found = dict.fromkeys(one["work_pool"]["name"] for one in ours)
    except (OSError, YAMLError) as error:
        raise DeployError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    except (KeyError, TypeError) as error:
        reason = f" (it lacks {error})" if isinstance(error, KeyError) else ""
        raise DeployError(f"{path} does not describe deployments{reason}; compare the repository's") from error
    if not found:
        raise DeployError(f"{path} has no deployment of the flow `{FLOW}`")
    return list(found)


def deployments(client: SyncPrefectClient, named: list[str]) -> list[DeploymentResponse]:
    """Those of this flow in the work pools of prefect.yaml; others on the server are none of ours."""
    return client.read_deployments(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=named)),
    )


def folder_of(deployment: DeploymentResponse) -> Path | None:
    """The checkout that a deployment's runs work in, as the worker knows it; None where they fetch one."""
    steps = deployment.pull_steps or []
    found = [step["directory"] for one in steps for step in one.values() if "directory" in step]
    return Path(found[-1]) if found else None


def online(client: SyncPrefectClient, pool: str) -> int:
    """How many workers work for a pool."""
    return sum(one.status == WorkerStatus.ONLINE for one in client.read_workers_for_work_pool(pool))


def _not_anothers(client: SyncPrefectClient, named: list[str], here: Path) -> None:
    """Deployments name one checkout: a worker elsewhere, such as in a container, would not find this one."""
    for one in deployments(client, named):
        folder, pool = folder_of(one), str(one.work_pool_name)
        if folder not in (None, here) and online(client, pool):
            raise DeployError(
                f"a worker of pool {pool} works in {folder}, not in {here}: run this there, or end it first (two "
                "minutes later it counts as gone)"
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
    sys.exit(run_guarded("deploy", deploy))


if __name__ == "__main__":
    main()
