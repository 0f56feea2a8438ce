"""Read the commit of a checkout, and commit results to a branch, by the git command."""

import os
import subprocess
import tempfile
from pathlib import Path

UNKNOWN = "unknown"
RESULTS = ("params.yaml", "dvc.lock", "metrics", "plots")
"""Files and folders that a retraining commits."""
FALLBACK_CONFIG = {"user.name": "smaller-student", "user.email": "smaller-student@localhost"}
"""Author of commits if Git has none configured."""


class CommitError(RuntimeError):
    """The results could not be committed."""

    exit_code = 1


def head_commit(root: Path) -> tuple[str, bool | None]:
    """Return the commit of a checkout, and whether its sources differ from it; `unknown` and None outside of Git.

    Files that a run writes (dvc.lock, .dvc files, metrics, plots) do not count as differences.
    """
    try:
        changed = _git(root, "status", "--porcelain", "--", ".", ":!dvc.lock", ":!*.dvc", ":!metrics", ":!plots")
        return _git(root, "rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN, None


def commit_results(root: Path, branch: str, message: str, data: str | None = None) -> str:
    """Commit the results of a retraining to a branch without touching working tree, index and current branch.

    The commit holds the sources of HEAD with the new results. Its parents are the tip of the branch, if it exists, and
    HEAD.

    Args:
        data: The .dvc file of the raw images, if there is one; it belongs to the results.

    Returns:
        The outcome in one sentence.

    Raises:
        CommitError: If the branch is checked out, or Git fails; the branch is unchanged then.
    """
    try:
        head = _git(root, "rev-parse", "--verify", "HEAD")
        if f"branch refs/heads/{branch}" in _git(root, "worktree", "list", "--porcelain").splitlines():
            raise CommitError(
                f"the results were not committed: branch `{branch}` is checked out; check out another branch, or set "
                "`retrain.branch` to another one"
            )
        tip = _git(root, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}", accept=1)
        with tempfile.TemporaryDirectory() as scratch:
            index = Path(scratch) / "index"
            _git(root, "read-tree", head, index=index)
            names = (*RESULTS, *([data] if data else []))
            _git(root, "add", "--all", "--", *(name for name in names if (root / name).exists()), index=index)
            tree = _git(root, "write-tree", index=index)
        if tip and _git(root, "rev-parse", f"{tip}^{{tree}}") == tree:
            return f"branch {branch} has these results already"
        head_is_new = not tip or _git(root, "merge-base", tip, head, accept=1) != head
        parents = [word for parent in (tip, head if head_is_new else "") if parent for word in ("-p", parent)]
        missing = {name: value for name, value in FALLBACK_CONFIG.items() if not _git(root, "config", name, accept=1)}
        settings = [word for name, value in missing.items() for word in ("-c", f"{name}={value}")]
        commit = _git(root, *settings, "commit-tree", tree, *parents, "-m", message)
        _git(root, "update-ref", f"refs/heads/{branch}", commit, tip or "0" * 40)
        return f"committed {commit[:12]} to branch {branch}"
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise CommitError(
            f"the results were not committed to branch `{branch}` ({reason}); repair the repository, or empty "
            "`retrain.branch`"
        ) from error


def _git(root: Path, *words: str, accept: int = 0, index: Path | None = None) -> str:
    """Run a git command and return its output; `index` replaces the index of the checkout.

    Raises:
        subprocess.CalledProcessError: If the exit code is neither 0 nor `accept`.
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
