"""The stack of docker/compose.yaml as processes: schedules, events, new data, promotion, cancelling, late runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import requests
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate, WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Running, Scheduled
from ruamel.yaml import YAML

from pipeline.files import Files
from pipeline.flow import doctor
from pipeline.flow.doctor import Check
from pipeline.system.locks import retrain_lock
from tests import layouts
from tests.fake_stages import wait_until
from tests.stack.runner import Stack
from tests.test_end_to_end import checkout

pytestmark = pytest.mark.stack
WEEKLY, ON_DATA = "retrain/retrain-weekly", "retrain/retrain-on-data"
PREFIXES = ("MLFLOW_", "PREFECT_")


def set_params(root: Path, **changes: dict[str, object]) -> None:
    yaml = YAML()
    params = yaml.load(root / "params.yaml")
    for section, values in changes.items():
        params[section] |= values
    yaml.dump(params, root / "params.yaml")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A checkout with images of 30 identities and the smoke preset, and all services of the stack."""
    root = checkout(tmp_path_factory.mktemp("checkout"))
    layouts.folder(root / "data" / "things", 20, 10)
    set_params(root, data={"source": "folder", "root": "data/things"}, retrain={"branch": "retrained"})
    variables = {"WORKER_QUERY_SECONDS": "2", "GALLERY": "data/things"}
    kept = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        kept.delenv(name)
    settings = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
    with Stack(root, root / ".stack", variables, settings) as running:
        for name, value in running.environment("worker").items():
            if name.startswith(PREFIXES) and not name.endswith("_FILE"):
                kept.setenv(name, value)
        kept.setenv("MLFLOW_TRACKING_PASSWORD", running.secret("mlflow"))
        kept.setenv("PREFECT_API_AUTH_STRING", running.secret("prefect"))
        yield running
    kept.undo()


@pytest.fixture(scope="module")
def server(stack: Stack) -> Iterator[SyncPrefectClient]:
    """A client of Prefect, after the worker has created the deployments."""
    settings = {  # Prefect read its settings when it was imported
        PREFECT_API_URL: os.environ["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: os.environ["PREFECT_API_AUTH_STRING"],
    }
    with temporary_settings(settings), get_client(sync_client=True) as client:
        wait_until(lambda: len(client.read_deployments()) == 2, 120)
        wait_until(lambda: bool(client.read_workers_for_work_pool("smaller-student")), 60)
        yield client


def start(server: SyncPrefectClient, name: str = WEEKLY) -> FlowRun:
    return server.create_flow_run_from_deployment(server.read_deployment_by_name(name).id)


def ended(server: SyncPrefectClient, run: FlowRun, seconds: float = 600) -> FlowRun:
    wait_until(lambda: (state := server.read_flow_run(run.id).state) is not None and state.is_final(), seconds)
    return server.read_flow_run(run.id)


def log(stack: Stack) -> str:
    return stack.log("worker")


def command(stack: Stack, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": "", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=stack.root, env=environment, capture_output=True, text=True, timeout=120
    )


def champion(stack: Stack) -> str:
    client = MlflowClient()
    return str(client.get_model_version_by_alias("smaller-student", "champion").version)


def test_servers_need_a_password_and_no_command_line_has_one(stack: Stack) -> None:
    mlflow, prefect = stack.variables["MLFLOW_PORT"], stack.variables["PREFECT_PORT"]
    calls = (f"{mlflow}/api/2.0/mlflow/experiments/search", f"{prefect}/api/flows/count")
    for call in calls:
        assert requests.post(f"http://127.0.0.1:{call}", json={}, timeout=10).status_code == 401
    named = requests.post(f"http://127.0.0.1:{calls[0]}", headers={"Host": "evil.example"}, json={}, timeout=10)
    assert named.status_code == 403
    secrets = [path.read_text().strip() for path in (stack.folder / "secrets").iterdir()]
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in commands if any(secret in line for secret in secrets)]


def test_a_scheduled_run_is_promoted_and_its_model_can_be_downloaded_and_run(
    stack: Stack, server: SyncPrefectClient, tmp_path: Path
) -> None:
    deployment = server.read_deployment_by_name(WEEKLY).id
    soon = datetime.now(UTC) + timedelta(seconds=15)  # the scheduler runs every 5 s
    server.create_deployment_schedules(
        deployment, [(IntervalSchedule(interval=timedelta(days=1), anchor_date=soon), True)]
    )

    def due() -> list[FlowRun]:
        return [run for run in server.read_flow_runs() if run.auto_scheduled and run.start_time is not None]

    wait_until(lambda: bool(due()), 120)
    run = ended(server, due()[0])
    assert run.state_name == "Promoted" and run.state is not None
    assert run.state.message == "version 1 is champion: there is no earlier version"
    assert champion(stack) == "1"
    fetched = command(
        stack, "mlflow", "artifacts", "download", "-u", "models:/smaller-student@champion", "-d", str(tmp_path)
    )
    assert fetched.returncode == 0, fetched.stderr
    checked = command(stack, "pipeline", "verify", str(tmp_path))
    assert checked.returncode == 0 and "model.onnx: SHA-256 matches" in checked.stdout
    results = subprocess.run(
        ["git", "show", "--stat", "retrained"], cwd=stack.root, capture_output=True, text=True, check=True
    )
    assert "dvc.lock" in results.stdout


def test_a_run_without_changes_ends_as_no_change(stack: Stack, server: SyncPrefectClient) -> None:
    run = ended(server, start(server))
    assert run.state_name == "NoChange"
    assert champion(stack) == "1"


def test_an_event_retrains_with_new_images(stack: Stack, server: SyncPrefectClient) -> None:
    for identity, camera, view in layouts.views(31, 8, 3, 2):
        path = stack.root / "incoming" / f"thing {identity}" / f"cam{camera}" / f"{view}.png"
        layouts.picture(path, identity, camera, view)
        os.utime(path, (time.time() - 60,) * 2)
    done = command(
        stack, "prefect", "event", "emit", "smaller-student.data.added", "--resource-id", "smaller-student.data"
    )
    assert done.returncode == 0, done.stderr
    deployment = server.read_deployment_by_name(ON_DATA).id

    def made() -> list[FlowRun]:
        return [run for run in server.read_flow_runs() if run.deployment_id == deployment]

    wait_until(lambda: bool(made()), 60)
    run = ended(server, made()[0])
    assert run.state_name in ("Promoted", "Rejected")  # two epochs and eight more identities: either may happen
    assert len(list((stack.root / "data" / "things").iterdir())) == 38
    assert not list((stack.root / "incoming").iterdir())
    assert str(MlflowClient().get_model_version_by_alias("smaller-student", "challenger").version) == "2"


def test_the_search_page_serves_the_champion(stack: Stack) -> None:
    wait_until(lambda: stack.healthy("search"), 90)


def training(stack: Stack, stage: str) -> list[psutil.Process]:
    """Return the processes of a stage in this checkout; other checkouts may have some too."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if (process.info["cmdline"] or [])[1:3] == ["-m", f"stages.{stage}"] and process.info["cwd"] == str(stack.root)
    ]


def start_and_wait_for_student(stack: Stack, server: SyncPrefectClient) -> FlowRun:
    """Start a run, and wait until its student has trained for some epochs."""
    before = len(log(stack))
    run = start(server)
    wait_until(lambda: any(f"student: epoch {n} of 60: loss" in log(stack)[before:] for n in range(4, 60)), 300)
    return run


def seconds_until(condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    wait_until(condition, 60)
    return time.monotonic() - began


def killed(stack: Stack) -> bool:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("smaller-student").experiment_id
    latest = client.search_runs(experiment, "tags.stage IS NULL", max_results=1, order_by=["start_time DESC"])[0]
    below = client.search_runs(experiment, f"tags.mlflow.parentRunId = '{latest.info.run_id}'")
    return latest.info.status == "KILLED" and "KILLED" in {run.info.status for run in below}


def unlocked(stack: Stack) -> bool:
    """Return whether no lock is held; DVC ignores entries of ended processes."""
    with retrain_lock(Files(stack.root, stack.root)):
        pass
    table = stack.root / ".dvc" / "tmp" / "rwlock"
    noted = re.findall(r'"pid": (\d+)', table.read_text() if table.exists() else "")
    return not any(psutil.pid_exists(int(pid)) for pid in noted)


@pytest.mark.parametrize("way", ["cancel", "worker killed"])
def test_an_interrupted_training_ends_at_once_and_the_next_run_resumes(
    stack: Stack, server: SyncPrefectClient, way: str, record_property: Callable[[str, object], None]
) -> None:
    set_params(stack.root, student={"epochs": 60})
    run = start_and_wait_for_student(stack, server)
    if way == "cancel":
        server.set_flow_run_state(run.id, State(type=StateType.CANCELLING))
    else:
        stack.processes["worker"].send_signal(signal.SIGKILL)
    seconds = seconds_until(lambda: not training(stack, "student"))
    record_property("seconds", seconds)
    if way == "cancel":
        assert ended(server, run).state_name == "Cancelled"
    else:
        wait_until(lambda: stack.processes["worker"].poll() is not None, 10)
        stack.start("worker")
        assert ended(server, run).state_name == "Crashed"
    wait_until(lambda: killed(stack), 120)
    wait_until(lambda: unlocked(stack), 30)
    if way == "worker killed":
        before = len(log(stack))
        run = ended(server, start(server))
        assert "resuming after epoch" in log(stack)[before:]
        assert run.state_name == "Promoted"  # 60 epochs instead of a few
        assert champion(stack) == "3"


def test_a_worse_model_is_rejected_and_the_champion_stays(stack: Stack, server: SyncPrefectClient) -> None:
    set_params(stack.root, student={"epochs": 3})
    run = ended(server, start(server))
    assert run.state_name == "Rejected" and run.state is not None
    assert "stays challenger: mAP may be" in (run.state.message or "")
    assert champion(stack) == "3"
    done = command(stack, "pipeline", "history")
    assert "mAP +" in done.stdout


def test_of_fifty_late_runs_at_most_one_works(stack: Stack, server: SyncPrefectClient) -> None:
    deployment = server.read_deployment_by_name(WEEKLY).id
    worker = psutil.Process(stack.processes["worker"].pid)
    worker.suspend()
    now = datetime.now(UTC)
    late = [
        server.create_flow_run_from_deployment(
            deployment, state=Scheduled(scheduled_time=now - timedelta(milliseconds=100 * number))
        )
        for number in range(50)
    ]
    worker.resume()
    found = Counter(ended(server, run).state_name for run in late)
    assert found["NoChange"] <= 1
    assert set(found) <= {"NoChange", "Cancelled", "Skipped"}
    assert found.total() == 50


def test_the_doctor_releases_slots_and_ends_lost_runs(
    stack: Stack, server: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, deployment = Files(stack.root, stack.root), server.read_deployment_by_name(WEEKLY)
    monkeypatch.setattr(doctor, "MIN_AGE", timedelta())

    def wrong() -> list[Check]:
        return [check for check in doctor.prefect(files) if check.ok is False]

    assert not wrong()
    limit = deployment.global_concurrency_limit
    assert limit is not None
    server.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=1))
    (slot,) = wrong()
    assert (slot.name, slot.message) == ("slots", "retrain-weekly has 1 slots taken, but 0 active runs")
    assert slot.fix is not None
    slot.fix()
    assert not wrong()

    dead = server.create_flow_run_from_deployment(deployment.id, state=Running())
    with retrain_lock(files):
        assert "runs" not in {check.name for check in wrong()}  # the run may be the one that retrains
    stale = next(check for check in wrong() if check.name == "runs")
    assert f"retrain-weekly/{dead.name} is Running since" in stale.message
    assert stale.fix is not None
    stale.fix()
    assert not wrong()
    assert ended(server, dead).state_name == "Crashed"
    again = ended(server, start(server)).state
    assert again is not None and again.is_completed()  # the slot is free again


def test_another_checkout_cannot_take_over_the_deployments_of_a_worker(
    stack: Stack, server: SyncPrefectClient, tmp_path: Path
) -> None:
    shutil.copy(stack.root / "prefect.yaml", tmp_path)
    done = subprocess.run([sys.executable, "-m", "pipeline.flow.deploy"], cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode and f"a worker of pool smaller-student works in {stack.root}, not in {tmp_path}" in done.stderr
    )
    found = list(doctor.prefect(Files(tmp_path, tmp_path)))
    # None: only the doctor in the other checkout can check its runs
    assert [check.ok for check in found if check.name == "runs"] == [None, None]


def test_a_work_pool_with_another_name_is_checked_too(stack: Stack, server: SyncPrefectClient, tmp_path: Path) -> None:
    text = (stack.root / "prefect.yaml").read_text()
    (tmp_path / "prefect.yaml").write_text(text.replace("name: smaller-student\n    job", "name: cluster\n    job"))

    def bad() -> list[Check]:
        return [check for check in doctor.prefect(Files(tmp_path, tmp_path)) if check.ok is False]

    (missing,) = bad()
    assert missing.message == "the server has no work pool cluster, no deployments"
    assert missing.remedy == "run `prefect work-pool create NAME --type TYPE`, then `make deploy`"
    server.create_work_pool(WorkPoolCreate(name="cluster", type="process"))
    try:
        weekly = server.read_deployment_by_name(WEEKLY)
        copy = server.create_deployment(weekly.flow_id, "elsewhere", work_pool_name="cluster")
        (idle,) = bad()
        assert idle.message == "0 online for pool cluster"
        server.delete_deployment(copy)
    finally:
        server.delete_work_pool("cluster")


def test_the_doctor_reports_no_problem_of_the_stack(stack: Stack) -> None:
    done = command(stack, "pipeline", "doctor")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "bad"))]
    checks = {line.split()[1]: line for line in lines}
    assert checks["mlflow"].startswith("ok") and "responds to user admin" in checks["mlflow"]
    assert checks["prefect"].startswith("ok")
    assert checks["worker"].startswith("ok")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = "wrong"
    done = command(stack, "pipeline", "doctor")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = stack.secret("mlflow")
    assert "error code 401" in done.stdout and "set MLFLOW_TRACKING_USERNAME and" in done.stdout
    assert done.returncode == 1
