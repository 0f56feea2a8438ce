import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.tracking.execution import EXECUTION_VARIABLE, Execution, ProcessId, current_execution

ROOT = Path(__file__).parents[2]
PRINT_KEY = "from pipeline.tracking.execution import current_execution; print(current_execution().key)"


def test_a_reused_process_id_is_another_process() -> None:
    here = ProcessId.of(os.getpid())
    assert here.alive is True
    assert here.model_copy(update={"start": here.start - 5}).alive is False
    assert here.model_copy(update={"boot": "another"}).alive is False


def test_whether_a_process_of_another_host_is_alive_is_unknown() -> None:
    here = ProcessId.of(os.getpid())
    assert here.model_copy(update={"host": "elsewhere", "start": 1}).alive is None


def test_an_ended_process_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = ProcessId.of(child.pid)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert owner.alive is False  # a zombie
    child.wait()
    assert owner.alive is False


@pytest.mark.skipif(sys.platform != "linux", reason="ticks since boot are Linux'")
def test_the_start_time_of_a_process_does_not_change_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ProcessId.of(os.getpid())
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: time.time() + 3600)  # as after a jump
    assert ProcessId.of(os.getpid()) == before
    assert before.alive is True


def test_a_stage_gets_the_execution_of_its_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Execution.new_flow()
    monkeypatch.setenv(EXECUTION_VARIABLE, flow.key)
    assert current_execution().key == flow.key
    assert Execution.new_flow().key != flow.key


def test_a_stage_started_by_hand_is_its_own_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXECUTION_VARIABLE, raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert current_execution() == Execution.of("stage", ProcessId.of(os.getpid()))


@pytest.mark.parametrize("shell", [False, True], ids=["direct", "through a shell"])
def test_all_stages_of_one_dvc_process_have_the_same_execution(tmp_path: Path, shell: bool) -> None:
    stage = [sys.executable, "-c", PRINT_KEY]
    if shell:
        stage = ["sh", "-c", f'"{sys.executable}" -c "{PRINT_KEY}"; true']
    dvc = tmp_path / "dvc"
    dvc.write_text(f"import os, subprocess\nprint(os.getpid(), flush=True)\nfor _ in 'ab': subprocess.run({stage!r})\n")
    environment = {**os.environ, "DVC_STAGE": "teacher", "PYTHONPATH": str(ROOT)}
    environment.pop(EXECUTION_VARIABLE, None)
    done = subprocess.run([sys.executable, dvc], env=environment, capture_output=True, text=True, check=True)
    pid, first, second = done.stdout.split()
    assert first == second
    assert first.startswith("dvc-") and int(pid)
