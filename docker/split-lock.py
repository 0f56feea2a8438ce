"""Split a lock file into locked.txt (installed with hashes) and torch.txt (installed from another index).

split-lock.py LOCK [torch]: with the second argument, torch and torchvision go to torch.txt without hashes, since
another index has other files, and packages that only their CUDA builds need are omitted.
"""

import re
import sys
from pathlib import Path

TORCH = re.compile(r"(torch|torchvision)==")
CUDA = re.compile(r"(nvidia-|cuda-|triton==)")


def main(lock: str, separate: str = "") -> None:
    """Write both files beside the lock file."""
    path = Path(lock)
    # A requirement is an unindented line and the indented lines below it.
    entries = re.findall(r"^[^\s#].*(?:\n[ \t]+.*)*", path.read_text(encoding="utf-8"), re.MULTILINE)
    torch = [entry.split()[0] for entry in entries if separate and TORCH.match(entry)]
    locked = [entry for entry in entries if not (separate and (TORCH.match(entry) or CUDA.match(entry)))]
    path.with_name("locked.txt").write_text("\n".join(locked) + "\n", encoding="utf-8")
    path.with_name("torch.txt").write_text("\n".join(torch) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
