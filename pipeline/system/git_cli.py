"""The commit of a checkout, and commits of results to a branch, by the command git."""

import os
import subprocess
import tempfile
from pathlib import Path

UNKNOWN = "unknown"
RESULTS = ("params.yaml", "dvc.lock", "metrics", "plots")
"""What a retraining writes that belongs to Git."""
AUTHOR = {"user.name": "smaller-student", "user.email": "smaller-student@localhost"}
"""Settings of Git for commits where the user has none."""


class CommitError(RuntimeError):
    """The results could not be committed."""

    exit_code = 1


def commit(root: Path) -> tuple[str, bool | None]:
    """Return the commit of a checkout, and whether its sources differ from it (what a run writes does not count).

    Outside of Git: `unknown` and None.
    """
    try:
        changed = _git(root, "status", "--porcelain", "--", ".", ":!dvc.lock", ":!metrics", ":!plots")
        return _git(root, "rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN, None


def record(root: Path, branch: str, message: str) -> str:
    """Commit what a retraining wrote to a branch; working tree, index and the present branch stay as they are.

    The commit holds the sources of HEAD with the results in place of theirs, and follows the last one of the branch
    (which is made where it is missing) and HEAD.

    Returns:
        What was done, in one sentence.

    Raises:
        CommitError: If the branch is checked out, or Git fails; the branch is as it was then.
    """
    try:
        head = _git(root, "rev-parse", "--verify", "HEAD")
        if f"branch refs/heads/{branch}" in _git(root, "worktree", "list", "--porcelain").splitlines():
            raise CommitError(
                f"the results were not committed: branch `{branch}` is checked out; check out another one, or name "
                "another one by `retrain.branch`"
            )
        tip = _git(root, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}", accept=1)
        with tempfile.TemporaryDirectory() as scratch:
            index = Path(scratch) / "index"
            _git(root, "read-tree", head, index=index)
            _git(root, "add", "--all", "--", *(name for name in RESULTS if (root / name).exists()), index=index)
            tree = _git(root, "write-tree", index=index)
        if tip and _git(root, "rev-parse", f"{tip}^{{tree}}") == tree:
            return f"branch {branch} has it already"
        newer = not tip or _git(root, "merge-base", tip, head, accept=1) != head
        parents = [word for parent in (tip, head if newer else "") if parent for word in ("-p", parent)]
        missing = {name: value for name, value in AUTHOR.items() if not _git(root, "config", name, accept=1)}
        settings = [word for name, value in missing.items() for word in ("-c", f"{name}={value}")]
        made = _git(root, *settings, "commit-tree", tree, *parents, "-m", message)
        _git(root, "update-ref", f"refs/heads/{branch}", made, tip or "0" * 40)
        return f"committed {made[:12]} to branch {branch}"
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise CommitError(
            f"the results were not committed to branch `{branch}` ({reason}); repair the repository, or empty "
            "`retrain.branch`"
        ) from error


def _git(root: Path, *words: str, accept: int = 0, index: Path | None = None) -> str:
    """Return the output of a git command.

    Args:
        root: Of the checkout.
        words: Of the command.
        accept: Exit code that is no error either.
        index: In place of the checkout's own.

    Raises:
        subprocess.CalledProcessError: If it ends with another code than 0 or `accept`.
    """
    done = subprocess.run(
        ["git", *words],  # noqa: S607 - the user's git
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **({"GIT_INDEX_FILE": str(index)} if index else {})},
    )
    if done.returncode not in (0, accept):
        raise subprocess.CalledProcessError(done.returncode, ["git", *words], stderr=done.stderr)
    return done.stdout.strip()
