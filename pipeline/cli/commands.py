"""All commands, in the order of `--help`."""

from pipeline.cli import preview, training, models, search  # isort: skip
from pipeline.cli.app import app
from pipeline.stage.run import run_guarded

__all__ = ["app", "models", "preview", "run", "search", "training"]


def run() -> int:
    """Run the command in `sys.argv`, and return the exit code."""
    return run_guarded("smaller-student", app)
