"""A thread pool with the threads that this process may use."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.runtime import available_threads

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map in threads, results in order; for work that releases the GIL, as Pillow's decoding does."""
    with ThreadPoolExecutor(available_threads()) as pool:
        yield from pool.map(function, items)
