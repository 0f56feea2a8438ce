"""The command `smaller-student`; heavy modules are imported by the commands that need them."""

import sys
from pathlib import Path


def main() -> None:
    """Entry point of `smaller-student`."""
    if sys.argv[1:2] == ["retrain"] and "--help" not in sys.argv and Path("params.yaml").is_file():
        sys.exit(_retrain())
    from pipeline.cli.commands import run

    sys.exit(run())


def _retrain() -> int:
    """Acquire the lock of the flow before Prefect is imported, so that a second caller fails within a second."""
    from pipeline.files import Files
    from pipeline.system.locks import BusyError, retrain_lock

    try:
        with retrain_lock(Files.here()):
            from pipeline.cli.commands import run

            return run()
    except BusyError as error:
        print(f"smaller-student: {error}", file=sys.stderr)
        return error.exit_code
