"""What a teacher said is found again, byte by byte, and never too much of it."""

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


class Teacher:
    """Counts how often it is asked."""

    def __init__(self, seed: int = 0) -> None:
        self.net, self.asked = network(seed), 0

    def about(self, answers: TeacherCache, images: Tensor) -> Tensor:
        def ask() -> dict[str, Tensor]:
            self.asked += 1
            return {"embedding": self.net(images).embedding.detach()}

        return answers(images, ask)["embedding"]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def test_the_same_images_are_asked_about_once(tmp_path: Path, images: Tensor) -> None:
    teacher = Teacher()
    first = teacher.about(TeacherCache(tmp_path, 1e9, teacher.net, ""), images)
    again = teacher.about(TeacherCache(tmp_path, 1e9, teacher.net, ""), images.clone())
    assert teacher.asked == 1
    assert torch.equal(first, again)
    images[2, 1, 5, 7] += 1e-6
    teacher.about(TeacherCache(tmp_path, 1e9, teacher.net, ""), images)
    assert teacher.asked == 2


@pytest.mark.parametrize("other", ["teacher", "question"])
def test_another_teacher_or_question_has_answers_of_its_own(tmp_path: Path, images: Tensor, other: str) -> None:
    first, second = Teacher(), Teacher(seed=1 if other == "teacher" else 0)
    first.about(TeacherCache(tmp_path, 1e9, first.net, "a"), images)
    second.about(TeacherCache(tmp_path, 1e9, second.net, "b" if other == "question" else "a"), images)
    assert second.asked == 1


def test_no_more_is_kept_than_the_limit_allows(tmp_path: Path, images: Tensor) -> None:
    teacher = Teacher()
    answers = TeacherCache(tmp_path, 2 * 3 * 8 * 4, teacher.net, "")  # two batches of 3 embeddings of 8 numbers
    for shift in range(4):
        teacher.about(answers, images + shift)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    teacher.about(answers, images)
    assert teacher.asked == 4


def test_answers_of_other_teachers_make_room(tmp_path: Path, images: Tensor) -> None:
    first, second = Teacher(), Teacher(seed=1)
    first.about(TeacherCache(tmp_path, 1e9, first.net, ""), images)
    answers = TeacherCache(tmp_path, 3 * 8 * 4, second.net, "")
    for _ in range(2):
        second.about(answers, images)
    assert second.asked == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path, images: Tensor) -> None:
    teacher = Teacher()
    first = teacher.about(TeacherCache(tmp_path, 1e9, teacher.net, ""), images)
    (kept,) = tmp_path.rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-5])
    assert torch.equal(teacher.about(TeacherCache(tmp_path, 1e9, teacher.net, ""), images), first)
    assert teacher.asked == 2
