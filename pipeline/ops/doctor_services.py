"""The doctor's looks at MLflow and Prefect: with real calls, since `/health` is answered while all else is refused."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

import requests
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypes
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import get_current_settings
from prefect.states import Crashed

from pipeline.files import Files
from pipeline.ops.deploy import POOL, ZOMBIES, DeployError, deployments, folder_of, online, pools
from pipeline.ops.finding import Finding
from pipeline.ops.locks import is_held
from pipeline.ops.run_record import executions
from pipeline.ops.store import cause, tracking_uri
from pipeline.ops.sync import sync

PATIENCE = 5.0
"""Seconds to wait for an answer."""
ACTIVE = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
SETTLING = timedelta(minutes=5)
"""A run that began later may not hold its lock yet."""


def mlflow(files: Files) -> Iterator[Finding]:
    """Whether the store answers, and what it was not told yet."""
    uri = tracking_uri(files)
    if uri.startswith("http"):
        yield _server(uri)
    elif uri.endswith(str(files.mlflow_db)) and not files.mlflow_db.is_file():
        yield Finding("mlflow", True, f"{uri}, made at the first run")
    else:
        yield _store(uri)
    stale = [one for one in executions(files) if one.pending(uri) and "RUNNING" not in one.outcomes().values()]
    if stale:
        yield Finding(
            "mlflow",
            False,
            f"{len(stale)} executions that are over are not known in full; their runs may stand there as running",
            "`smaller-student sync` tells it, and ends runs whose process is gone",
            lambda: sync(files),
        )


def _store(uri: str) -> Finding:
    from mlflow import MlflowClient  # imports much

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # of MLflow, SQLAlchemy or a driver
        text = f"{uri} cannot be read: {str(error).splitlines()[0]}"
        return Finding("mlflow", False, text, "look whether it is whole, and of this MLflow (`mlflow db upgrade URI`)")
    return Finding("mlflow", True, f"{uri} answers")


def _server(uri: str) -> Finding:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    login = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
    call = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    try:
        answer = requests.post(call, json={"max_results": 1}, auth=login, timeout=PATIENCE)
    except requests.RequestException as error:
        text = f"{uri} does not answer ({cause(error)})"
        return Finding(
            "mlflow", False, text, "start it; meanwhile everything is kept, and `smaller-student sync` tells it"
        )
    if answer.status_code == 200:
        return Finding("mlflow", True, f"{uri} answers" + (f" to {user}" if user else ""))
    if answer.status_code == 403 and "host" in answer.text.lower():
        remedy = (
            "add that name and port to the server's `--allowed-hosts` (MLFLOW_SERVER_ALLOWED_HOSTS), which replaces"
        )
        return Finding("mlflow", False, f"{uri} refuses to be called by this name", f"{remedy} its defaults")
    if answer.status_code in (401, 403):
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return Finding("mlflow", False, f"{uri} wants another log-in ({answer.status_code})", remedy)
    return Finding("mlflow", False, f"{uri} answers with {answer.status_code}: {answer.text[:100]}", "look at its log")


def prefect(files: Files) -> Iterator[Finding]:
    """Whether the server answers, and whether anything there waits for what is dead."""
    url = get_current_settings().api.url
    if not url:
        text = "no server (PREFECT_API_URL): `smaller-student retrain` works, schedules do not"
        yield Finding("prefect", None, text, "`make stack` starts one")
        return
    with get_client(sync_client=True, httpx_settings={"timeout": PATIENCE}) as client:
        try:
            there = {pool.name for pool in client.read_work_pools()}
        except Exception as error:  # of many libraries
            wanted = "401" in str(error)
            text = f"{url} {'wants another log-in' if wanted else f'does not answer ({cause(error)})'}"
            yield Finding("prefect", False, text, "set PREFECT_API_AUTH_STRING" if wanted else "start it")
            return
        yield Finding("prefect", True, f"{url} answers")
        try:
            named = pools(files.root)
        except DeployError as error:
            yield Finding("prefect", False, str(error))
            return
        mine = deployments(client, named)
        missing = [f"work pool {pool}" for pool in named if pool not in there]
        missing += [] if mine else ["deployments"]
        missing += [] if client.read_automations_by_name(ZOMBIES) else ["automation for lost runs"]
        if missing:
            by_hand = "" if set(named) <= {POOL, *there} else "`prefect work-pool create NAME --type TYPE`, then "
            yield Finding("prefect", False, f"it has no {', no '.join(missing)}", f"{by_hand}`make deploy`")
            return
        for pool in named:
            workers = online(client, pool)
            remedy = "" if workers else f"`prefect worker start --pool {pool} --limit 1`, or `make stack`"
            yield Finding("worker", bool(workers), f"{workers} work for pool {pool}", remedy)
        for deployment in mine:
            if (folder := folder_of(deployment)) == files.root.resolve():
                yield from _runs(files, client, deployment)
            else:
                text = f"{deployment.name} works in {folder or 'a checkout that it fetches'}, not in {files.root}"
                yield Finding("runs", None, text, "whether its runs live can only be seen there")


def _runs(files: Files, client: SyncPrefectClient, deployment: DeploymentResponse) -> Iterator[Finding]:
    """Runs that nobody runs any more, and slots that they keep."""
    active = _active(client, deployment.id)
    for run in active:
        if _lost(files, run):
            yield Finding(
                "runs",
                False,
                f"{deployment.name}/{run.name} is {run.state_name} since {run.start_time:%Y-%m-%d %H:%M}, but nobody "
                "retrains this checkout",
                "`smaller-student doctor --fix` ends it as crashed; look first where else a worker runs",
                partial(_crash, run.id),
            )
    limit = deployment.global_concurrency_limit
    if limit is not None and limit.active_slots > len(active):
        yield Finding(
            "slots",
            False,
            f"{deployment.name} has {limit.active_slots} slots taken and {len(active)} runs that could hold them",
            "they come back after their grace period; `smaller-student doctor --fix` gives them back now",
            partial(_free, deployment.id),
        )


def _lost(files: Files, run: FlowRun) -> bool:
    """Whether a run cannot be under way: whoever retrains holds the lock of the checkout."""
    young = run.start_time is None or datetime.now(UTC) - run.start_time < SETTLING
    return not young and not is_held(files.tracking / "retrain.lock")


def _crash(run: UUID) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, Crashed(message="its process is gone"), force=True)


def _active(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
            state=FlowRunFilterState(type=StateTypes(any_=ACTIVE)),
        )
    )


def _free(deployment: UUID) -> None:
    """Give slots back, by what is there now: a run may have begun since the look."""
    with get_client(sync_client=True) as client:
        limit = client.read_deployment(deployment).global_concurrency_limit
        taken = len(_active(client, deployment))
        if limit is not None and limit.active_slots > taken:
            client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=taken))


LOOKS = (mlflow, prefect)
