import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.ops.execution import VARIABLE, Execution, alive, current

ROOT = Path(__file__).parents[2]
WHO = "from pipeline.ops.execution import current; print(current().key)"


def test_a_key_names_its_execution() -> None:
    owner = Execution("flow", 12, 1700000000)
    assert Execution.parse(owner.key) == owner


def test_a_process_number_that_is_used_again_is_another_process() -> None:
    here = psutil.Process()
    started = int(here.create_time())
    assert alive(here.pid, started)
    assert not alive(here.pid, started - 5)


def test_a_process_that_has_ended_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = Execution.of("dvc", psutil.Process(child.pid))
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert not owner.alive  # though nobody has collected it
    child.wait()
    assert not owner.alive


def test_a_flow_hands_its_execution_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "flow-12-1700000000")
    assert current() == Execution("flow", 12, 1700000000)


def test_a_stage_that_is_started_by_hand_is_an_execution_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert current() == Execution.of("stage", psutil.Process())


@pytest.mark.parametrize("shell", [False, True], ids=["direct", "through a shell that stays"])
def test_all_stages_of_one_dvc_process_belong_together(tmp_path: Path, shell: bool) -> None:
    stage = [sys.executable, "-c", WHO]
    if shell:
        stage = ["sh", "-c", f'"{sys.executable}" -c "{WHO}"; true']
    dvc = tmp_path / "dvc"
    dvc.write_text(f"import os, subprocess\nprint(os.getpid(), flush=True)\nfor _ in 'ab': subprocess.run({stage!r})\n")
    environment = {**os.environ, "DVC_STAGE": "teacher", "PYTHONPATH": str(ROOT)}
    environment.pop(VARIABLE, None)
    done = subprocess.run([sys.executable, dvc], env=environment, capture_output=True, text=True, check=True)
    pid, first, second = done.stdout.split()
    assert first == second
    assert first.startswith(f"dvc-{pid}-")
