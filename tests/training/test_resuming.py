"""Interrupted trainings end with the same bytes, on one device and on two."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.compress.student import build_student, remaining_spec
from pipeline.config import Params
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.training.loop import Fit
from tests.training.short_training import ROOT, change, digest, prepared, preprocess


class Killed(Exception):
    """Takes the place of a killed process."""


VARIANTS = {
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.003}},
    "off": {"shrink": "off"},
    "params": {"budget": {"of": "params", "reduction": 0.3}},
    "none": {"method": "none"},
    "embedding": {"resetting": {"importance": "embedding"}, "sites": ["conv1", "conv2", "stream"]},
    "one site": {"sites": ["conv2"], "budget": {"reduction": 0.2}},
    "paper": {
        "method": "paper",
        "optimizer": {"name": "sgd", "lr": 0.01},
        "paper": {"memory": 20, "start": 0.2, "lasso": 5.0, "ratio": 0.9, "threshold": 0.5},
    },
    "static-magnitude": {"method": "static-magnitude", "sites": ["conv1", "stream"]},
    "static-random": {"method": "static-random", "sites": ["conv1", "conv2", "stream"]},
    "blocks": {"budget": {"reduction": 0.66, "allow_block_removal": True}},
    "blocks and stream": {
        "sites": ["conv1", "conv2", "stream"],
        "budget": {"reduction": 0.85, "allow_block_removal": True},
    },
    "random weights": {"init": "random"},
    "stream": {"sites": ["conv1", "conv2", "stream"], "budget": {"reduction": 0.6}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_training_with_any_method_ends_with_the_same_bytes(
    params: Params, teacher: RetrievalNet, tmp_path: Path, variant: str
) -> None:
    content = params.model_dump()
    for key, value in VARIANTS[variant].items():
        content["student"][key] = {**content["student"][key], **value} if isinstance(value, dict) else value
    params = Params.model_validate(content)
    spec = check_killed_training(params, teacher, tmp_path, 2)
    if variant != "none":
        assert sum(spec.widths.values()) < sum(teacher.spec.widths.values())
    if variant.startswith("blocks"):
        assert not all(spec.has(block) for block in spec.blocks())


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_killed_training_ends_with_the_same_bytes(
    params: Params, teacher: RetrievalNet, tmp_path: Path, killed_after: int
) -> None:
    check_killed_training(params, teacher, tmp_path, killed_after)


def check_killed_training(params: Params, teacher: RetrievalNet, tmp_path: Path, killed_after: int) -> ArchSpec:
    task, uninterrupted, expected_rows = prepared(params, teacher, tmp_path / "uninterrupted")
    expected = uninterrupted.run(lambda: build_student(params, teacher, task.compression))

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == killed_after:
            raise Killed

    task, first, _ = prepared(params, teacher, tmp_path / "killed")
    with pytest.raises(Killed):
        Fit(first.fabric, first.config, task, first.loader, preprocess, first.checkpoints, kill).run(
            lambda: build_student(params, teacher, task.compression)
        )
    task, second, rows = prepared(params, teacher, tmp_path / "killed")

    def must_not_start() -> RetrievalNet:
        raise AssertionError("the training started from the beginning")

    resumed = second.run(must_not_start)
    assert resumed.spec == expected.spec
    assert digest(resumed.state_dict()) == digest(expected.state_dict())
    assert rows == expected_rows
    return remaining_spec(resumed)


def test_a_damaged_state_is_skipped(params: Params, teacher: RetrievalNet, tmp_path: Path) -> None:
    task, fit, _ = prepared(params, teacher, tmp_path)
    expected = fit.run(lambda: build_student(params, teacher, task.compression))
    newest = tmp_path / "epoch-00004.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    task, again, rows = prepared(params, teacher, tmp_path)
    assert digest(again.run(lambda: build_student(params, teacher, task.compression)).state_dict()) == digest(
        expected.state_dict()
    )
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_a_training_resumes_with_another_number_of_threads_and_says_so(
    params: Params,
    teacher: RetrievalNet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def epochs(threads: int) -> list[int]:
        monkeypatch.setattr("pipeline.runtime.available_threads", lambda processes: threads)
        task, fit, _ = prepared(params, teacher, tmp_path)
        states = fit.states(lambda: build_student(params, teacher, task.compression))
        return [next(states).epoch for _ in range(2)]

    assert epochs(2) == [0, 1]
    assert epochs(2) == [1, 2]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert epochs(1) == [2, 3]
    assert "resuming with 1 threads a training that had 2" in caplog.text


def two_devices(folder: Path, params: Path) -> tuple[str, str]:
    """Train on two devices, and return the result of each."""
    command = [sys.executable, "-m", "tests.training.two_devices", folder, params]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return (folder / "0.txt").read_text(), (folder / "1.txt").read_text()


@pytest.mark.parametrize(("importance", "views"), [("taylor", 0), ("embedding", 4)])
def test_two_devices_end_with_the_same_student_and_resume_from_the_state_of_the_first(
    params: Params, tmp_path: Path, importance: str, views: int
) -> None:
    params = change(params, "runtime", devices=2, strategy="ddp")
    distill = params.student.distill.model_copy(update={"views": views, "average_views": views > 0})
    params = change(
        params, "student", resetting={"importance": importance, "momentum": 0.9}, distill=distill.model_dump()
    )
    (tmp_path / "params.json").write_text(params.model_dump_json())
    first, second = two_devices(tmp_path, tmp_path / "params.json")
    assert first == second
    assert first.endswith("epochs 0 1 2 3 4")
    states = {rank: tmp_path / str(rank) / "epoch-00004.safetensors" for rank in (0, 1)}
    assert not states[1].exists()  # only the first device saves
    states[1].parent.mkdir(exist_ok=True)
    states[0].rename(states[1])  # the second device has a newer state than the first
    first_resumed, second_resumed = two_devices(tmp_path, tmp_path / "params.json")
    assert first_resumed == second_resumed == first.replace("epochs 0 1 2 3 4", "epochs 3 4")
