"""Training of the teacher: losses, divergence, learning rate and pretrained weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import Params
from pipeline.runtime import launch
from pipeline.training import loop
from pipeline.training.loop import DivergedError, Fit
from pipeline.training.optimizer import learning_rate
from pipeline.training.state import Checkpoints
from pipeline.training.teacher import TeacherTask, build_teacher, pretrained_weights
from tests.training.short_training import IDENTITIES, STEPS, RandomImages, change, preprocess


@pytest.mark.parametrize("recipe", ["scratch", "paper"])
def test_a_teacher_learns_with_both_recipes(params: Params, tmp_path: Path, recipe: str) -> None:
    content = params.model_dump()
    for stage in ("teacher", "student"):
        content[stage]["recipe"] = recipe
    content["teacher"]["epochs"] = 3
    if recipe == "paper":
        content["teacher"]["optimizer"] |= {"name": "sgd", "lr": 0.05}
    params = Params.model_validate(content)
    fabric, rows = launch(params.runtime, 0), []
    fit = Fit(fabric, params.teacher, TeacherTask(params.teacher, None), RandomImages(), preprocess,
              Checkpoints(tmp_path), rows.append)  # fmt: skip
    fit.run(lambda: build_teacher(params.teacher, IDENTITIES))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["identity"] + rows[0]["triplet"])


def test_a_diverging_loss_stops_training_with_epoch_and_steps(params: Params, tmp_path: Path) -> None:
    fabric = launch(params.runtime, 0)
    net = build_teacher(params.teacher, IDENTITIES)
    with torch.no_grad():
        net.head.fc.weight.fill_(torch.nan)
    fit = Fit(fabric, params.teacher, TeacherTask(params.teacher, None), RandomImages(), preprocess,
              Checkpoints(tmp_path), lambda row: None)  # fmt: skip
    with pytest.raises(DivergedError, match=r"loss became NaN or infinite in epoch 1, steps 1 to 6: .*'identity': nan"):
        fit.run(lambda: net)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_diverges_later_is_found_within_some_steps_and_the_last_good_state_stays(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "READ_EVERY", 4)

    class DivergingTask(TeacherTask):
        def losses(self, *arguments: Any) -> dict[str, Tensor]:
            losses = super().losses(*arguments)
            late = arguments[-1] == (STEPS + 4) / (2 * STEPS)  # the fifth step of the second epoch
            return {**losses, "loss": losses["loss"] / 0.0} if late else losses

    params = change(params, "teacher", epochs=2)
    fabric, task = launch(params.runtime, 0), DivergingTask(params.teacher, None)
    fit = Fit(fabric, params.teacher, task, RandomImages(), preprocess, Checkpoints(tmp_path), lambda row: None)
    with pytest.raises(DivergedError, match="in epoch 2, steps 5 to 6"):
        fit.run(lambda: build_teacher(params.teacher, IDENTITIES))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00001.safetensors"]


def test_the_curve_holds_the_mean_of_each_loss(params: Params, tmp_path: Path) -> None:
    recorded: list[dict[str, float]] = []

    class RecordingTask(TeacherTask):
        def losses(self, *arguments: Any) -> dict[str, Tensor]:
            losses = super().losses(*arguments)
            recorded.append({name: float(value.detach()) for name, value in losses.items()})
            return losses

    rows: list[dict[str, float]] = []
    fabric, task = launch(params.runtime, 0), RecordingTask(params.teacher, None)
    fit = Fit(fabric, params.teacher, task, RandomImages(), preprocess, Checkpoints(tmp_path), rows.append)
    fit.run(lambda: build_teacher(params.teacher, IDENTITIES))
    for name in ("loss", "identity", "triplet"):
        total = 0.0
        for values in recorded:
            total += values[name] / STEPS
        assert rows[0][name] == total  # equal to the last digit


def test_the_learning_rate_warms_up_holds_and_falls(params: Params) -> None:
    config = params.teacher.optimizer.model_copy(update={"lr": 1.0, "warmup": 0.1, "hold": 0.5, "final_lr": 0.01})
    rates = [learning_rate(progress, config) for progress in (0.0, 0.05, 0.1, 0.49, 0.75, 1.0)]
    assert rates == pytest.approx([0.1, 0.55, 1.0, 1.0, 0.505, 0.01])


def test_a_teacher_starts_from_a_file_of_torchvision_weights(params: Params, tmp_path: Path) -> None:
    import torchvision
    from safetensors.torch import save_file

    state = torchvision.models.resnet18().state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    config = params.teacher.model_copy(update={"depth": 18, "width": 64, "weights": str(path)})
    net = build_teacher(config, IDENTITIES)
    assert torch.equal(net.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    assert net.classifier.weight.shape == (IDENTITIES, 16)


def test_weights_that_torchvision_does_not_publish_are_rejected_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"torchvision publishes no resnet26"):
        pretrained_weights("imagenet", 26, "teacher.weights")
