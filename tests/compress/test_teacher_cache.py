"""The cache of teacher outputs returns the same bytes, and keeps its limit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.compress.teacher_cache import TeacherCache
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec


def network(seed: int) -> RetrievalNet:
    torch.manual_seed(seed)
    return RetrievalNet(ArchSpec.full(14, 8, 8)).eval()


class CountingTeacher:
    """Counts its forward passes."""

    def __init__(self, seed: int = 0) -> None:
        self.net, self.calls = network(seed), 0

    def embed(self, cache: TeacherCache, images: Tensor) -> Tensor:
        def compute() -> dict[str, Tensor]:
            self.calls += 1
            return {"embedding": self.net(images).embedding.detach()}

        return cache(images, compute)["embedding"]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def test_outputs_for_the_same_images_are_computed_once(tmp_path: Path, images: Tensor) -> None:
    teacher = CountingTeacher()
    first = teacher.embed(TeacherCache(tmp_path, 1e9, teacher.net, ""), images)
    again = teacher.embed(TeacherCache(tmp_path, 1e9, teacher.net, ""), images.clone())
    assert teacher.calls == 1
    assert torch.equal(first, again)
    images[2, 1, 5, 7] += 1e-6
    teacher.embed(TeacherCache(tmp_path, 1e9, teacher.net, ""), images)
    assert teacher.calls == 2


@pytest.mark.parametrize("changed", ["teacher", "settings"])
def test_another_teacher_or_other_settings_have_separate_outputs(tmp_path: Path, images: Tensor, changed: str) -> None:
    first, second = CountingTeacher(), CountingTeacher(seed=1 if changed == "teacher" else 0)
    first.embed(TeacherCache(tmp_path, 1e9, first.net, "a"), images)
    second.embed(TeacherCache(tmp_path, 1e9, second.net, "b" if changed == "settings" else "a"), images)
    assert second.calls == 1


def test_the_cache_stops_storing_at_its_limit(tmp_path: Path, images: Tensor) -> None:
    teacher = CountingTeacher()
    cache = TeacherCache(tmp_path, 2 * 3 * 8 * 4, teacher.net, "")  # two batches of 3 embeddings of 8 numbers
    for shift in range(4):
        teacher.embed(cache, images + shift)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    teacher.embed(cache, images)
    assert teacher.calls == 4


def test_outputs_of_other_teachers_are_deleted_to_make_room(tmp_path: Path, images: Tensor) -> None:
    first, second = CountingTeacher(), CountingTeacher(seed=1)
    first.embed(TeacherCache(tmp_path, 1e9, first.net, ""), images)
    cache = TeacherCache(tmp_path, 3 * 8 * 4, second.net, "")
    for _ in range(2):
        second.embed(cache, images)
    assert second.calls == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_damaged_outputs_are_computed_again(tmp_path: Path, images: Tensor) -> None:
    teacher = CountingTeacher()
    first = teacher.embed(TeacherCache(tmp_path, 1e9, teacher.net, ""), images)
    (stored,) = tmp_path.rglob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-5])
    assert torch.equal(teacher.embed(TeacherCache(tmp_path, 1e9, teacher.net, ""), images), first)
    assert teacher.calls == 2
