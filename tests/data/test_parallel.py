"""The thread pool."""

import threading

from pipeline.data import parallel
from pipeline.data.parallel import in_threads


def test_results_keep_the_order_of_the_items(monkeypatch):
    monkeypatch.setattr(parallel, "available_threads", lambda: 2)
    assert list(in_threads(str, range(50))) == [str(n) for n in range(50)]


def test_the_variable_of_openmp_limits_the_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert len(set(in_threads(lambda _: threading.get_ident(), range(50)))) == 1


def test_threads_are_limited_to_the_available_processors(monkeypatch):
    monkeypatch.setattr(parallel, "available_threads", lambda: 2)
    barrier = threading.Barrier(2, timeout=60)
    assert len(set(in_threads(lambda _: (barrier.wait(), threading.get_ident())[1], range(50)))) == 2
