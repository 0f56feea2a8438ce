"""The stored outputs of the teacher are those of its forward pass, are computed once, and keep their limit."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

from pipeline.compress import teacher_cache
from pipeline.compress.teacher_cache import TeacherCache, delete_outputs
from pipeline.data.loader import TrainBatch
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from tests.fake_stages import wait_until

IMAGES = np.array([1, 2, 4, 5, 7])
"""Images to train on, of nine."""


class CountingTeacher:
    """Counts the images that it sees; a view adds its number to all pixels."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.images = RetrievalNet(ArchSpec.full(14, 8, 8)).eval(), 0
        self.pixels = torch.randint(0, 200, (9, 3, 32, 32), dtype=torch.uint8)

    def batches(self, view: int):
        for indices in (IMAGES[:3], IMAGES[3:]):
            yield indices, self.pixels[indices] + view

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        self.images += len(images)
        embedding = self.net(images.float()).embedding
        return {"embedding": embedding, "first": embedding[:, :3]}

    def cache(self, folder: Path, views: int, average: bool = False) -> TeacherCache:
        cache = TeacherCache(folder, IMAGES, self.batches, self.outputs, average)
        cache.fill(views)
        return cache


def batch(teacher: CountingTeacher, indices: list[int], views: list[int]) -> TrainBatch:
    images = teacher.pixels[indices] + torch.tensor(views, dtype=torch.uint8)[:, None, None, None]
    return TrainBatch(images, torch.zeros(0, dtype=torch.int64), torch.tensor(indices), torch.tensor(views))


def test_stored_outputs_are_those_of_the_teacher_for_any_batch(tmp_path: Path) -> None:
    teacher = CountingTeacher()
    cache, mixed = teacher.cache(tmp_path, 2), batch(teacher, [7, 1, 1, 4], [0, 1, 0, 1])
    stored, computed = cache(mixed), teacher.outputs(mixed.images)
    assert list(stored) == list(computed)
    for name, output in computed.items():
        torch.testing.assert_close(stored[name], output)


def test_averaged_outputs_are_the_mean_over_all_views_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "MEAN_ROWS", 4)
    teacher = CountingTeacher()
    for views in (3, 2):
        mixed = batch(teacher, [7, 1, 7], [0, 1, 1])
        expected = sum(teacher.outputs(teacher.pixels[mixed.indices] + view)["embedding"] for view in range(views))
        torch.testing.assert_close(teacher.cache(tmp_path, views, average=True)(mixed)["embedding"], expected / views)
    plain = teacher.cache(tmp_path, 2)(batch(teacher, [7], [1]))["embedding"]
    torch.testing.assert_close(plain, teacher.outputs(teacher.pixels[[7]] + 1)["embedding"])


def test_outputs_are_computed_once_and_further_views_are_added(tmp_path: Path) -> None:
    for views, images in ((2, 10), (2, 0), (3, 5)):
        teacher = CountingTeacher()
        teacher.cache(tmp_path, views)
        assert teacher.images == images + 2  # two images show the sizes


def test_a_view_is_complete_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InterruptedTeacher(CountingTeacher):
        def outputs(self, images: Tensor) -> dict[str, Tensor]:
            if self.images > 8:
                raise KeyboardInterrupt
            return super().outputs(images)

    with pytest.raises(KeyboardInterrupt):
        InterruptedTeacher().cache(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["view-000.npy"]
    teacher = CountingTeacher()
    teacher.cache(tmp_path, 2)
    assert teacher.images == 5 + 2


def test_a_full_disk_is_found_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        OSError, match=r"take 0\.0 GiB, and the disk of .* has 0\.0 GiB; free some, or lower `student\.distill\."
    ):
        CountingTeacher().cache(tmp_path, 2, average=True)
    assert not list(tmp_path.iterdir())
    usage.free = 10**9
    CountingTeacher().cache(tmp_path, 2, average=True)
    usage.free = 0
    CountingTeacher().cache(tmp_path, 2, average=True)  # nothing is missing


class DeletingTeacher(CountingTeacher):
    """While it computes a view, another process deletes outputs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        if self.images == 2:
            code = "import sys, pathlib; from pipeline.compress.teacher_cache import delete_outputs as d; "
            subprocess.run([sys.executable, "-c", f"{code}d(pathlib.Path(sys.argv[1]), 0)", self.folder], check=True)
        return super().outputs(images)


def test_outputs_that_are_being_computed_are_not_deleted(tmp_path: Path) -> None:
    CountingTeacher().cache(tmp_path / "old", 1)
    teacher = DeletingTeacher(tmp_path)
    cache, mixed = teacher.cache(tmp_path / "new", 2), batch(teacher, [7, 1], [0, 1])
    assert [path.name for path in tmp_path.glob("*/")] == ["new"]
    delete_outputs(tmp_path, 0)  # open files stay readable
    torch.testing.assert_close(cache(mixed)["embedding"], teacher.outputs(mixed.images)["embedding"])


def test_a_training_waits_for_another_that_holds_the_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / "outputs.lock"):
            waiting = pool.submit(CountingTeacher().cache, tmp_path / "outputs", 1)
            wait_until(lambda: "in use by another training; waiting for it" in caplog.text, 20)
            assert not waiting.done() and not list(tmp_path.glob("*/*"))
        waiting.result(timeout=20)
    assert [path.name for path in tmp_path.glob("*/*")] == ["view-000.npy"]


def test_the_least_recently_used_outputs_are_deleted(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        CountingTeacher().cache(tmp_path / name, 1)
        os.utime(tmp_path / name, (number, number))
    os.utime(tmp_path / "a", (9, 9))
    size = (tmp_path / "a/view-000.npy").stat().st_size
    delete_outputs(tmp_path, 2.5 * size)
    assert sorted(path.name for path in tmp_path.glob("*/")) == ["a", "c"]
    with FileLock(tmp_path / "c.lock"):  # in use, so it counts
        delete_outputs(tmp_path, 1.5 * size)
    assert [path.name for path in tmp_path.glob("*/")] == ["c"]
    delete_outputs(tmp_path, 0)
    assert not list(tmp_path.glob("*/"))
    delete_outputs(tmp_path / "missing", 0)


def test_stored_outputs_of_other_images_are_not_read(tmp_path: Path) -> None:
    teacher = CountingTeacher()
    teacher.cache(tmp_path, 1)
    with pytest.raises(ValueError, match=r"view-000\.npy holds outputs \(5, 11\), not \(4, 11\); delete "):
        TeacherCache(tmp_path, IMAGES[:4], teacher.batches, teacher.outputs).fill(1)
