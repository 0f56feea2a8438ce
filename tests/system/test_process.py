"""Child processes end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.system.process import TimeLimitError, child_process
from tests.fake_stages import wait_until

STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print('up', flush=True)"
print(subprocess.Popen([sys.executable, "-c", child + "; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""
ROOT = Path(__file__).parents[2]
PARENT = """
import sys
from pipeline.system.process import child_process
with child_process(sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)") as process:
    print(process.pid, process.stdout.readline(), flush=True)
    process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child when its parent ends")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_process_does_not_outlive_its_parent(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline().split()[0]))
    assert child.is_running()
    os.kill(parent.pid, number)
    parent.wait(timeout=10)
    _, still = psutil.wait_procs([child], timeout=5)
    assert not still


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
def test_the_time_limit_ends_the_whole_process_group() -> None:
    """The first process ends at once; the second one ignores signals and keeps the output pipe open."""
    began = time.monotonic()
    with pytest.raises(TimeLimitError), child_process(sys.executable, "-c", STUBBORN, hours=3 / 3600) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert process.stdout.readline() == "up\n"
        process.stdout.read()  # returns when the last process has closed it
    assert time.monotonic() - began < 20
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


WRITER = """
import os, sys, time
from pipeline.system.process import stop_with_parent
stop_with_parent()
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("x" * 100_000, flush=True)  # nobody reads it
    open(sys.argv[1], "w").write("reported")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child when its parent ends")
def test_a_process_whose_parent_ends_may_still_write(tmp_path: Path) -> None:
    code = (
        "import os, signal, subprocess, sys\n"
        "child = 'import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\\n' + sys.argv[1]\n"
        "one = subprocess.Popen([sys.executable, '-c', child, sys.argv[2]], stdout=subprocess.PIPE)\n"
        "one.stdout.readline()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, WRITER, str(tmp_path / "report")], cwd=ROOT, check=False)
    wait_until(lambda: (tmp_path / "report").is_file() and (tmp_path / "report").read_text() == "reported", 20)
