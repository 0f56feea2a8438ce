"""Programs below this one end with it, however it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PARENT = """
import sys
from pipeline.ops.process import running
with running(sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)") as process:
    print(process.pid, process.stdout.readline(), flush=True)
    process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_does_not_outlive_its_parent(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline().split()[0]))
    assert child.is_running()
    os.kill(parent.pid, number)
    parent.wait(timeout=10)
    _, still = psutil.wait_procs([child], timeout=5)
    assert not still
