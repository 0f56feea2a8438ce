"""`smaller-student doctor`: check the environment, and with `--fix` remove stale locks and lost runs."""

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
from shlex import quote
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.states import Crashed

from pipeline.data.manifest import DataError
from pipeline.files import Files
from pipeline.flow import dvc_rwlock
from pipeline.flow.deploy import AUTOMATION, POOL, deployments, work_pools, workers_online, working_directory
from pipeline.flow.raw_data import check_root, tracking_file
from pipeline.flow.server import ServerError, check_server
from pipeline.registry.errors import RegistryError
from pipeline.registry.publish import open_registry
from pipeline.stage.params_file import ParamsError, load
from pipeline.system.locks import holder, is_held
from pipeline.tracking.errors import TrackingError, UriError, root_cause, shown
from pipeline.tracking.run_record import all_executions
from pipeline.tracking.store import check_uri, open_store, store_key, tracking_uri
from pipeline.tracking.sync import sync

MIN_FREE_BYTES = 5 * 2**30
"""Free disk space below which a training may fail."""
MIN_AGE = timedelta(minutes=5)
"""Minimum age of a run that counts as lost; a younger one may not hold its lock yet."""
FIX = "`smaller-student doctor --fix`"
LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
REMEDIES = {
    "Invalid Host": "add that name and the default names to its `--allowed-hosts` (MLFLOW_SERVER_ALLOWED_HOSTS)",
    "error code 401": LOGIN,
    "error code 403": LOGIN,
    "mlflow db upgrade": "back the database up, then `mlflow db upgrade URI`",
}
"""Remedy for each text that an error of MLflow may contain."""


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        ok: Whether the check passed; None for information.
        remedy: What the user should do; may be empty.
        fix: Carries out the remedy, if that is safe.
    """

    name: str
    ok: bool | None
    message: str
    remedy: str = ""
    fix: Callable[[], object] | None = None


def examine(files: Files) -> Iterator[Check]:
    """Run all checks; an exception in one does not end the others."""
    for check in (libraries, disk, sources, data, dvc_locks, own_locks, mlflow, registry, prefect):
        try:
            yield from check(files)
        except Exception as error:
            name = check.__name__.replace("_", " ")
            yield Check(name, False, f"cannot be checked: {type(error).__name__}: {error}")


def libraries(files: Files) -> Iterator[Check]:
    """Compare the installed libraries with requirements.lock."""
    locked: dict[str, list[str]] = {}  # a library may be locked at several versions, for different Pythons and systems
    for name, pinned in re.findall(r"^([\w.-]+)==([^ ;\\]+)", _text(files.root / "requirements.lock"), re.M):
        locked.setdefault(name, []).append(pinned)
    different = []
    for name, versions in locked.items():
        with suppress(PackageNotFoundError):
            if (installed := version(name)).partition("+")[0] not in versions:
                different.append(f"{name} {installed} (locked {' or '.join(versions)})")
    if different:
        yield Check("libraries", False, f"{len(different)} differ: {', '.join(different[:5])}", "run `make setup`")
    elif locked:
        yield Check("libraries", True, f"versions are those of requirements.lock ({len(locked)} libraries)")
    else:
        yield Check("libraries", None, f"not checked: {files.root} has no requirements.lock")


def disk(files: Files) -> Iterator[Check]:
    """Check the free disk space for the checkout and for temporary files."""
    for folder in {path.stat().st_dev: path for path in (Path(tempfile.gettempdir()), files.root)}.values():
        free = shutil.disk_usage(folder).free
        remedy = "" if free >= MIN_FREE_BYTES else "free disk space; `dvc gc --workspace` deletes unused outputs"
        yield Check("disk", free >= MIN_FREE_BYTES, f"{free / 2**30:.1f} GiB free in {folder}", remedy)


def sources(files: Files) -> Iterator[Check]:
    """Check that params.yaml is valid and DVC's files have no merge conflicts."""
    tracked = None
    try:
        tracked = tracking_file(files, load(files.params))
        yield Check("params.yaml", True, "is valid")
    except (ParamsError, OSError) as error:
        remedy = "correct it; `smaller-student preset --upgrade` adds missing keys"
        yield Check("params.yaml", False, str(error).replace("params.yaml: ", "").replace("\n", "; "), remedy)
    others = {*files.root.glob("*.dvc"), *files.root.glob("data/*.dvc"), *([files.root / tracked] if tracked else [])}
    for path in (files.root / "dvc.lock", files.root / "dvc.yaml", *sorted(others)):
        if not path.is_file():  # the folder .dvc
            continue
        for number, line in enumerate(_text(path).splitlines(), start=1):
            if line.startswith(("<<<<<<<", ">>>>>>>")):
                name = path.relative_to(files.root).as_posix()
                remedy = f"run `git checkout --ours {quote(name)}`"
                yield Check(name, False, f"has merge markers in line {number}", remedy)
                break


def data(files: Files) -> Iterator[Check]:
    """Check that DVC can read `data.root`."""
    try:
        params = load(files.params)
        check_root(files, params)
        yield Check("data", True, f"`data.root` {params.data.root} can be read")
        if not (folder := _cache_folder(files)).isascii():
            message = (
                f"DVC's cache {folder} has letters outside of ASCII in its path: `dvc exp run --temp` and --queue fail"
            )
            yield Check("data", None, message, "`dvc cache dir --local /PATH` names another folder")
    except DataError as error:
        message, _, remedy = str(error).partition("; ")
        yield Check("data", False, message, remedy)
    except ParamsError:
        return  # reported by the check of params.yaml


def _cache_folder(files: Files) -> str:
    from dvc.config import Config  # takes a second

    return str(Config(str(files.root / ".dvc"))["cache"].get("dir") or files.root / ".dvc" / "cache")


def dvc_locks(files: Files) -> Iterator[Check]:
    """Check for stale entries in DVC's lock table (see `dvc_rwlock`)."""
    remedy = f"{FIX} deletes DVC's lock table unless a process works in this checkout"
    for sentence in dvc_rwlock.defects(files):
        yield Check("dvc locks", False, sentence, remedy, partial(dvc_rwlock.release_dead, files))


def own_locks(files: Files) -> Iterator[Check]:
    """Report who retrains or runs a stage; the system releases these locks when their process ends."""
    for name, what in (("retrain", "a retraining"), ("stage", "a stage")):
        if is_held(path := files.tracking / f"{name}.lock"):
            yield Check("locks", None, f"{what} is running: {holder(path)}")


def mlflow(files: Files) -> Iterator[Check]:
    """Check the MLflow store by a real request: a server answers `/health` even while it rejects all others."""
    uri, user = tracking_uri(files), os.environ.get("MLFLOW_TRACKING_USERNAME")
    try:
        check_uri(uri)
    except UriError as error:
        message, _, remedy = str(error).partition("; ")
        yield Check("mlflow", False, message, remedy)
        return
    if uri.endswith(str(files.mlflow_db)) and not files.mlflow_db.is_file():
        yield Check("mlflow", True, f"{shown(uri)} will be created by the first run")
    else:
        try:
            open_store(files).search_experiments(max_results=1)
            yield Check("mlflow", True, f"{shown(uri)} responds" + (f" to user {user}" if user else ""))
        except Exception as error:  # of MLflow, requests, SQLAlchemy or a driver
            default = "start or repair it; until then runs stay on disk, and `smaller-student sync` uploads them later"
            remedy = next((remedy for text, remedy in REMEDIES.items() if text in str(error)), default)
            yield Check("mlflow", False, f"{shown(uri)} cannot be used: {root_cause(error)}", remedy)
    if count := unsynced(files):
        message = f"{count} ended executions are not uploaded completely, so MLflow may show them as running"
        remedy = "`smaller-student sync` uploads them"
        yield Check("mlflow", False, message, remedy, lambda: sync(files))


def registry(files: Files) -> Iterator[Check]:
    """Check that no version or alias that decides about promotions was deleted or moved in MLflow."""
    if tracking_uri(files).endswith(str(files.mlflow_db)) and not files.mlflow_db.is_file():
        return
    try:
        with open_registry(files, load(files.params)) as models:
            models.checked_lineage()
    except RegistryError as error:
        message, _, remedy = str(error).partition("; ")
        yield Check("registry", False, message, remedy)
    except (TrackingError, ParamsError):
        return  # reported by the checks of MLflow and of params.yaml


def unsynced(files: Files) -> int:
    """Count executions that ended and were not uploaded to MLflow completely."""
    store, count = store_key(files), 0
    for records in all_executions(files):
        running = [record.process.alive for record in records.stages().values() if record.status == "RUNNING"]
        alive = any(state is not False for state in running)  # None: on another host, which cannot be checked
        count += not alive and bool(running or records.pending(store))
    return count


def prefect(files: Files) -> Iterator[Check]:
    """Check the Prefect server, and what `make deploy` creates on it."""
    try:
        url = check_server(deploys=True)
    except ServerError as error:
        message, _, remedy = str(error).partition("; ")
        yield Check("prefect", False, message, remedy)
        return
    if url is None:
        message = "PREFECT_API_URL is not set: `smaller-student retrain` works, schedules do not"
        yield Check("prefect", None, message, "`make stack` starts a server")
        return
    yield Check("prefect", True, f"{url} responds")
    with get_client(sync_client=True, httpx_settings={"timeout": 5}) as client:
        existing = {pool.name for pool in client.read_work_pools()}
        pools = work_pools(files.root)
        ours = deployments(client, pools)
        missing = [f"work pool {pool}" for pool in pools if pool not in existing]
        missing += [] if ours else ["deployments"]
        missing += [] if client.read_automations_by_name(AUTOMATION) else ["automation for lost runs"]
        if missing:
            own_pools = set(pools) <= {POOL, *existing}
            remedy = "`make deploy`" if own_pools else "`prefect work-pool create NAME --type TYPE`, then `make deploy`"
            yield Check("prefect", False, f"the server has no {', no '.join(missing)}", f"run {remedy}")
            return
        for pool in pools:
            workers = workers_online(client, pool)
            remedy = "" if workers else f"run `prefect worker start --pool {pool} --limit 1`, or `make stack`"
            yield Check("worker", bool(workers), f"{workers} online for pool {pool}", remedy)
        for deployment in ours:
            if (folder := working_directory(deployment)) == files.root.resolve():
                yield from _runs(files, client, deployment)
            else:
                message = f"{deployment.name} works in {folder or 'a checkout that it clones'}, not in {files.root}"
                yield Check("runs", None, message, "run the doctor there to check whether its runs are alive")


def _runs(files: Files, client: SyncPrefectClient, deployment: DeploymentResponse) -> Iterator[Check]:
    """Check a deployment for runs whose process is gone, and for concurrency slots that no run holds."""
    fix = partial(_release, files, deployment.id)
    for run in _lost(files, client, deployment.id):
        since = f"{run.state_name} since {run.start_time:%Y-%m-%d %H:%M}"
        message = f"{deployment.name}/{run.name} is {since}, but no process retrains this checkout"
        remedy = f"{FIX} marks it as crashed; first check that no worker runs on another machine"
        yield Check("runs", False, message, remedy, fix)
    active, limit = len(_active(client, deployment.id)), deployment.global_concurrency_limit
    if limit is not None and limit.active_slots > active:
        message = f"{deployment.name} has {limit.active_slots} slots taken, but {active} active runs"
        yield Check("slots", False, message, f"{FIX} releases them; Prefect does so after the grace period", fix)


def _active(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    states = ["RUNNING", "PENDING", "CANCELLING"]
    active = {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": states}}}
    return client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(active))


def _lost(files: Files, client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    """Return active runs without a process: a real one would hold the lock of the checkout."""
    if is_held(files.tracking / "retrain.lock"):
        return []
    latest_start = datetime.now(UTC) - MIN_AGE
    return [run for run in _active(client, deployment) if run.start_time is not None and run.start_time <= latest_start]


def _release(files: Files, deployment: UUID) -> None:
    """Mark lost runs as crashed, and release slots that no run holds."""
    with get_client(sync_client=True) as client:
        for run in _lost(files, client, deployment):
            client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)
        limit, active = client.read_deployment(deployment).global_concurrency_limit, len(_active(client, deployment))
        if limit is not None and limit.active_slots > active:
            client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=active))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
