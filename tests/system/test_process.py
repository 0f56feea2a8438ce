"""Programs below this one end with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.system.process import TimeLimitError, running

STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print('up', flush=True)"
print(subprocess.Popen([sys.executable, "-c", child + "; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""
ROOT = Path(__file__).parents[2]
PARENT = """
import sys
from pipeline.system.process import running
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


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
def test_what_a_program_started_ends_with_it_when_its_time_is_over() -> None:
    """Its first process ends at once, the second one ignores signals and holds the output that is read."""
    began = time.monotonic()
    with pytest.raises(TimeLimitError), running(sys.executable, "-c", STUBBORN, hours=3 / 3600) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert process.stdout.readline() == "up\n"
        process.stdout.read()  # comes back only when nobody holds it any more
    assert time.monotonic() - began < 20
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
