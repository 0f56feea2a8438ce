"""Prefect flow `retrain`: new data, the stages of `dvc repro` as tasks, publication; one writer at a time.

Runs with no server of its own (`smaller-student retrain`: Prefect then starts one for the time of the run), or by a
worker for the deployments of prefect.yaml. Mutual exclusion rests on a lock of the system, not on Prefect.
"""

import os
from contextlib import suppress
from datetime import datetime
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from pipeline.config import Params
from pipeline.export.release import ReleaseError
from pipeline.files import Files
from pipeline.flow import dvc_rwlock, notify
from pipeline.flow.dvc_cli import ENDED, StageError, changes, dvc
from pipeline.flow.refresh import RefreshError, RefusedError, check_incoming
from pipeline.flow.refresh import refresh as bring
from pipeline.records import RECORDS
from pipeline.registry import publish as publishing
from pipeline.registry.model_registry import RegistryError
from pipeline.registry.publish import Published
from pipeline.stage import params_file
from pipeline.system import git_cli
from pipeline.system.locks import BusyError, note_retraining, retraining, retraining_began
from pipeline.system.process import TimeLimitError, die_with_parent
from pipeline.tracking import recorder
from pipeline.tracking.execution import VARIABLE, Execution
from pipeline.tracking.store import TrackingError, check_uri, tracking_uri

ENGINE = "PREFECT__FLOW_RUN_ID"
"""Environment variable of a process that a worker started for one run."""
PATIENCE = 5.0
"""Seconds that a run of a schedule waits for the lock: the doctor holds it for a moment."""
FINAL = "Refused"
"""Name of the state of a stage that would end the same way again: params, data, a gate, the time it has."""
HOPELESS = {2, 3, 4}
"""Exit codes of such stages (see `stage`)."""


ERRORS = (params_file.ParamsError, RefreshError, StageError, TrackingError, git_cli.CommitError)
"""Errors that become a failed state, with their sentence as its message."""


def _hopeful(_: object, __: TaskRun, state: State[None]) -> bool:
    return state.name != FINAL


@flow(name="retrain", log_prints=False)
def retrain(force: bool = False) -> State[None]:
    """Bring everything up to date: data, stages, the model in use.

    Args:
        force: Record an execution even if nothing changed: each stage then comes from what is there. Nothing is
            computed again whose inputs are the same.

    Returns:
        Completed, under the name Promoted or Rejected where something was published, NoChange where there was nothing
        to do; Cancelled, under the name Busy or Skipped, where another run does it or has done it; Failed, with the
        reason as message.
    """
    if ENGINE in os.environ:
        die_with_parent()  # a worker that is killed tells nobody
    files = Files.here()
    try:
        with retraining(files, PATIENCE if ENGINE in os.environ else 0):
            now = datetime.now().astimezone()
            state = _retrain(files, force)
            if state.is_completed():  # else what waits must still be done
                note_retraining(files, now)
                notify.skip_stale_runs(now)
            return state
    except BusyError as error:
        return Cancelled(name="Busy", message=str(error))
    except ERRORS as error:  # raised, they would be tracebacks
        return Failed(name=type(error).__name__.removesuffix("Error"), message=str(error))


def _retrain(files: Files, force: bool) -> State[None]:
    with suppress(BusyError):  # somebody works here by hand: DVC says so
        for line in dvc_rwlock.release_dead(files):
            get_run_logger().info(line)
    checked = params_file.load(files.params)
    check_uri(tracking_uri(files))
    check_incoming(files, checked)
    due, began = flow_run.scheduled_start_time, retraining_began(files)
    if began is not None and due is not None and due < began and not force:
        return Cancelled(name="Skipped", message=f"was due before the last retraining began ({began:%Y-%m-%d %H:%M})")
    if checked.retrain.refresh or checked.retrain.incoming:
        _ended(refresh(files, checked, return_state=True), RefreshError)
    changed = changes()
    recorder.complete_last(files, checked, lambda: changed)
    unpublished = checked.retrain.publish and publishing.remembered(files, checked) is None
    if not changed and not unpublished and not force:
        _commit(files, checked, "nothing changed")  # if the last run could not
        return Completed(name="NoChange", message="nothing changed since the last run")
    get_run_logger().info("changed: %s", ", ".join(changed) or "nothing")
    if changed or force:
        _stages(files, checked)
    notify.results(files)
    message, name = f"ran {', '.join(changed) or 'nothing anew'}", "Completed"
    if checked.retrain.publish:
        found = _published(files, checked)
        notify.promotion(files, checked, found)
        message, name = found.sentence, "Promoted" if found.decision.passed else "Rejected"
    _commit(files, checked, message)
    return Completed(name=name, message=message)


def _commit(files: Files, checked: Params, message: str) -> None:
    """Commit the results to `retrain.branch`, if it is set and does not have them.

    Raises:
        CommitError: With the reason; the next run tries again.
    """
    if checked.retrain.branch:
        get_run_logger().info(git_cli.record(files.root, checked.retrain.branch, f"Retrained: {message}"))


def _stages(files: Files, checked: Params) -> None:
    """Run all stages, as one execution."""
    os.environ[recorder.FLOW_RUN] = str(flow_run.id or "")  # stages inherit it
    execution = Execution.new_flow()
    try:
        for stage in RECORDS:
            run = reproduce.with_options(name=stage, task_run_name=stage)
            _ended(run(stage, execution.key, checked.retrain.limit_hours, return_state=True), StageError)
        recorder.complete(files, checked, execution)
    finally:
        _synchronise(files)


def _synchronise(files: Files) -> None:
    """Bring MLflow up to date; a server that is out of reach fails no retraining."""
    from pipeline.tracking.sync import sync  # imports mlflow

    if not recorder.enabled():
        return
    try:
        _, notices = sync(files)
    except (TrackingError, BusyError) as error:
        notices = [str(error)]
    for notice in notices:
        get_run_logger().warning(notice)


def _ended(state: State[Any], error: type[RuntimeError]) -> None:
    if not state.is_completed():
        raise error(state.message)


def _published(files: Files, checked: Params) -> Published:
    """What the registry says of the release; it is asked once."""
    if (known := publishing.remembered(files, checked)) is None:
        _ended(publish(files, checked, return_state=True), TrackingError)
        known = publishing.remembered(files, checked)
    assert known is not None  # noqa: S101 - the task remembers what it found
    return known


@task(
    task_run_name="refresh",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=30,
    retry_condition_fn=_hopeful,
)
def refresh(files: Files, checked: Params) -> State[None]:
    """New data: `retrain.refresh`, `retrain.incoming`."""
    try:
        came = bring(files, checked)
    except RefreshError as error:
        return Failed(name=FINAL if isinstance(error, RefusedError) else "Failed", message=str(error))
    return Completed(message=f"{len(came)} new files")


@task(cache_policy=NO_CACHE, persist_result=False, retries=1, retry_delay_seconds=10, retry_condition_fn=_hopeful)
def reproduce(stage: str, owner: str, hours: float) -> State[None]:
    """`dvc repro` of one stage, its output line by line in the log; what failed by chance is tried once more."""
    log, progress, code = get_run_logger(), notify.Progress(stage), 0
    try:
        with dvc("repro", "--single-item", stage, hours=hours, **{VARIABLE: owner}) as process:
            for line in process.stdout or ():
                if line := line.rstrip():
                    log.info(line)
                    progress.read(line)
                if found := ENDED.search(line):
                    code = int(found[1])
            ended = process.wait()
    except TimeLimitError as error:
        return Failed(
            name=FINAL, message=f"stage {stage}: {error} (`retrain.limit_hours`); the next run goes on from there"
        )
    if not ended:
        progress.done()
        return Completed(message=f"stage {stage} is up to date")
    return Failed(
        name=FINAL if code in HOPELESS else "Failed",
        message=f"stage {stage} failed (`dvc repro` ended with {ended}); its reason stands above in the log",
    )


@task(
    task_run_name="publish",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=30,
    retry_condition_fn=_hopeful,
)
def publish(files: Files, checked: Params) -> State[None]:
    """Register the release, and let it become champion if the gate lets it pass."""
    try:
        found = publishing.publish(files, checked, files.artifacts("export"))
    except (TrackingError, BusyError) as error:
        return Failed(message=f"{error}; the release lies in {files.artifacts('export')}, the next run publishes it")
    except (RegistryError, ReleaseError) as error:  # somebody must act first
        return Failed(name=FINAL, message=str(error))
    return Completed(message=found.sentence)
