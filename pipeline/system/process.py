"""What this process is, whom it dies with and how it is asked to stop."""

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
"""How a program is asked to end, and how many seconds it has for it: after five, nothing runs any more."""


class Stopped(BaseException):
    """A signal asks this process to end; not an `Exception`, so that nobody takes it for an error to recover from."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent ends, so that killing dvc leaves no orphan (Linux only)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we could ask
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `Stopped` in this process, and leave its forked workers the usual end."""
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
    """Most memory that this process and any one of its ended children held, bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most if sys.platform == "darwin" else most * 1024


# --- programs below this one ------------------------------------------------------------------------------------------


class TimeLimitError(RuntimeError):
    """A program did not end in the time that it had, and was ended."""


@contextmanager
def running(*words: str, hours: float = 1000, **extra: str) -> Iterator["subprocess.Popen[str]"]:
    """A program in a process group of its own, which is ended as a whole when the block is left early.

    Prefect cancels by ending one process, and a killed one ends nobody: the program asks the kernel to be told.

    Args:
        words: Of the command. This Python and what is installed beside it come first in the PATH.
        hours: Time that it has.
        extra: Environment beside what is there.

    Raises:
        TimeLimitError: At the end of the block, if it did not end in time.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    guard = () if os.name == "nt" else (sys.executable, "-P", str(Path(__file__)))
    process = subprocess.Popen(
        [*guard, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **extra},
        start_new_session=True,
    )
    late = threading.Event()

    def end() -> None:
        if _alive(process):
            late.set()
            _end(process)

    watch = threading.Timer(hours * 3600, end)
    watch.daemon = True
    watch.start()
    done = False
    try:
        yield process
        if late.is_set():
            raise TimeLimitError(f"it did not end within {hours:g} hours")
        done = process.poll() is not None
    finally:
        watch.cancel()
        if not done:
            _end(process)


def _alive(process: "subprocess.Popen[str]") -> bool:
    """Whether anything of its group runs; what its first process left behind counts."""
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
    """Ask the whole group to end, and kill what does not."""
    if os.name == "nt":
        process.terminate()
        return
    for number, seconds in (*STOPPING, (signal.SIGKILL, 1.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while (living := _alive(process)) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not living:
            return


def main() -> None:
    """Become another program, one that ends with its parent."""
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 (of our own words)


if __name__ == "__main__":
    main()
