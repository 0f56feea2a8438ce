"""Compare all compression methods (hours) and write evidence/; run it again to resume after an interruption.

The experiments run in DVC's queue, which outlives this command: after Ctrl-C they continue. `dvc queue status` shows
them and `dvc queue stop --kill` stops them.
"""

import argparse
import logging
import sys
from pathlib import Path

from benchmarks.evidence.experiments import SEEDS, TARGETS, EvidenceError, compare_methods, grid


def main() -> None:
    """Run the missing experiments and print the path of the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of data, teacher and students")
    parser.add_argument(
        "--targets", type=float, nargs="+", default=TARGETS, help="reductions of the budget, fractions in (0, 1)"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        page = compare_methods(Path.cwd(), list(grid(options.seeds, options.targets)))
    except EvidenceError as error:
        sys.exit(f"evidence: {error}")
    print(f"evidence: {page.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
