"""`make deploy`: work pool, deployments of prefect.yaml, and the automation that notices runs whose machine died.

Doing it again changes nothing that is as it should be.
"""

import logging
import subprocess
import sys
from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings

from pipeline.ops.stage import guarded, log_to_stderr

log = logging.getLogger(__name__)

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
                {"prefect.resource.role": ["flow"], "prefect.resource.name": ["retrain"]}
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
