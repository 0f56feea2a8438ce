"""What `make stack` does to the machine it runs on."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.ops import stack as room
from pipeline.ops.cluster import ClusterError, owner
from pipeline.ops.stack import Stack
from tests.stack.postgres import let_in

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to hand PostgreSQL to another user")
def test_no_folder_of_others_is_opened_for_postgresql(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    with pytest.raises(ClusterError, match=r"may not enter .*run `chmod o\+x .*/private"):
        owner(tmp_path / "private" / "cluster")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to hand PostgreSQL to another user")
def test_a_folder_that_only_postgresqls_user_may_enter_is_open_to_it(tmp_path: Path) -> None:
    let_in(tmp_path)
    its = tmp_path / "its"
    its.mkdir(mode=0o700)
    shutil.chown(its, "postgres", "postgres")
    assert owner(its / "cluster")["user"] == "postgres"
    assert (its / "cluster").owner() == "postgres"


def test_long_logs_begin_anew_while_somebody_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LONGEST", 10)
    stack = Stack(ROOT, tmp_path)
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / "mlflow.log").open("ab", buffering=0) as log:
        log.write(b"short")
        stack.trim()
        log.write(b", and then long")
        stack.trim()
        log.write(b"anew")
    found = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert found == {"mlflow.log": "anew", "mlflow.log.1": "short, and then long"}
