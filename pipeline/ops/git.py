"""What Git knows of a checkout."""

import subprocess
from pathlib import Path

UNKNOWN = "unknown"


def commit(root: Path) -> tuple[str, bool | None]:
    """Commit of a checkout, and whether its sources differ from it (what a run writes itself does not count).

    Returns:
        `unknown` and None outside of Git.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words],  # noqa: S607 - the user's git
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!dvc.lock", ":!metrics", ":!plots")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN, None
