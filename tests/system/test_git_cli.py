"""Commits of results to a branch do not touch the user's work."""

import subprocess
from pathlib import Path

import pytest

from pipeline.system.git_cli import CommitError, commit_results, head_commit


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in a subfolder of a repository with uncommitted work; Git has no author configured."""
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    root = tmp_path / "inner"
    (root / "metrics").mkdir(parents=True)
    git(tmp_path, "init", "-q", "-b", "main")
    (root / "params.yaml").write_text("seed: 0\n")
    (root / "code.py").write_text("1\n")
    commit(tmp_path, "first")
    (root / "code.py").write_text("my work\n")
    (root / "staged.py").write_text("mine too\n")
    git(root, "add", "staged.py")
    results(root, 1)
    return root


def commit(root: Path, message: str) -> None:
    git(root, "add", "-A")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", message)


def results(root: Path, number: int) -> None:
    (root / "dvc.lock").write_text(f"{number}\n")
    (root / "metrics" / "teacher.json").write_text(f"{number}\n")


def test_results_are_committed_and_nothing_else_changes(repository: Path) -> None:
    before = (git(repository, "status", "--porcelain"), git(repository, "rev-parse", "HEAD"))
    assert commit_results(repository, "auto/retrained", "Retrained").startswith("committed ")
    assert (git(repository, "status", "--porcelain"), git(repository, "rev-parse", "HEAD")) == before
    assert git(repository, "show", "auto/retrained:inner/dvc.lock") == "1"
    assert git(repository, "show", "auto/retrained:inner/metrics/teacher.json") == "1"
    assert git(repository, "show", "auto/retrained:inner/code.py") == "1"
    assert "staged" not in git(repository, "ls-tree", "-r", "--name-only", "--full-tree", "auto/retrained")
    assert git(repository, "log", "-1", "--format=%an %s", "auto/retrained") == "smaller-student Retrained"


def test_the_dvc_file_of_the_images_belongs_to_the_results(repository: Path) -> None:
    (repository / "data").mkdir()
    (repository / "data" / "mine.dvc").write_text("old\n")
    commit(repository, "images")
    assert head_commit(repository)[1] is False
    (repository / "data" / "mine.dvc").write_text("new\n")
    (repository / "data" / "other.dvc").write_text("not ours\n")
    assert head_commit(repository)[1] is False
    commit_results(repository, "retrained", "one", "data/mine.dvc")
    assert git(repository, "show", "retrained:inner/data/mine.dvc") == "new"
    assert "other.dvc" not in git(repository, "ls-tree", "-r", "--name-only", "--full-tree", "retrained")


def test_later_commits_follow_the_branch_and_include_new_sources(repository: Path) -> None:
    commit_results(repository, "retrained", "one")
    assert commit_results(repository, "retrained", "again") == "branch retrained has these results already"
    results(repository, 2)
    commit_results(repository, "retrained", "two")
    commit(repository, "my work is done")
    results(repository, 3)
    commit_results(repository, "retrained", "three")
    assert git(repository, "log", "--first-parent", "--format=%s", "retrained").split("\n") == [
        "three", "two", "one", "first"
    ]  # fmt: skip
    assert git(repository, "log", "-1", "--format=%P", "retrained").split()[1] == git(repository, "rev-parse", "main")
    assert git(repository, "show", "retrained:inner/code.py") == "my work"


def test_a_checked_out_branch_is_not_committed_to(repository: Path) -> None:
    with pytest.raises(CommitError, match=r"branch `main` is checked out; .*`retrain\.branch`") as error:
        commit_results(repository, "main", "m")
    assert error.value.exit_code == 1
    assert git(repository, "log", "--format=%s", "main") == "first"


def test_the_error_outside_of_a_repository_has_the_reason_of_git(tmp_path: Path) -> None:
    with pytest.raises(CommitError, match=r"not committed to branch `retrained` \(.*not a git repository.*\); repair"):
        commit_results(tmp_path, "retrained", "m")


def test_a_failed_commit_leaves_the_branch_unchanged_and_a_retry_succeeds(repository: Path) -> None:
    commit_results(repository, "retrained", "one")
    results(repository, 2)
    lock = repository.parent / ".git" / "refs" / "heads" / "retrained.lock"
    lock.touch()  # as a running or killed git leaves it
    with pytest.raises(
        CommitError, match=r"branch `retrained` \(.*retrained\.lock.*\); repair the repository, or empty"
    ):
        commit_results(repository, "retrained", "two")
    assert git(repository, "log", "-1", "--format=%s", "retrained") == "one"
    lock.unlink()
    assert commit_results(repository, "retrained", "two").startswith("committed ")
    assert git(repository, "show", "retrained:inner/dvc.lock") == "2"
