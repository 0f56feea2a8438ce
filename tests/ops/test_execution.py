import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.ops.execution import VARIABLE, Execution, alive, current
from pipeline.ops.locks import Busy, sole_writer

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


HOLD = """
import sys
from pathlib import Path
from pipeline.ops.locks import sole_writer
with sole_writer(Path(sys.argv[1]), "training"):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_who_comes_second_hears_at_once_who_is_first(tmp_path: Path) -> None:
    path = tmp_path / "writer.lock"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, path],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stdout is not None and first.stdout.readline() == "holds\n"
    message = rf"^busy: training runs already \(pid {first.pid} on \S+ since 20"
    with pytest.raises(Busy, match=message) as caught, sole_writer(path, "training"):
        pass
    assert caught.value.exit_code == 75
    first.kill()  # even then the lock is free at once
    first.communicate()
    with sole_writer(path, "training"):
        pass


def test_who_holds_the_lock_may_take_it_again(tmp_path: Path) -> None:
    path = tmp_path / "writer.lock"
    with sole_writer(path, "training"):
        with sole_writer(path, "training"):
            pass
        assert path.with_suffix(".json").is_file()
    assert not path.with_suffix(".json").exists()
