"""`smaller-student doctor`: find what the other tools do not show; `--fix` removes what is certainly dead."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import get_current_settings
from prefect.states import Crashed

from pipeline.files import Files
from pipeline.flow import dvc_rwlock
from pipeline.flow.deploy import POOL, ZOMBIES, deployments, folder_of, online, pools
from pipeline.stage.params_file import ParamsError, load
from pipeline.system.locks import holder, is_held
from pipeline.tracking.run_record import executions
from pipeline.tracking.store import UriError, cause, check_uri, open_store, tracking_uri
from pipeline.tracking.sync import sync

ENOUGH = 5 * 2**30
"""Free bytes below which a training may end before it is done."""
MIN_AGE = timedelta(minutes=5)
"""A run that began later may not hold its lock yet."""
FIX = "`smaller-student doctor --fix`"
LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
REMEDIES = {
    "Invalid Host": "add that name to its `--allowed-hosts` (MLFLOW_SERVER_ALLOWED_HOSTS), which replaces the defaults",
    "error code 401": LOGIN,
    "error code 403": LOGIN,
    "mlflow db upgrade": "back the database up, then `mlflow db upgrade URI`",
}
"""What helps where MLflow's answer has these words."""


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: One or two words.
        ok: Whether all is well; None for information.
        message: What was found.
        remedy: What to do; empty where nothing is to be done.
        fix: Does it, where that is safe.
    """

    name: str
    ok: bool | None
    message: str
    remedy: str = ""
    fix: Callable[[], object] | None = None


def examine(files: Files) -> Iterator[Check]:
    """Run all checks, one after the other; one that fails does not end the others."""
    for check in (libraries, disk, sources, dvc_locks, own_locks, mlflow, prefect):
        try:
            yield from check(files)
        except Exception as error:
            name = check.__name__.replace("_", " ")
            yield Check(name, False, f"cannot be checked: {type(error).__name__}: {error}")


def libraries(files: Files) -> Iterator[Check]:
    """Compare what is installed with requirements.lock."""
    locked: dict[str, list[str]] = {}  # a library may have several versions, for other Pythons and systems
    for name, wanted in re.findall(r"^([\w.-]+)==([^ ;\\]+)", _text(files.root / "requirements.lock"), re.M):
        locked.setdefault(name, []).append(wanted)
    other = []
    for name, versions in locked.items():
        with suppress(PackageNotFoundError):
            if (installed := version(name)).partition("+")[0] not in versions:
                other.append(f"{name} {installed} (locked {' or '.join(versions)})")
    if other:
        yield Check("libraries", False, f"{len(other)} differ: {', '.join(other[:5])}", "`make setup`")
    elif locked:
        yield Check("libraries", True, f"as requirements.lock says ({len(locked)} versions)")
    else:
        yield Check("libraries", None, f"not compared: there is no requirements.lock in {files.root}")


def disk(files: Files) -> Iterator[Check]:
    """Measure the room for the checkout and for temporary files."""
    for folder in {path.stat().st_dev: path for path in (Path(tempfile.gettempdir()), files.root)}.values():
        free = shutil.disk_usage(folder).free
        remedy = "" if free >= ENOUGH else "make room; `dvc gc --workspace` drops outputs that are not in use"
        yield Check("disk", free >= ENOUGH, f"{free / 2**30:.1f} GiB are free in {folder}", remedy)


def sources(files: Files) -> Iterator[Check]:
    """Look whether params.yaml is accepted and dvc.lock is merged."""
    try:
        load(files.params)
        yield Check("params.yaml", True, "is valid")
    except (ParamsError, OSError) as error:
        remedy = "correct it; `smaller-student preset --upgrade` adds missing keys"
        yield Check("params.yaml", False, str(error).splitlines()[0], remedy)
    for number, line in enumerate(_text(files.root / "dvc.lock").splitlines(), start=1):
        if line.startswith(("<<<<<<<", ">>>>>>>")):
            yield Check("dvc.lock", False, f"has merge markers in line {number}", "`git checkout --ours dvc.lock`")
            break


def dvc_locks(files: Files) -> Iterator[Check]:
    """Look for what stops DVC for no reason (see `rwlock`)."""
    remedy = f"{FIX} removes DVC's lock table unless somebody works in this checkout"
    for sentence in dvc_rwlock.defects(files):
        yield Check("dvc locks", False, sentence, remedy, partial(dvc_rwlock.release_dead, files))


def own_locks(files: Files) -> Iterator[Check]:
    """Say who retrains or runs a stage; the system releases these locks when their process ends."""
    for name, what in (("retrain", "a retraining"), ("stage", "a stage")):
        if is_held(path := files.tracking / f"{name}.lock"):
            yield Check("locks", None, f"{what} is running: {holder(path)}")


def mlflow(files: Files) -> Iterator[Check]:
    """Call the store: a server answers `/health` even while it rejects everything else."""
    uri, user = tracking_uri(files), os.environ.get("MLFLOW_TRACKING_USERNAME")
    try:
        check_uri(uri)
    except UriError as error:
        message, _, remedy = str(error).partition("; ")
        yield Check("mlflow", False, message, remedy)
        return
    if uri.endswith(str(files.mlflow_db)) and not files.mlflow_db.is_file():
        yield Check("mlflow", True, f"{uri} is created by the first run")
    else:
        try:
            open_store(files).search_experiments(max_results=1)
            yield Check("mlflow", True, f"{uri} answers" + (f" to {user}" if user else ""))
        except Exception as error:  # of MLflow, requests, SQLAlchemy or a driver
            later = "start or repair it; until then runs stay on disk, and `smaller-student sync` uploads them"
            remedy = next((remedy for words, remedy in REMEDIES.items() if words in str(error)), later)
            yield Check("mlflow", False, f"{uri} cannot be used: {cause(error)}", remedy)
    if count := unsynced(files):
        message = f"{count} executions are not uploaded completely; their runs may look as if they still ran"
        remedy = "`smaller-student sync` uploads them and ends runs whose process is gone"
        yield Check("mlflow", False, message, remedy, lambda: sync(files))


def unsynced(files: Files) -> int:
    """Count executions that ended and were not uploaded to MLflow completely."""
    uri, count = tracking_uri(files), 0
    for records in executions(files):
        running = [record.process.alive for record in records.stages().values() if record.status == "RUNNING"]
        living = any(alive is not False for alive in running)  # None: on another host, which cannot be seen from here
        count += not living and bool(running or records.pending(uri))
    return count


def prefect(files: Files) -> Iterator[Check]:
    """Call the server, and compare what it has with what `make deploy` puts there."""
    if not (url := get_current_settings().api.url):
        message = "no server (PREFECT_API_URL): `smaller-student retrain` works, schedules do not"
        yield Check("prefect", None, message, "`make stack` starts one")
        return
    with get_client(sync_client=True, httpx_settings={"timeout": 5}) as client:
        try:
            there = {pool.name for pool in client.read_work_pools()}
            yield Check("prefect", True, f"{url} answers")
        except Exception as error:  # of many libraries
            remedy = "set PREFECT_API_AUTH_STRING" if "401" in str(error) else "start it"
            yield Check("prefect", False, f"{url} cannot be used: {cause(error)}", remedy)
            return
        named = pools(files.root)
        mine = deployments(client, named)
        missing = [f"work pool {pool}" for pool in named if pool not in there]
        missing += [] if mine else ["deployments"]
        missing += [] if client.read_automations_by_name(ZOMBIES) else ["automation for lost runs"]
        if missing:
            by_hand = "" if set(named) <= {POOL, *there} else "`prefect work-pool create NAME --type TYPE`, then "
            yield Check("prefect", False, f"it has no {', no '.join(missing)}", f"{by_hand}`make deploy`")
            return
        for pool in named:
            workers = online(client, pool)
            remedy = "" if workers else f"`prefect worker start --pool {pool} --limit 1`, or `make stack`"
            yield Check("worker", bool(workers), f"{workers} online for pool {pool}", remedy)
        for deployment in mine:
            if (folder := folder_of(deployment)) == files.root.resolve():
                yield from _runs(files, client, deployment)
            else:
                message = f"{deployment.name} works in {folder or 'a checkout that it fetches'}, not in {files.root}"
                yield Check("runs", None, message, "only there can be seen whether its runs are alive")


def _runs(files: Files, client: SyncPrefectClient, deployment: DeploymentResponse) -> Iterator[Check]:
    """Find runs whose process is gone, and concurrency slots that no run holds."""
    fix = partial(_release, files, deployment.id)
    for run in _lost(files, client, deployment.id):
        since = f"{run.state_name} since {run.start_time:%Y-%m-%d %H:%M}"
        message = f"{deployment.name}/{run.name} is {since}, but nothing retrains this checkout"
        remedy = f"{FIX} marks it as crashed; first look whether a worker runs elsewhere"
        yield Check("runs", False, message, remedy, fix)
    active, limit = len(_active(client, deployment.id)), deployment.global_concurrency_limit
    if limit is not None and limit.active_slots > active:
        message = f"{deployment.name} has {limit.active_slots} slots taken and {active} runs that could hold them"
        yield Check("slots", False, message, f"{FIX} releases them; so does their grace period", fix)


def _active(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    states = ["RUNNING", "PENDING", "CANCELLING"]
    wanted = {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": states}}}
    return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))


def _lost(files: Files, client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """Active runs that cannot be running: whoever retrains holds the lock of the checkout."""
    if is_held(files.tracking / "retrain.lock"):
        return []
    began = datetime.now(UTC) - MIN_AGE
    return [run for run in _active(client, deployment) if run.start_time is not None and run.start_time <= began]


def _release(files: Files, deployment: UUID) -> None:
    """Mark lost runs as crashed, and release slots that no run holds, by what is there now."""
    with get_client(sync_client=True) as client:
        for run in _lost(files, client, deployment):
            client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)
        limit, active = client.read_deployment(deployment).global_concurrency_limit, len(_active(client, deployment))
        if limit is not None and limit.active_slots > active:
            client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=active))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
