"""Additional distillation losses: one file each, selected and validated in params.yaml."""

from pathlib import Path

import pytest
import torch

import pipeline.losses
from pipeline.losses import registry
from pipeline.losses.asymmetric_triplet import asymmetric_triplet
from pipeline.losses.registry import extra_loss, extra_losses
from pipeline.stage.params_file import ParamsError, load
from pipeline.stage.presets import preset_text
from tests.imports import ROOT
from tests.losses.test_losses import DTYPES, batch, cosine


@pytest.mark.parametrize("dtype", DTYPES)
def test_asymmetric_triplet_loss_compares_student_anchors_with_teacher_embeddings(dtype: torch.dtype) -> None:
    student, labels = batch(dtype)
    teacher = student.flip(0) + 0.5
    total = 0.0
    for i in range(8):
        positive = min(cosine(student[i], teacher[j]) for j in range(8) if labels[j] == labels[i])
        negative = max(cosine(student[i], teacher[j]) for j in range(8) if labels[j] != labels[i])
        total += max(0.0, negative - positive + 0.3)
    assert float(asymmetric_triplet(student, teacher, labels, margin=0.3)) == pytest.approx(total / 8, rel=1e-4)


@pytest.fixture
def params(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def write(path: Path, losses: str) -> Path:
    text = preset_text(ROOT, "smoke")
    assert "    extra_losses: {} " in text
    path.write_text(text.replace("    extra_losses: {} ", f"    extra_losses: {losses} "))
    return path


def test_a_registered_loss_can_be_selected_with_its_settings(params: Path) -> None:
    loaded = load(write(params, "{asymmetric_triplet: {weight: 2, margin: 0.1}}"))
    settings = loaded.student.distill.extra_losses["asymmetric_triplet"]
    student, labels = batch(torch.float32)
    weighted = extra_losses()["asymmetric_triplet"].bind(settings)(student, student, labels)
    assert weighted == 2 * asymmetric_triplet(student, student, labels, margin=0.1)


@pytest.mark.parametrize(
    ("losses", "complaint"),
    [
        ("{rank: {weight: 1.0}}", r"`student.distill.extra_losses.rank` is unknown; available: .*asymmetric_triplet"),
        (
            "{asymmetric_triplet: {weight: 1.0}}",
            r"asymmetric_triplet.margin` is missing; the settings of asymmetric_triplet are weight, margin",
        ),
        ("{asymmetric_triplet: {weight: 1.0, margin: 3.0}}", r"margin` must be at most 2, got 3.0 \(line \d+\)"),
        ("{asymmetric_triplet: {weight: 0.0, margin: 0.1}}", r"weight` must be greater than 0, got 0.0"),
        ("{asymmetric_triplet: {weight: 1.0, margin: 0.1, scale: 1.0}}", r"scale` is unknown"),
    ],
)
def test_unknown_losses_and_settings_are_refused_by_name(params: Path, losses: str, complaint: str) -> None:
    with pytest.raises(ParamsError, match=complaint):
        load(write(params, losses))


def test_a_new_loss_is_one_file_and_its_settings_keep_type_and_default(
    tmp_path: Path, params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "length.py").write_text(
        "from pipeline.losses.registry import extra_loss\n\n\n"
        "@extra_loss\n"
        "def length(student, teacher, labels, *, power: int, squared: bool = False):\n"
        "    assert type(power) is int and squared is False\n"
        "    return (student.norm(dim=1) - teacher.norm(dim=1)).abs().pow(power).mean()\n"
    )
    monkeypatch.setattr(pipeline.losses, "__path__", [*pipeline.losses.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    found = load(write(params, "{length: {weight: 2.0, power: 2}}")).student.distill.extra_losses
    student, labels = batch(torch.float32)
    loss = extra_losses()["length"].bind(found["length"])(2 * student, student, labels)
    assert float(loss) == pytest.approx(2 * float(student.norm(dim=1).pow(2).mean()), rel=1e-5)


def kl(student, teacher, labels):  # a built-in loss has this name
    return student.sum()


def untyped(student, teacher, labels, *, power):
    return student.sum()


def positional(student, teacher, labels, power: float):
    return student.sum()


def short(student):
    return student.sum()


def weighted(student, teacher, labels, *, weight: float):
    return student.sum()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (asymmetric_triplet, "has the name of another loss or curve; rename it"),
        (short, "the loss `short` in .* must take the student's embeddings"),
        (weighted, "must not have a setting `weight`"),
        (kl, "the loss `kl` in .* has the name of another loss or curve; rename it"),
        (untyped, "the setting `power` of the loss `untyped` in .* must be keyword-only"),
        (positional, "the setting `power` of the loss `positional` in .* must be keyword-only"),
    ],
)
def test_a_loss_that_cannot_work_is_refused_when_it_is_registered(function, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        extra_loss(function)
