"""Progress of long loops: a bar on a terminal, a log line every ten seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LOG_INTERVAL = 10.0
"""Seconds between two log lines; shorter loops log nothing."""

T = TypeVar("T")


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield `items` and show how many of `total` are done; `label` names the work in two or three words."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, total=total, description=label)
        return
    last_log = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - last_log >= LOG_INTERVAL and done < total:
            last_log = time.monotonic()
            log.info("%s: %d of %d", label, done, total)
