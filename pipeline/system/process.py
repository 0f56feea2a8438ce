"""Signals, memory and child processes."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOPPING = ((signal.SIGINT, 4.0), (signal.SIGTERM, 0.7))
"""Signals that stop a child process, and the seconds that it gets after each before the next; SIGKILL follows."""


class Stopped(BaseException):
    """This process received a signal to end; not an `Exception`, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Request a signal from the kernel when the parent ends, so that killing dvc leaves no orphan (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # the parent ended before the call
        os.kill(os.getpid(), number)


def stop_with_parent() -> None:
    """Receive SIGTERM when the parent ends, with output discarded from then on; call it in the main thread.

    The parent reads this process's output. Without a reader, rich ends a process that logs, so that Prefect could not
    report the crash of a run.
    """

    def stop(number: int, frame: object) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.kill(os.getpid(), signal.SIGTERM)

    if sys.platform == "linux":
        signal.signal(signal.SIGUSR1, stop)
        die_with_parent(signal.SIGUSR1)


@contextmanager
def signals_raise_stopped() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM and SIGHUP in this process; forked workers end as usual."""
    owner = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Stopped(number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory() -> int:
    """Return the peak memory in bytes of this process or of its largest ended child."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024


# --- child processes --------------------------------------------------------------------------------------------------


class TimeLimitError(RuntimeError):
    """A child process exceeded its time limit and was ended."""


@contextmanager
def child_process(*command: str, hours: float = 1000, **extra: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a command in its own process group, and end the whole group if the block is left early.

    Prefect cancels by ending a single process, and a killed process cannot end its children, so the child also requests
    a signal from the kernel when its parent ends (`die_with_parent`).

    Args:
        command: Program and arguments; the folder of this Python comes first in the PATH.
        hours: Time limit.
        extra: Additional environment variables.

    Raises:
        TimeLimitError: When the block ends, if the time limit was exceeded.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    wrapper = () if os.name == "nt" else (sys.executable, "-P", str(Path(__file__)))
    process = subprocess.Popen(
        [*wrapper, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **extra},
        start_new_session=True,
    )
    timed_out = threading.Event()

    def end() -> None:
        if _alive(process):
            timed_out.set()
            _end(process)

    timer = threading.Timer(hours * 3600, end)
    timer.daemon = True
    timer.start()
    done = False
    try:
        yield process
        if timed_out.is_set():
            raise TimeLimitError(f"it did not end within {hours:g} hours")
        done = process.poll() is not None
    finally:
        timer.cancel()
        if not done:
            _end(process)


def _alive(process: "subprocess.Popen[str]") -> bool:
    """Return whether any process of the group runs, even if the first one has ended."""
    if process.poll() is None:
        return True
    if os.name == "nt":
        return False
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _end(process: "subprocess.Popen[str]") -> None:
    """Send the group the signals of STOPPING, and kill what still runs."""
    if os.name == "nt":
        process.terminate()
        return
    for number, seconds in (*STOPPING, (signal.SIGKILL, 1.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while (alive := _alive(process)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not alive:
            return


def main() -> None:
    """Replace this process by the command in `sys.argv`, which then ends with its parent."""
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - a command of `child_process`


if __name__ == "__main__":
    main()
