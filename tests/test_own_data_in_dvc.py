"""Own data that `dvc add` tracks, in each place where DVC runs stages: as docs/dvc.md describes it.

The checkout has a space and a letter outside of ASCII in its path, and so its cache is elsewhere. Only stage `prepare`
runs.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import layouts
from tests.fake_stages import OFF
from tests.test_end_to_end import checkout, environment, metrics

TRAIN, TEST = 10, 5
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@example.org"]


def run(folder: Path, *words: str) -> str:
    """Run a command in a checkout, and return its output; it must succeed."""
    done = subprocess.run(
        words, cwd=folder, env=environment() | OFF, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def dvc(folder: Path, *words: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *words)


def git(folder: Path, *words: str) -> str:
    return run(folder, "git", *IDENTITY, *words)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with images in data/mine, added and committed, in which stage `prepare` has run."""
    folder = checkout(tmp_path_factory.mktemp("own") / "mon r\u00e9seau 7")
    dvc(folder, "cache", "dir", "--local", str(folder.parent / "cache"))
    layouts.LAYOUTS["folder"](folder / "data" / "mine", TRAIN, TEST)
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["data"] |= {"source": "folder", "root": "data/mine"}
    yaml.dump(params, folder / "params.yaml")
    assert "git add data/mine.dvc" in dvc(folder, "add", "data/mine")
    git(folder, "add", "data/mine.dvc", "params.yaml")
    dvc(folder, "repro", "prepare")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "own data")
    return folder


def result(folder: Path, experiment: str) -> dict[str, float]:
    """Return the metrics of stage `prepare` in an experiment."""
    references = git(folder, "for-each-ref", "--format=%(refname)", "refs/exps").split()
    (reference,) = [name for name in references if name.endswith(f"/{experiment}")]
    return json.loads(git(folder, "show", f"{reference}:metrics/prepare.json"))


def name_of(output: str) -> str:
    """Return the name that DVC gave to an experiment."""
    words = ("Reproducing experiment '", "Queued experiment '")
    return next(output.split(word)[1].split("'")[0] for word in words if word in output)


def test_git_tracks_the_dvc_file_and_no_picture(own: Path) -> None:
    assert git(own, "ls-files", "data").split() == ["data/.gitkeep", "data/mine.dvc"]
    assert git(own, "status", "--short") == ""
    assert metrics(own, "prepare")["identities"] == TRAIN + TEST
    assert "Stage 'prepare' didn't change, skipping" in dvc(own, "repro", "prepare")
    assert "Data and pipelines are up to date" in dvc(own, "status", "prepare")


def test_an_experiment_in_a_temporary_folder_finds_the_data(own: Path) -> None:
    out = dvc(own, "exp", "run", "--temp", "-S", "data.validation=0.4", "prepare")
    assert result(own, name_of(out))["validation"] > metrics(own, "prepare")["validation"]
    assert git(own, "status", "--short") == ""


@pytest.mark.stack
def test_a_queued_experiment_finds_the_data(own: Path) -> None:
    name = name_of(dvc(own, "exp", "run", "--queue", "-S", "data.validation=0.4", "prepare"))
    dvc(own, "queue", "start")
    deadline = time.monotonic() + 120
    while not any(word in (status := dvc(own, "queue", "status")) for word in ("Success", "Failed")):
        assert time.monotonic() < deadline, status
        time.sleep(1)
    assert "Success" in status, dvc(own, "queue", "logs", name)
    assert result(own, name)["validation"] > metrics(own, "prepare")["validation"]


def test_a_worktree_shares_the_cache(own: Path) -> None:
    tree = own.parent / "work tree"
    git(own, "worktree", "add", "-q", "-b", "other", str(tree))
    dvc(tree, "cache", "dir", "--local", str(own.parent / "cache"))
    dvc(tree, "checkout", "data/mine.dvc", "prepare")
    assert "Stage 'prepare' didn't change, skipping" in dvc(tree, "repro", "prepare")
    assert len(list((tree / "data" / "mine").rglob("*.*"))) == metrics(own, "prepare")["images"]


def test_a_clone_gets_data_and_results_from_the_remote(own: Path, tmp_path: Path) -> None:
    clone, remote = tmp_path / "ihr Rechner \u00fc", tmp_path / "remote"
    dvc(own, "remote", "add", "--force", "--local", "--default", "store", str(remote))
    dvc(own, "push", "data/mine.dvc", "prepare")
    run(tmp_path, "git", "clone", "-q", str(own), str(clone))
    dvc(clone, "remote", "add", "--local", "--default", "store", str(remote))
    dvc(clone, "pull", "data/mine.dvc", "prepare")
    assert "Stage 'prepare' didn't change, skipping" in dvc(clone, "repro", "prepare")
    assert metrics(clone, "prepare") == metrics(own, "prepare")


def test_the_folder_data_itself_is_added_by_what_dvc_tells(own: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(own), str(clone))
    git(clone, "rm", "-q", "data/mine.dvc")
    layouts.LAYOUTS["folder"](clone / "data", TRAIN, TEST)
    refused = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "data"], cwd=clone, env=environment(), capture_output=True, text=True
    )
    assert "git rm -r --cached 'data'" in refused.stderr
    git(clone, "rm", "-rq", "--cached", "data")
    git(clone, "commit", "-qm", "stop tracking data")
    assert "git add" in dvc(clone, "add", "data")
    git(clone, "add", "data.dvc", ".gitignore")
    assert not [line for line in git(clone, "status", "--short").splitlines() if line.startswith("??")]
    assert os.listdir(clone / "data")


def test_links_into_a_shared_cache_are_read(own: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(own), str(clone))
    dvc(clone, "config", "--local", "cache.dir", str(own.parent / "cache"))
    dvc(clone, "config", "--local", "cache.type", "symlink")
    dvc(clone, "checkout", "data/mine.dvc")
    pictures = [path for path in (clone / "data" / "mine").rglob("*") if not path.is_dir()]
    assert pictures and all(path.is_symlink() for path in pictures)
    dvc(clone, "repro", "--force", "prepare")
    assert metrics(clone, "prepare") == metrics(own, "prepare")
    assert git(clone, "diff") == ""
