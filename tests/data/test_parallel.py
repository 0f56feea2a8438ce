"""Work spread over processors."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline.data import parallel
from pipeline.data.parallel import in_processes, in_threads

ROOT = Path(__file__).parents[2]
WHOSE = [f"({number}, __import__('os').getpid())" for number in range(16)]
"""Work for `eval`, which every process can import."""


def test_results_keep_the_order_of_the_items(monkeypatch):
    monkeypatch.setattr(parallel, "available_threads", lambda: 2)
    assert list(in_threads(str, range(50))) == [str(n) for n in range(50)]
    results = list(in_processes(eval, WHOSE, least=8))
    assert [number for number, _ in results] == list(range(16))
    assert os.getpid() not in {pid for _, pid in results}


def test_little_work_starts_no_process():
    assert {pid for _, pid in in_processes(eval, WHOSE[:7], least=4)} == {os.getpid()}


def test_no_more_threads_and_processes_work_than_this_process_may_use(monkeypatch):
    monkeypatch.setattr(parallel, "available_threads", lambda: 1)
    assert len(set(in_threads(lambda _: threading.get_ident(), range(50)))) == 1
    assert {pid for _, pid in in_processes(eval, WHOSE, least=1)} == {os.getpid()}


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_workers_of_a_killed_process_end():
    program = (
        "import time; from pipeline.data import parallel; parallel.available_threads = lambda: 2\n"
        "for _ in parallel.in_processes(time.sleep, [30] * 2, least=1): pass"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 20
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
            started = psutil.Process(parent.pid).children()
            workers = [child for child in started if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        time.sleep(1)  # until they are at work
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]  # dead, with nobody to ask
