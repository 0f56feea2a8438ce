"""Work spread over the processors that this process may use, results in order."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

from pipeline.runtime import available_threads

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map with threads: for work that leaves Python alone, as Pillow's decoding does."""
    with ThreadPoolExecutor(available_threads()) as pool:
        yield from pool.map(function, items)


def in_processes(function: Callable[[T], R], items: Sequence[T], least: int) -> Iterator[R]:
    """Map with processes.

    Args:
        function: Importable by name, as `items` and results must be picklable.
        items: What to work on.
        least: Items that are worth the start of a process.
    """
    count = min(available_threads(), len(items) // least)
    if count < 2:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")  # the caller may have threads, which a fork does not survive
    with ProcessPoolExecutor(count, context, _die_with_parent) as pool:
        yield from pool.map(function, items, chunksize=max(1, least // 8))


def _die_with_parent() -> None:
    """End when the parent is killed, instead of waiting for the next job for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
