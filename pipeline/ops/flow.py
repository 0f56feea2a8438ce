"""Prefect flow `retrain`: the stages of `dvc repro` as tasks with live logs, one writer at a time.

Runs with no server of its own (`smaller-student retrain`: Prefect then starts one for the time of the run) or against
the server that the user's Prefect profile names; PREFECT_HOME stays as it is. Mutual exclusion rests on a lock of the
system, not on Prefect.
"""

import os

import psutil
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from pipeline.files import Files
from pipeline.ops import figures, params, tracking
from pipeline.ops.dvc import StageError, changes, dvc
from pipeline.ops.execution import VARIABLE, Busy, Execution, retraining
from pipeline.ops.journal import Journal
from pipeline.ops.recording import FLOW_RUN
from pipeline.records import RECORDS


@flow(name="retrain", log_prints=False)
def retrain(force: bool = False) -> State[None]:
    """Bring every stage up to date, as `dvc repro` does.

    Args:
        force: Record an execution even if nothing changed: each stage then comes from what is there. Nothing is
            computed again whose inputs are the same.

    Returns:
        Completed, under the name NoChange where there was nothing to do; Failed, with a sentence that says why.
    """
    files = Files.here()
    try:
        with retraining(files):
            return _retrain(files, force)
    except (Busy, params.ParamsError, StageError) as error:
        return Failed(name=type(error).__name__, message=str(error))  # raised, Prefect would log a traceback


def _retrain(files: Files, force: bool) -> State[None]:
    checked = params.load(files.params)
    changed = changes()
    tracking.complete_last(files, checked, changed)
    if not changed and not force:
        return Completed(name="NoChange", message="nothing changed since the last run")
    get_run_logger().info("changed: %s", ", ".join(changed) or "nothing")
    os.environ[FLOW_RUN] = str(flow_run.id or "")  # stages inherit it
    owner = Execution.of("flow", psutil.Process())
    journal = Journal.of(files, owner)
    try:
        for stage in RECORDS:
            state = reproduce.with_options(name=stage, task_run_name=stage)(stage, owner.key, return_state=True)
            if not state.is_completed():
                raise StageError(state.message)
        tracking.complete(files, checked, journal)
    finally:
        journal.close()  # another run in this process is another execution
    create_table_artifact(table=figures.table(files), key="result", description="What each stage led to.")
    return Completed(message=f"ran {', '.join(changed) or 'nothing anew'}")


@task(cache_policy=NO_CACHE, persist_result=False)
def reproduce(stage: str, owner: str) -> State[None]:
    """`dvc repro` of one stage, its output line by line in the log."""
    log = get_run_logger()
    with dvc("repro", "--single-item", stage, **{VARIABLE: owner}) as process:
        for line in process.stdout or ():
            if line := line.rstrip():
                log.info(line)
        code = process.wait()
    if code:
        return Failed(
            message=f"stage {stage} failed (`dvc repro` ended with {code}); its reason stands above in the log"
        )
    return Completed(message=f"stage {stage} is up to date")
