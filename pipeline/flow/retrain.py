"""Prefect flow `retrain`: fetch new data, run each stage of `dvc repro` as a task, publish the result.

It runs by `smaller-student retrain`, for which Prefect starts a temporary server, or by a worker for the deployments of
prefect.yaml. A file lock, not Prefect, ensures that only one retraining of a checkout runs.
"""

import os
from contextlib import suppress
from datetime import datetime
from typing import Any, cast

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from pipeline.config import Params
from pipeline.data.manifest import DataError
from pipeline.export.release import ReleaseError
from pipeline.files import Files
from pipeline.flow import dvc_rwlock, notify
from pipeline.flow.dvc_cli import STAGE_FAILED, StageError, changed_stages, dvc, reason
from pipeline.flow.incoming import RefreshError
from pipeline.flow.raw_data import check_root, tracking_file
from pipeline.flow.refresh import check_incoming
from pipeline.flow.refresh import refresh as fetch_new_data
from pipeline.records import RECORDS
from pipeline.registry.errors import RegistryError
from pipeline.registry.publish import Published, last_published
from pipeline.registry.publish import publish as publish_release
from pipeline.stage import params_file
from pipeline.system import git_cli
from pipeline.system.locks import BusyError, last_retraining_start, retrain_lock, save_retraining_start
from pipeline.system.process import TimeLimitError, stop_with_parent
from pipeline.tracking import recorder
from pipeline.tracking.errors import TrackingError
from pipeline.tracking.execution import EXECUTION_VARIABLE, Execution
from pipeline.tracking.store import check_uri, tracking_uri

WORKER_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Environment variable that Prefect sets in a process that a worker started."""
LOCK_TIMEOUT = 5.0
"""Seconds that a run started by a worker waits for the lock, which the doctor holds for a moment."""
NO_RETRY = "Refused"
"""Name of the state of a task that would fail again in the same way: params, data, a failed check, the time limit."""
NO_RETRY_CODES = {2, 3, 4}
"""Exit codes of a stage that lead to this state (see `pipeline.stage.run`)."""
ERRORS = (params_file.ParamsError, DataError, RefreshError, StageError, TrackingError, git_cli.CommitError)
"""Errors whose message becomes that of the failed flow run, without a traceback."""


def _may_retry(_: object, __: TaskRun, state: State[None]) -> bool:
    return state.name != NO_RETRY


@flow(name="retrain", log_prints=False)
def retrain(force: bool = False) -> State[None]:
    """Fetch new data, run the stages that changed, and publish the exported model.

    Args:
        force: Track an execution in MLflow even if nothing changed; unchanged stages are not computed again.

    Returns:
        Completed with the name Promoted or Rejected if a model was published, NoChange if there was nothing to do, else
        Completed. Cancelled with the name Busy if another run works, or Skipped if one has done the work since this run
        was due. Failed with the reason as message.
    """
    if WORKER_VARIABLE in os.environ:
        stop_with_parent()  # a killed worker does not stop its runs
    files = Files.here()
    try:
        with retrain_lock(files, LOCK_TIMEOUT if WORKER_VARIABLE in os.environ else 0):
            start = datetime.now().astimezone()
            state = _retrain(files, force)
            if state.is_completed():  # otherwise the waiting runs still have work to do
                save_retraining_start(files, start)
                notify.skip_stale_runs(start)
            return state
    except BusyError as error:
        return Cancelled(name="Busy", message=str(error))
    except ERRORS as error:  # raising would log a traceback
        return Failed(name=type(error).__name__.removesuffix("Error"), message=str(error))


def _retrain(files: Files, force: bool) -> State[None]:
    with suppress(BusyError):  # somebody uses DVC here by hand; `dvc repro` reports it
        for line in dvc_rwlock.release_dead(files):
            get_run_logger().info(line)
    params = params_file.load(files.params)
    check_uri(tracking_uri(files))
    check_incoming(files, params)
    due, last_start = flow_run.scheduled_start_time, last_retraining_start(files)
    if last_start is not None and due is not None and due < last_start and not force:
        message = f"the run was due before the last retraining began ({last_start:%Y-%m-%d %H:%M}), so it has no work"
        return Cancelled(name="Skipped", message=message)
    if params.retrain.refresh or params.retrain.incoming or tracking_file(files, params):
        _raise_if_failed(refresh(files, params, return_state=True), RefreshError)
    check_root(files, params)
    stale = changed_stages()
    recorder.complete_last_execution(files, params, lambda: stale)
    unpublished = params.retrain.publish and last_published(files, params) is None
    if not stale and not unpublished and not force:
        _commit(files, params, "nothing changed")  # in case the last run failed to commit
        return Completed(name="NoChange", message="nothing changed since the last run")
    get_run_logger().info("changed stages: %s", ", ".join(stale) or "none")
    if stale or force:
        _run_stages(files, params)
    notify.results(files)
    message, name = f"ran {', '.join(stale) or 'no stage, since none changed'}", "Completed"
    if params.retrain.publish:
        published = _publish(files, params)
        notify.promotion(files, params, published)
        message, name = published.sentence, "Promoted" if published.decision.passed else "Rejected"
    _commit(files, params, message)
    return Completed(name=name, message=message)


def _commit(files: Files, params: Params, message: str) -> None:
    """Commit the results to `retrain.branch` if it is set.

    Raises:
        CommitError: If the commit fails; the next run tries again.
    """
    if params.retrain.branch:
        text, data = f"Retrained: {message}", tracking_file(files, params)
        get_run_logger().info(git_cli.commit_results(files.root, params.retrain.branch, text, data))


def _run_stages(files: Files, params: Params) -> None:
    """Run all stages as one execution.

    Raises:
        StageError: If a stage fails.
    """
    os.environ[recorder.FLOW_RUN] = str(flow_run.id or "")  # inherited by the stages
    execution = Execution.new_flow()
    try:
        for stage in RECORDS:
            run = reproduce.with_options(name=stage, task_run_name=stage)
            _raise_if_failed(run(stage, execution.key, params.retrain.limit_hours, return_state=True), StageError)
        recorder.record_cached_stages(files, params, execution)
    finally:
        _upload_runs(files)


def _upload_runs(files: Files) -> None:
    """Upload run records to MLflow; a failure is only logged, since `smaller-student sync` can repeat it."""
    from pipeline.tracking.sync import sync  # imports mlflow

    if not recorder.enabled():
        return
    try:
        _, notices = sync(files)
    except (TrackingError, BusyError) as error:
        notices = [str(error)]
    for notice in notices:
        get_run_logger().warning(notice)


def _raise_if_failed(state: State[Any], error: type[RuntimeError]) -> None:
    if not state.is_completed():
        raise error(state.message)


def _publish(files: Files, params: Params) -> Published:
    """Publish the release unless it was published before, and return the outcome.

    Raises:
        TrackingError: If publishing fails.
    """
    if (published := last_published(files, params)) is None:
        state: State[Any] = publish(files, params, return_state=True)
        _raise_if_failed(state, TrackingError)
        return cast(Published, state.result())
    return published


@task(
    task_run_name="refresh",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=30,
    retry_condition_fn=_may_retry,
)
def refresh(files: Files, params: Params) -> State[None]:
    """Run `retrain.refresh`, and move the files of `retrain.incoming` to `data.root`."""
    try:
        new = fetch_new_data(files, params)
    except (RefreshError, StageError) as error:
        return Failed(name="Failed" if type(error) is RefreshError else NO_RETRY, message=str(error))
    return Completed(message=f"{len(new)} new files")


@task(cache_policy=NO_CACHE, persist_result=False, retries=1, retry_delay_seconds=10, retry_condition_fn=_may_retry)
def reproduce(stage: str, execution: str, hours: float) -> State[None]:
    """Run `dvc repro` for one stage, and log its output line by line; an unexpected failure is retried once.

    `execution` is the key of the execution that the stage belongs to, `hours` the time limit.
    """
    log, progress, code, cause, errors = get_run_logger(), notify.Progress(stage), 0, "", ""
    try:
        with dvc("repro", "--single-item", stage, hours=hours, **{EXECUTION_VARIABLE: execution}) as process:
            for line in process.stdout or ():
                if line := line.rstrip():
                    log.info(line)
                    progress.read(line)
                    if line.startswith(f"{stage}: "):  # how a stage that fails ends its output
                        cause = line.removeprefix(f"{stage}: ")
                    if line.startswith("ERROR: "):
                        errors += f"{line}\n"
                if match := STAGE_FAILED.search(line):
                    code = int(match[1])
            dvc_code = process.wait()
    except TimeLimitError as error:
        remedy = "raise `retrain.limit_hours`; the next run resumes after the last finished epoch"
        return Failed(name=NO_RETRY, message=f"stage {stage}: {error}; {remedy}")
    if not dvc_code:
        progress.done()
        return Completed(message=f"stage {stage} is up to date")
    cause = cause or (reason(errors) if errors else f"`dvc repro` ended with {dvc_code}; the task's log has its output")
    return Failed(name=NO_RETRY if code in NO_RETRY_CODES else "Failed", message=f"stage {stage} failed: {cause}")


@task(
    task_run_name="publish",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=30,
    retry_condition_fn=_may_retry,
)
def publish(files: Files, params: Params) -> State[Any]:
    """Register the release in artifacts/export, and promote it if it passes the promotion rule."""
    try:
        published = publish_release(files, params, files.artifacts("export"))
    except (TrackingError, BusyError) as error:
        return Failed(message=f"{error}; the release stays in {files.artifacts('export')}, the next run publishes it")
    except (RegistryError, ReleaseError) as error:  # the user must act first
        return Failed(name=NO_RETRY, message=str(error))
    return Completed(message=published.sentence, data=published)
