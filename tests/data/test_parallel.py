"""Work spread over processors."""

import threading

from pipeline.data import parallel
from pipeline.data.parallel import in_threads


def test_results_keep_the_order_of_the_items(monkeypatch):
    monkeypatch.setattr(parallel, "available_threads", lambda: 2)
    assert list(in_threads(str, range(50))) == [str(n) for n in range(50)]


def test_no_more_threads_work_than_this_process_may_use(monkeypatch):
    monkeypatch.setattr(parallel, "available_threads", lambda: 2)
    both = threading.Barrier(2, timeout=60)
    assert len(set(in_threads(lambda _: (both.wait(), threading.get_ident())[1], range(50)))) == 2
