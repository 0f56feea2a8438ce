"""What the doctor tells."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What one look found.

    Attributes:
        topic: In one or two words.
        good: Whether all is well; None for something to know, which stands in nobody's way.
        text: What is.
        remedy: What to do; empty where nothing is to be done.
        fix: Does it, where that is safe.
    """

    topic: str
    good: bool | None
    text: str
    remedy: str = ""
    fix: Callable[[], object] | None = None
