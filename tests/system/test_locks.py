import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.system.locks import BusyError, is_held, locked

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from pipeline.system.locks import locked
with locked(Path(sys.argv[1]), "training"):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_second_caller_fails_at_once_and_sees_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "writer.lock"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, path],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert first.stdout is not None and first.stdout.readline() == "holds\n"
    message = rf"^busy: training is already running \(pid {first.pid} on \S+ since 20"
    with pytest.raises(BusyError, match=message) as caught, locked(path, "training"):
        pass
    assert caught.value.exit_code == 75
    first.kill()  # the lock is released at once
    first.communicate()
    with locked(path, "training"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_lock_is_released_although_a_forked_child_is_still_alive(tmp_path: Path) -> None:
    path = tmp_path / "writer.lock"
    with locked(path, "training"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        assert is_held(path)
    try:
        assert not is_held(path)
        with locked(path, "training"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_threads_hold_the_lock_one_at_a_time(tmp_path: Path) -> None:
    def add(_: int) -> None:
        with locked(tmp_path / "turn.lock", "counting", timeout=-1):
            text = count.read_text()
            time.sleep(0.002)
            count.write_text(str(int(text) + 1))

    count = tmp_path / "count"
    count.write_text("0")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert count.read_text() == "40"


def test_a_timeout_waits_for_the_holder(tmp_path: Path) -> None:
    path, order = tmp_path / "turn.lock", []
    with ThreadPoolExecutor(1) as pool:
        with locked(path, "counting"):
            second = pool.submit(_second, path, order)
            time.sleep(0.2)
            order.append("first")
        second.result()
    assert order == ["first", "second"]
    refused = pytest.raises(BusyError, match=r"^busy: counting is already running")
    with locked(path, "counting"), ThreadPoolExecutor(1) as pool, refused:
        pool.submit(_second, path, order, timeout=0.1).result()


def _second(path: Path, order: list[str], timeout: float = 20) -> None:
    with locked(path, "counting", timeout):
        order.append("second")


def test_the_holder_may_acquire_the_lock_again(tmp_path: Path) -> None:
    path = tmp_path / "writer.lock"
    with locked(path, "training"):
        with locked(path, "training"):
            pass
        assert Path(f"{path}.holder").is_file()
    assert not Path(f"{path}.holder").exists()
