"""The command `smaller-student`; what is heavy is imported by the command that needs it."""

import sys
from pathlib import Path


def main() -> None:
    """Entry point of `smaller-student`."""
    if sys.argv[1:2] == ["retrain"] and "--help" not in sys.argv and Path("params.yaml").is_file():
        sys.exit(_retrain())
    from pipeline.cli.commands import run

    sys.exit(run())


def _retrain() -> int:
    """Take the flow's lock before anything heavy is imported: a second caller is refused within a second."""
    from pipeline.files import Files
    from pipeline.system.locks import BusyError, retraining

    try:
        with retraining(Files.here()):
            from pipeline.cli.commands import run

            return run()
    except BusyError as error:
        print(f"smaller-student: {error}", file=sys.stderr)
        return error.exit_code
