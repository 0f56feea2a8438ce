"""The command `smaller-student`; what is heavy is imported by the command that needs it."""

import sys

from pipeline.cli import training, models, search  # isort: skip (their commands, in the order of `--help`)
from pipeline.cli.app import app
from pipeline.ops.stage import guarded

__all__ = ["app", "main", "models", "search", "training"]


def main() -> None:
    """Entry point of `smaller-student`."""
    sys.exit(guarded("smaller-student", app))
