"""Split a lock file: locked.txt is what pip installs with hashes; torch.txt what comes from an index of its own.

split-lock.py LOCK [torch]: with the second word torch and torchvision go to torch.txt, without hashes (another index
has other files), and what only their CUDA builds need is left out.
"""

import re
import sys
from pathlib import Path

OWN = re.compile(r"(torch|torchvision)==")
CUDA = re.compile(r"(nvidia-|cuda-|triton==)")


def main(lock: str, apart: str = "") -> None:
    """Write both files beside the lock file."""
    path = Path(lock)
    # A requirement is a line that begins at the margin, and the indented lines below it.
    entries = re.findall(r"^[^\s#].*(?:\n[ \t]+.*)*", path.read_text(encoding="utf-8"), re.MULTILINE)
    torch = [entry.split()[0] for entry in entries if apart and OWN.match(entry)]
    locked = [entry for entry in entries if not (apart and (OWN.match(entry) or CUDA.match(entry)))]
    path.with_name("locked.txt").write_text("\n".join(locked) + "\n", encoding="utf-8")
    path.with_name("torch.txt").write_text("\n".join(torch) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
