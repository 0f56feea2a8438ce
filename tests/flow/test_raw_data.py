"""What stops DVC before stage `prepare` can report it is found beforehand, and said in one sentence."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from shlex import quote

import pytest
from PIL import Image

from pipeline.config import Params
from pipeline.data.manifest import DataError
from pipeline.files import Files
from pipeline.flow import doctor, dvc_cli, raw_data
from pipeline.flow.dvc_cli import StageError, changed, changed_stages
from pipeline.flow.incoming import RefreshError, RefusedError
from pipeline.flow.raw_data import check_root, tracking_file
from pipeline.flow.refresh import refresh
from pipeline.stage.params_file import load
from tests.fake_stages import OFF, Start

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


@pytest.fixture
def here(pipeline: Files, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A checkout in which the first stage depends on `data`, which holds one picture."""
    monkeypatch.chdir(pipeline.root)
    stages = pipeline.root / "dvc.yaml"
    stages.write_text(stages.read_text().replace("- stages/prepare.py", "- stages/prepare.py\n    - data", 1))
    (pipeline.root / "data" / "1").mkdir()
    (pipeline.root / "data" / "1" / "a.png").write_bytes(b"a")
    return pipeline


def with_root(files: Files, root: str) -> Params:
    params = load(files.params)
    return params.model_copy(update={"data": params.data.model_copy(update={"root": root})})


def dvc(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True)


def bad(files: Files, check: object) -> list[doctor.Check]:
    return [found for found in check(files) if found.ok is False]  # type: ignore[operator]


def test_a_readable_folder_passes(here: Files) -> None:
    check_root(here, load(here.params))
    check_root(here, with_root(here, str(here.root / "data")))
    (here.root / "data" / "1" / "é ß.png").write_bytes(b"")
    assert not bad(here, doctor.data)


def test_a_name_that_is_not_utf8_is_named_before_dvc_stops_at_it(here: Files) -> None:
    (here.root / "data" / "1" / NOT_UTF8).write_bytes(b"a")
    refused = dvc("status")
    assert refused.returncode and "surrogates not allowed" in refused.stderr and "caf" not in refused.stderr
    (found,) = bad(here, doctor.data)
    assert found.message == (
        r"`data.root` data has file names that are not UTF-8, which DVC cannot store (1, such as 1/caf\xe9.png)"
    )
    assert found.remedy == "rename them, such as by `convmv -r -f cp1252 -t utf8 --notest data`"
    with pytest.raises(StageError, match="a file name is not UTF-8; `smaller-student doctor` names it"):
        changed_stages()


def test_a_folder_with_such_a_name_is_found_by_its_files(here: Files) -> None:
    folder = here.root / "data" / os.fsdecode(b"\xff")
    folder.mkdir()
    check_root(here, load(here.params))  # DVC does not store empty folders
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"such as \\xff/a\.png"):
        check_root(here, load(here.params))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("mien", r"^`data\.root` mien does not exist in .*; create the folder, or correct the key$"),
        ("params.yaml", r"^`data\.root` params\.yaml is a file; set it to the folder of the images$"),
        ("../elsewhere/data", r"^`data\.root` \.\./elsewhere/data does not exist"),
    ],
)
def test_a_wrong_root_is_named_with_its_key(here: Files, root: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_root(here, with_root(here, root))


def test_images_that_are_only_in_dvc_are_named_with_the_command(here: Files) -> None:
    assert dvc("add", "data").returncode == 0
    assert tracking_file(here, load(here.params)) == "data.dvc"
    assert tracking_file(here, with_root(here, "data/1")) == "data.dvc"
    assert tracking_file(here, with_root(here, str(here.root / "data"))) is None
    for path in (here.root / "data").rglob("*.png"):
        path.unlink()
    (here.root / "data" / "1").rmdir()
    (here.root / "data").rmdir()
    sentence = "data is in DVC, but not in this checkout; run `dvc pull data.dvc`"
    (found,) = bad(here, doctor.data)
    assert f"{found.message}; {found.remedy}" == f"`data.root` {sentence}"
    assert dvc_cli.reason(dvc("repro", "prepare").stderr) == sentence
    assert dvc("checkout", "data.dvc").returncode == 0
    assert not bad(here, doctor.data)


def test_a_path_with_spaces_is_whole_in_sentences_and_quoted_in_commands(here: Files) -> None:
    (here.root / "data").rename(here.root / "my own data")
    assert dvc("add", "my own data").returncode == 0
    stages = here.root / "dvc.yaml"
    stages.write_text(stages.read_text().replace("    - data\n", "    - my own data\n"))
    params = with_root(here, "my own data")
    (here.root / "my own data" / "1" / "b.png").write_bytes(b"b")
    with pytest.raises(
        RefusedError, match=r"by `dvc pull 'my own data\.dvc'`, or keep .* `dvc commit 'my own data\.dvc'`$"
    ):
        refresh(here, params)
    (here.root / "my own data" / "1" / NOT_UTF8).write_bytes(b"a")
    with pytest.raises(DataError, match=r"--notest 'my own data'`$"):
        check_root(here, params)
    shutil.rmtree(here.root / "my own data")
    sentence = "my own data is in DVC, but not in this checkout; run `dvc pull 'my own data.dvc'`"
    with pytest.raises(DataError, match=f"^`data.root` {sentence}$"):
        check_root(here, params)
    assert dvc_cli.reason(dvc("repro", "prepare").stderr) == sentence
    subprocess.run(shlex.split(sentence.split("`")[1]), check=True, env=os.environ | {"PATH": PATH})
    check_root(here, params)


def test_a_folder_that_cannot_be_read_is_named(here: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = here.root / "data" / "1"
    closed.chmod(0)
    here.root.chmod(0o755)
    root = os.geteuid() == 0  # may read everything
    try:
        if root:
            scandir = os.scandir

            def refuse(path: str) -> object:
                if str(path) == str(closed):
                    raise PermissionError(13, "Permission denied", str(path))
                return scandir(path)

            monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match=rf"^{closed} cannot be read \(Permission denied\); make it readable"):
            check_root(here, load(here.params))
    finally:
        closed.chmod(0o755)


SYSTEM_FOLDERS = ("lost+found", ".Trash-1000", ".Trashes", "@eaDir", "#recycle", "System Volume Information")


def test_names_in_folders_of_the_system_stop_neither_dvc_nor_us(here: Files, tmp_path: Path) -> None:
    (here.root / ".dvcignore").write_bytes((Path(__file__).parents[2] / ".dvcignore").read_bytes())
    for name in SYSTEM_FOLDERS:
        (here.root / "data" / name).mkdir()
        (here.root / "data" / name / NOT_UTF8).write_bytes(b"a")
    assert dvc("status").returncode == 0
    check_root(here, load(here.params))
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"  # where .dvcignore has no effect
    (elsewhere / "lost+found").mkdir(parents=True)
    (elsewhere / "lost+found" / NOT_UTF8).write_bytes(b"a")
    with pytest.raises(DataError, match=r"such as lost\+found/caf\\xe9\.png"):
        check_root(here, with_root(here, str(elsewhere)))


def test_the_name_in_a_hidden_folder_that_stops_dvc_is_named(here: Files) -> None:
    (here.root / "data" / ".old").mkdir()
    (here.root / "data" / ".old" / NOT_UTF8).write_bytes(b"a")
    assert "surrogates not allowed" in dvc("status").stderr
    with pytest.raises(DataError, match=r"such as \.old/caf"):
        check_root(here, load(here.params))


@pytest.mark.parametrize("name", ["lost+found", ".Trash-0", ".private"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_of_the_system_that_cannot_be_read_is_no_fault(
    here: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inside: bool
) -> None:
    root = here.root / "data" if inside else tmp_path.parent / f"{tmp_path.name}-disk"
    (root / name).mkdir(parents=True)
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path) == str(root / name):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, who may read everything
    check_root(here, with_root(here, str(root)))


@pytest.mark.parametrize("name", ["dvc.lock", "dvc.yaml", "data/x.dvc", "data.dvc", "mine/my cars.dvc"])
def test_merge_markers_are_named(here: Files, name: str) -> None:
    here.params.write_text(here.params.read_text().replace("root: data ", 'root: "mine/my cars/all" '))
    assert load(here.params).data.root == "mine/my cars/all"
    (here.root / "mine").mkdir()
    before = (here.root / name).read_text() if (here.root / name).exists() else ""
    (here.root / name).write_text(f"<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> b\n{before}")
    with pytest.raises(
        StageError,
        match=f"^`dvc status` failed: {name} has merge markers; keep one side by `git checkout --ours {quote(name)}`$",
    ):
        changed_stages()
    (found,) = bad(here, doctor.sources)
    assert (found.name, found.message, found.remedy) == (
        name, "has merge markers in line 1", f"run `git checkout --ours {quote(name)}`"
    )  # fmt: skip


def test_a_dvc_that_runs_already_is_named(here: Files, start: Start) -> None:
    (here.root / ".dvc" / "tmp").mkdir()
    code = (
        "import time; from dvc.lock import make_lock\n"
        "with make_lock('.dvc/tmp/lock', tmp_dir='.dvc/tmp'): print('held', flush=True); time.sleep(600)"
    )
    holder = start(here, "-c", code)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(StageError, match=r"failed: dvc is already running in this checkout; wait for it, or end it$"):
        changed_stages()


def test_another_error_of_dvc_is_its_own_sentence() -> None:
    assert dvc_cli.reason("WARNING: a\nERROR: no such target\n\nHaving any troubles?") == "no such target"
    assert dvc_cli.reason("") == "it has no output"


def test_a_cache_whose_path_is_not_ascii_is_mentioned(here: Files) -> None:
    assert [check.ok for check in doctor.data(here)] == [True]
    with (here.root / ".dvc" / "config").open("a", encoding="utf-8") as config:
        config.write("[cache]\n    dir = /srv/réseau\n")
    *_, found = doctor.data(here)
    assert found.ok is None and found.message.startswith("DVC's cache /srv/réseau has letters outside of ASCII")


@pytest.fixture
def tracked(here: Files) -> Files:
    """A checkout whose images DVC tracks, as a colleague's two pictures; the folder still holds the old one."""
    here.params.write_text(here.params.read_text().replace("source: vehicles", "source: folder"))
    assert dvc("add", "data").returncode == 0
    old = (here.root / "data.dvc").read_text()
    (here.root / "data" / "1" / "b.png").write_bytes(b"b")
    assert dvc("add", "data").returncode == 0
    new = (here.root / "data.dvc").read_text()
    (here.root / "data.dvc").write_text(old)
    assert dvc("checkout", "--force", "data.dvc").returncode == 0
    (here.root / "data.dvc").write_text(new)  # as `git pull` does
    return here


def arrive(files: Files) -> None:
    (files.root / "incoming" / "1").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(files.root / "incoming" / "1" / "c.png")
    os.utime(files.root / "incoming" / "1" / "c.png", (1, 1))


def with_command(files: Files, command: str) -> Params:
    params = load(files.params)
    return params.model_copy(update={"retrain": params.retrain.model_copy(update={"refresh": command})})


DIFFERS = (
    r"^`data\.root` data is not as data\.dvc lists it; get those images by `dvc pull data\.dvc`, or keep the present "
    r"ones by `dvc commit data\.dvc`$"
)


def test_images_of_a_colleague_that_are_not_here_yet_stay_in_the_dvc_file(tracked: Files, start: Start) -> None:
    before = (tracked.root / "data.dvc").read_text()
    arrive(tracked)
    process = start(tracked, "-m", "pipeline", "retrain", PREFECT_HOME=str(tracked.root / "prefect"), **OFF)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert (
        "smaller-student: `data.root` data is not as data.dvc lists it; get those images by `dvc pull data.dvc`, or "
        "keep the present ones by `dvc commit data.dvc`\n"
    ) in err
    assert (tracked.root / "data.dvc").read_text() == before
    assert (tracked.root / "incoming" / "1" / "c.png").is_file() and not tracked.metrics("prepare").exists()
    assert dvc("pull", "data.dvc").returncode == 0
    assert refresh(tracked, load(tracked.params)) == ["1/c.png"]
    assert "nfiles: 3" in (tracked.root / "data.dvc").read_text() and changed("data.dvc") == []


def test_a_folder_without_incoming_files_is_compared_as_well(tracked: Files, start: Start) -> None:
    text = tracked.params.read_text()
    tracked.params.write_text(text.replace("incoming: incoming", 'incoming: ""'))
    assert tracked.params.read_text() != text
    process = start(tracked, "-m", "pipeline", "retrain", PREFECT_HOME=str(tracked.root / "prefect"), **OFF)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "smaller-student: `data.root` data is not as data.dvc lists it; " in err


def test_deleted_images_are_not_taken_for_an_intention(tracked: Files) -> None:
    assert dvc("pull", "data.dvc").returncode == 0
    before = (tracked.root / "data.dvc").read_text()
    (tracked.root / "data" / "1" / "a.png").unlink()
    arrive(tracked)
    with pytest.raises(RefusedError, match=DIFFERS):
        refresh(tracked, load(tracked.params))
    assert dvc("commit", "--force", "data.dvc").returncode == 0
    assert refresh(tracked, load(tracked.params)) == ["1/c.png"]
    assert sorted(os.listdir(tracked.root / "data" / "1")) == ["b.png", "c.png"]
    assert (tracked.root / "data.dvc").read_text() != before


def test_a_command_that_pulls_mends_the_difference_and_files_that_it_adds_are_saved(tracked: Files) -> None:
    pull = f"{sys.executable} -m dvc pull data.dvc"
    before = (tracked.root / "data.dvc").read_text()
    refresh(tracked, with_command(tracked, pull))
    assert changed("data.dvc") == [] and (tracked.root / "data.dvc").read_text() == before
    refresh(tracked, with_command(tracked, "cp data/1/a.png data/1/d.png"))
    assert changed("data.dvc") == [] and "nfiles: 3" in (tracked.root / "data.dvc").read_text()


def test_a_command_that_gets_only_the_dvc_file_is_refused(tracked: Files) -> None:
    new = (tracked.root / "data.dvc").read_text()
    (tracked.root / "pulled").write_text(new)
    assert dvc("commit", "--force", "data.dvc").returncode == 0
    with pytest.raises(RefusedError, match=DIFFERS):
        refresh(tracked, with_command(tracked, "cp pulled data.dvc"))
    assert (tracked.root / "data.dvc").read_text() == new


def test_an_interrupted_move_is_continued_by_the_next_run(tracked: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dvc("pull", "data.dvc").returncode == 0
    arrive(tracked)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(raw_data, "commit", stop)
        refresh(tracked, load(tracked.params))
    assert changed("data.dvc") == ["data.dvc"]
    assert refresh(tracked, load(tracked.params)) == []
    assert changed("data.dvc") == [] and "nfiles: 3" in (tracked.root / "data.dvc").read_text()


def test_a_refused_refresh_does_not_permit_later_changes(tracked: Files) -> None:
    assert dvc("pull", "data.dvc").returncode == 0
    with pytest.raises(RefreshError, match="failed with exit code"):
        refresh(tracked, with_command(tracked, "false"))
    (tracked.root / "data" / "1" / "a.png").unlink()
    with pytest.raises(RefusedError, match=DIFFERS):
        refresh(tracked, load(tracked.params))


def test_new_pictures_are_saved_in_dvc_and_the_next_retraining_has_nothing_to_do(here: Files, start: Start) -> None:
    here.params.write_text(here.params.read_text().replace("source: vehicles", "source: folder"))
    assert dvc("add", "data").returncode == 0
    before = (here.root / "data.dvc").read_text()
    (here.root / "incoming" / "1").mkdir(parents=True)
    picture = Path(__file__).parents[2] / "docs" / "panels.png"
    (here.root / "incoming" / "1" / "b.png").write_bytes(picture.read_bytes())
    os.utime(here.root / "incoming" / "1" / "b.png", (1, 1))
    (here.root / "incoming" / "1" / "broken.png").write_bytes(picture.read_bytes()[:999])
    os.utime(here.root / "incoming" / "1" / "broken.png", (1, 1))
    for expected in ("Completed: ran prepare", "NoChange"):
        process = start(here, "-m", "pipeline", "retrain", PREFECT_HOME=str(here.root / "prefect"), **OFF)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.splitlines()[-1].startswith(expected)
        assert err.count("broken.png") == 1 and "it cannot be used" in err
    assert sorted(os.listdir(here.root / "data" / "1")) == ["a.png", "b.png"]
    assert "nfiles: 2" in (here.root / "data.dvc").read_text() and "nfiles: 1" in before
    assert changed() == []
