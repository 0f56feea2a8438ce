"""Training of teacher and student on random images: budgets, resuming, divergence, several devices."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pipeline.compress.budget import BudgetMissedError, cost_model
from pipeline.compress.compactor import attach, nonzero_channels, row_norms
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.student import (
    StudentTask,
    _without_gate_gradient,
    build_student,
    evenly_spaced,
    remaining_spec,
    student_task,
)
from pipeline.compress.surgery import largest_difference, run_surgery
from pipeline.config import Params
from pipeline.models import cost
from pipeline.models.cost import CostModel
from pipeline.models.feature_hooks import FeatureHooks, average_pool
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.runtime import launch
from pipeline.stage.presets import load_preset
from pipeline.training import loop
from pipeline.training.loop import Batch, DivergedError, Fit
from pipeline.training.optimizer import build_optimizer, learning_rate, load_state_tensors, state_tensors
from pipeline.training.state import Checkpoints
from pipeline.training.teacher import TeacherTask, build_teacher, pretrained_weights

ROOT = Path(__file__).parents[2]
IDENTITIES, PER_IDENTITY, STEPS = 4, 2, 6


class RandomImages:
    """Batches of noise with a colour for each identity; they depend on the epoch and the device."""

    def __init__(self, device: int = 0) -> None:
        self.device = device

    def __len__(self) -> int:
        return STEPS

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(self.device * 10**6 + epoch * 1000 + step)
            labels = torch.arange(IDENTITIES).repeat_interleave(PER_IDENTITY)
            images = torch.randint(0, 128, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8)
            images[:, 0] += (labels * 30).to(torch.uint8)[:, None, None]
            yield images, labels, torch.arange(len(labels))


def preprocess(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.5).contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def params() -> Params:
    smoke = load_preset(ROOT, "smoke").model_dump()
    smoke["data"] |= {"image_size": [32, 32]}
    smoke["teacher"] |= {"depth": 26, "width": 16, "embedding_dim": 16, "epochs": 1}
    smoke["student"] |= {"epochs": 4, "validate_every": 1, "sites": ["conv1", "conv2"]}
    smoke["student"]["budget"] |= {"reduction": 0.4, "start": 0.05, "end": 0.5, "fade": 0.15, "every": 2}
    return Params.model_validate(smoke)


def change(params: Params, stage: str, **values: object) -> Params:
    content = params.model_dump()
    content[stage] |= values
    return Params.model_validate(content)


@pytest.fixture(scope="module")
def teacher(params: Params) -> RetrievalNet:
    torch.manual_seed(0)
    return build_teacher(params.teacher, IDENTITIES).eval()


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def cost_of(params: Params, teacher: RetrievalNet) -> CostModel:
    return cost_model(teacher.spec, params.student, (32, 32))


def prepared(
    params: Params, teacher: RetrievalNet, folder: Path, cache_folder: Path | None = None
) -> tuple[StudentTask, Fit, list[dict[str, float]]]:
    fabric = launch(params.runtime, params.seed)
    rows: list[dict[str, float]] = []
    calibration = preprocess(next(RandomImages().epoch(99))[0])
    steps = STEPS * params.student.epochs
    budget_cost = cost_of(params, teacher)
    task = student_task(fabric, params, teacher, budget_cost, steps, calibration, None, cache_folder)
    fit = Fit(fabric, params.student, task, RandomImages(), preprocess, Checkpoints(folder), rows.append)
    return task, fit, rows


class Killed(Exception):
    """Takes the place of a killed process."""


@pytest.mark.parametrize("shrink", ["live", "off"])
def test_a_student_reaches_its_budget_and_does_not_change_its_teacher(
    params: Params, teacher: RetrievalNet, tmp_path: Path, shrink: str
) -> None:
    params = change(params, "student", shrink=shrink)
    before = digest(teacher.state_dict())
    task, fit, rows = prepared(params, teacher, tmp_path)
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    small = remaining_spec(net)
    reduction = 1 - cost.macs(small, (32, 32)) / cost.macs(teacher.spec, (32, 32))
    assert 0.4 <= reduction <= 0.41
    assert rows[-1]["macs_reduction"] == reduction
    assert all(small.widths[site] % 8 == 0 for site in small.sites)
    assert digest(teacher.state_dict()) == before
    task.check(net)
    plan = task.plan()
    if shrink == "live":
        assert net.spec.widths == small.widths
        assert {site: len(kept) for site, kept in plan.kept.items()} == {
            site: small.widths[site] for site in small.sites
        }
    else:
        assert net.spec.widths == teacher.spec.widths
        masked = task.compression.masks["layer4.0.conv1"].masked
        assert torch.equal(row_norms(net.indicators()["layer4.0.conv1"].matrix.detach()) == 0, masked)
    result = run_surgery(net, teacher.spec, params.surgery, preprocess(next(RandomImages().epoch(7))[0]))
    assert result.net.spec == small
    assert result.max_abs_diff <= 1e-10


def test_a_live_cut_does_not_change_how_far_rows_have_faded(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    task, _, _ = prepared(params, teacher, tmp_path)
    assert isinstance(task.compression, Shrinker)
    net = build_student(params, teacher, task.compression).eval()
    site = task.compression.masks["layer4.0.conv1"]
    norms = torch.linspace(0.1, 2.0, len(site.kept))
    norms[3:8] = 0.0
    site.masked[:16] = True
    site.steps_left[:16] = 5
    site.full_norm[:16] = 1.0
    with torch.no_grad():
        net.indicators()["layer4.0.conv1"].weight *= norms[:, None, None, None]
    reshaped = task.reshape(net)
    assert reshaped is not None
    matrix = reshaped.net.indicators()["layer4.0.conv1"].matrix.detach()
    expected = torch.where(torch.arange(len(norms)) < 16, norms, torch.ones_like(norms))[norms > 0]
    torch.testing.assert_close(matrix, torch.diag(expected))
    assert task.compression.masks["layer4.0.conv1"].steps_left.tolist() == [5] * 11 + [0] * (len(norms) - 16)
    image = preprocess(next(RandomImages().epoch(5))[0])
    assert largest_difference(net, reshaped.net, image) < 1e-4


def test_batch_norms_after_a_live_cut_have_the_statistics_of_the_faded_network(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    task, _, _ = prepared(params, teacher, tmp_path)
    assert isinstance(task.compression, Shrinker)
    net = build_student(params, teacher, task.compression).eval()
    for name, zeroed in (("layer4.0.conv1", 0), ("layer4.0.conv2", 8)):
        task.compression.masks[name].masked[:16] = True
        task.compression.masks[name].full_norm[:16] = 1.0
        with torch.no_grad():
            net.indicators()[name].weight[:16] *= 0.1
            net.indicators()[name].weight[: zeroed or 1] = 0.0
    reshaped = task.reshape(net)
    assert reshaped is not None
    narrow = reshaped.net
    with FeatureHooks(narrow, ["layer4.0.conv2"]) as hooks, torch.no_grad():
        narrow(task.calibration)
        variance, mean = torch.var_mean(hooks.read()["layer4.0.conv2"], dim=(0, 2, 3))
    torch.testing.assert_close(narrow.layer4[0].bn2.running_mean, mean)
    torch.testing.assert_close(narrow.layer4[0].bn2.running_var, variance)


def test_rows_that_fade_across_the_end_of_an_epoch_are_cut_in_time(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    """Some rows of a site become zero in an epoch, others in the next; the schedule ends with the last step."""
    content = params.model_dump()
    content["student"]["budget"] |= {"start": 0.0, "end": 0.7, "fade": 0.3, "every": 1}
    task, fit, _ = prepared(Params.model_validate(content), teacher, tmp_path)
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    task.check(net)
    assert isinstance(task.compression, Shrinker)
    assert not any(site.masked.any() for site in task.compression.masks.values())
    assert net.spec.widths == remaining_spec(net).widths


VARIANTS = {
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.01}},
    "off": {"shrink": "off"},
    "params": {"budget": {"of": "params", "reduction": 0.3}},
    "none": {"method": "none"},
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


def test_basic_blocks_shrink_as_well(params: Params, tmp_path: Path) -> None:
    content = params.model_dump()
    content["teacher"] |= {"depth": 18}
    content["student"]["sites"] = ["conv1"]
    params = Params.model_validate(content)
    torch.manual_seed(0)
    teacher = build_teacher(params.teacher, IDENTITIES).eval()
    test_a_student_reaches_its_budget_and_does_not_change_its_teacher(params, teacher, tmp_path, "live")


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


def test_with_flip_averaging_the_student_learns_the_mean_of_both_outputs(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    distill = params.student.distill.model_copy(update={"embedding": 10.0, "flip_average": True})
    params = change(params, "student", distill=distill.model_dump())
    task, _, _ = prepared(params, teacher, tmp_path)
    images, labels, _ = next(RandomImages().epoch(0))
    images = preprocess(images)
    with torch.no_grad():
        losses = task.losses(teacher, teacher, images, labels, 0.0)  # the student is the teacher itself
        plain, flipped = (normalize(teacher(view).embedding, dim=1) for view in (images, images.flip(3)))
    cosine = cosine_similarity(plain, plain + flipped)
    assert cosine.min() < 0.999
    torch.testing.assert_close(losses["embedding"], 10 * (1 - cosine).mean())
    assert losses["feature"] == 0 and losses["kl"] > 0


def test_cached_teacher_outputs_lead_to_the_same_student(params: Params, teacher: RetrievalNet, tmp_path: Path) -> None:
    digests, calls = [], []
    for number, gib in enumerate((0.0, 1.0, 1.0)):
        params = change(params, "runtime", teacher_cache_gib=gib)
        task, fit, _ = prepared(params, teacher, tmp_path / str(number), tmp_path / "cache")
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        handle = task.teacher.register_forward_hook(count)
        digests.append(digest(fit.run(partial(build_student, params, teacher, task.compression)).state_dict()))
        handle.remove()
    assert calls[0] == calls[1] >= STEPS * params.student.epochs
    assert calls[2] == 0
    assert len(set(digests)) == 1


def test_the_feature_loss_of_a_stage_has_no_gradient_to_its_own_channel_gate() -> None:
    torch.manual_seed(0)
    net = attach(RetrievalNet(ArchSpec.full(14, 8, 8)), ["layer1", "layer2", "layer3"])
    with torch.no_grad():
        net.gates["layer2"].weight.uniform_(0.5, 2.0)
        net.gates["layer2"].weight[3] = 0.0
    with FeatureHooks(net, ["layer2"], average_pool) as hooks:
        net(torch.randn(4, 3, 32, 32))
        features = hooks.read()["layer2"]
    detached = _without_gate_gradient(net, "layer2", features)
    torch.testing.assert_close(detached, features)
    detached.square().sum().backward()
    earlier, own = net.gates["layer1"].weight.grad, net.gates["layer2"].weight.grad
    assert earlier.abs().max() > 1e-3
    assert own.abs().max() < 1e-4 * features.square().sum()


@pytest.mark.parametrize(
    ("method", "share", "frozen"),
    [("budget", 0.0, True), ("budget", 1.0, False), ("paper", 0.0, True), ("static-magnitude", 0.0, False)],
)
def test_the_norms_of_the_head_are_frozen_if_the_student_starts_as_its_teacher(
    params: Params, teacher: RetrievalNet, tmp_path: Path, method: str, share: float, frozen: bool
) -> None:
    params = change(params, "student", freeze_norms_at=1.0, freeze_head_norms_at=share, method=method)
    task, fit, _ = prepared(params, teacher, tmp_path)
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    if method == "budget":
        assert net.spec.widths != teacher.spec.widths  # it was cut during training
    if method == "static-magnitude":
        teacher = build_student(params, teacher, task.compression)
    assert torch.equal(net.head.bn1.running_var, teacher.head.bn1.running_var) is frozen
    assert torch.equal(net.head.bn2.running_var, teacher.head.bn2.running_var) is frozen


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_all_norms_are_frozen_in_the_last_steps(
    params: Params, teacher: RetrievalNet, tmp_path: Path, share: float
) -> None:
    """The statistics change until then; the weights change until the end."""
    params = change(params, "student", freeze_norms_at=share, freeze_head_norms_at=1.0, method="none")
    task, fit, _ = prepared(params, teacher, tmp_path)
    statistics, weights = [], []
    for state in fit.states(lambda: build_student(params, teacher, task.compression)):
        statistics.append(digest({name: value for name, value in state.net.named_buffers() if "running" in name}))
        weights.append(digest(dict(state.net.named_parameters())))
    changed = [before != after for before, after in pairwise(statistics)]
    assert changed == [(epoch + 1) / params.student.epochs <= share for epoch in range(params.student.epochs)]
    assert all(before != after for before, after in pairwise(weights))


def test_a_student_that_misses_its_budget_is_rejected(params: Params, teacher: RetrievalNet, tmp_path: Path) -> None:
    task, _, _ = prepared(params, teacher, tmp_path)
    with pytest.raises(BudgetMissedError, match=r"ended at a reduction of 0\.0000, not in \[0\.4, 0\.41\]"):
        task.check(build_student(params, teacher, task.compression))


@pytest.mark.parametrize(("correction", "warns"), [(1.0, False), (1.5, True)])
def test_a_student_that_saves_more_than_requested_is_logged(
    params: Params,
    teacher: RetrievalNet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    correction: float,
    warns: bool,
) -> None:
    task, _, _ = prepared(change(params, "student", method="static-magnitude"), teacher, tmp_path)
    task.compression.cost = task.compression.cost.corrected(teacher.spec.widths, correction)
    task.check(build_student(change(params, "student", method="static-magnitude"), teacher, task.compression))
    assert ("more than the requested 40.0 %" in caplog.text) == warns


def test_a_schedule_that_ends_near_the_last_step_is_completed(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    content = params.model_dump()
    content["student"]["epochs"] = 1
    content["student"]["budget"] |= {"end": 0.97, "fade": 0.01, "every": 4}
    task, fit, _ = prepared(Params.model_validate(content), teacher, tmp_path)
    fit.run(lambda: build_student(params, teacher, task.compression))
    assert isinstance(task.compression, Shrinker)
    assert task.compression.finalized


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


def test_live_shrinking_carries_the_state_of_the_optimiser(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    task, _, _ = prepared(params, teacher, tmp_path)
    net = build_student(params, teacher, task.compression)
    optimizer = build_optimizer(net, params.student.optimizer)
    net(preprocess(next(RandomImages().epoch(0))[0])).embedding.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        net.indicators()["layer2.0.conv1"].weight[8:] = 0.0
    reshaped = task.reshape(net.eval())
    assert reshaped is not None
    assert reshaped.net.spec.widths["layer2.0.conv1"] == 8
    renewed = build_optimizer(reshaped.net, params.student.optimizer)
    load_state_tensors(renewed, reshaped.net, state_tensors(optimizer, net), reshaped.carry)
    old, new = state_tensors(optimizer, net), state_tensors(renewed, reshaped.net)
    torch.testing.assert_close(new["exp_avg/layer2.0.conv2.weight"], old["exp_avg/layer2.0.conv2.weight"][:, :8])
    torch.testing.assert_close(new["exp_avg/layer1.0.conv1.weight"], old["exp_avg/layer1.0.conv1.weight"])
    torch.testing.assert_close(new["exp_avg/layer2.0.conv1.weight"], old["exp_avg/layer2.0.conv1.weight"][:8])
    torch.testing.assert_close(new["exp_avg/layer2.0.bn1.weight"], old["exp_avg/layer2.0.bn1.weight"][:8])
    compactor = "layer2.0.compactor1.weight"
    torch.testing.assert_close(new[f"exp_avg_sq/{compactor}"], old[f"exp_avg_sq/{compactor}"][:8, :8])
    assert new.keys() == old.keys()
    for name in ("conv1.weight", "bn1.weight"):  # similar weights keep the state valid
        before, after = net.state_dict()[f"layer2.0.{name}"][:8], reshaped.net.state_dict()[f"layer2.0.{name}"]
        assert torch.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.9
    image = preprocess(next(RandomImages().epoch(5))[0])
    assert largest_difference(net, reshaped.net, image) < 1e-4


def test_nothing_shrinks_with_method_none(params: Params, teacher: RetrievalNet, tmp_path: Path) -> None:
    params = change(params, "student", method="none", epochs=1)
    task, fit, _ = prepared(params, teacher, tmp_path)
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    assert net.spec == teacher.spec
    assert nonzero_channels(net) == {}


def two_devices(folder: Path, params: Path) -> tuple[str, str]:
    """Train on two devices, and return the result of each."""
    command = [sys.executable, "-m", "tests.training.two_devices", folder, params]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return (folder / "0.txt").read_text(), (folder / "1.txt").read_text()


def test_two_devices_end_with_the_same_student_and_resume_from_the_state_of_the_first(
    params: Params, tmp_path: Path
) -> None:
    params = change(params, "runtime", devices=2, strategy="ddp")
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


@pytest.mark.parametrize("method", ["static-magnitude", "static-random"])
def test_a_static_student_is_narrow_from_the_first_step_and_keeps_the_budget(
    params: Params, teacher: RetrievalNet, tmp_path: Path, method: str
) -> None:
    params = change(params, "student", method=method, epochs=1, sites=["conv1", "conv2", "stream"])
    task, fit, rows = prepared(params, teacher, tmp_path)
    first = build_student(params, teacher, task.compression)
    net = fit.run(lambda: first)
    assert net.spec.widths == first.spec.widths
    assert 0.4 <= rows[0]["macs_reduction"] <= 0.41
    kept = task.plan().kept["layer3.1.conv1"]
    if method == "static-magnitude":
        weight = teacher.layer3[1].conv1.weight[list(kept)][:, list(task.plan().kept["layer3"])]
        assert torch.equal(build_student(params, teacher, task.compression).layer3[1].conv1.weight, weight)
    else:
        assert kept == tuple(range(len(kept)))
    result = run_surgery(net, teacher.spec, params.surgery, preprocess(next(RandomImages().epoch(7))[0]))
    assert result.net.spec.widths == net.spec.widths


def test_the_published_method_leaves_zero_rows_in_multiples_and_surgery_cuts_them(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    content = params.model_dump()
    content["student"]["method"] = "paper"
    content["student"]["optimizer"] |= {"name": "sgd", "lr": 0.01}
    content["student"]["paper"] |= {"start": 0.2, "lasso": 5.0, "ratio": 0.9, "threshold": 0.5}
    task, fit, rows = prepared(Params.model_validate(content), teacher, tmp_path)
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    small = remaining_spec(net)
    assert net.spec.widths == teacher.spec.widths
    assert rows[0]["macs_reduction"] == 0.0
    assert rows[-1]["macs_reduction"] == 1 - cost.macs(small, (32, 32)) / cost.macs(teacher.spec, (32, 32)) > 0.1
    assert all(width % 8 == 0 for width in small.widths.values())
    result = run_surgery(net, teacher.spec, params.surgery, preprocess(next(RandomImages().epoch(7))[0]))
    assert result.net.spec.widths == small.widths


def test_whole_blocks_are_removed_if_allowed(params: Params, teacher: RetrievalNet, tmp_path: Path) -> None:
    content = params.model_dump()
    content["student"]["budget"] |= {"reduction": 0.66, "allow_block_removal": True}
    params = Params.model_validate(content)
    task, fit, _ = prepared(params, teacher, tmp_path)
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    task.check(net)
    removed = [block.name for block in net.spec.blocks() if not net.spec.has(block)]
    assert removed
    assert all(f"{name}.conv1.weight" not in net.state_dict() for name in removed)
    assert 0.66 <= 1 - cost.macs(net.spec, (32, 32)) / cost.macs(teacher.spec, (32, 32)) <= 0.67
    result = run_surgery(net, teacher.spec, params.surgery, preprocess(next(RandomImages().epoch(7))[0]))
    assert result.net.spec.widths == net.spec.widths


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


def test_calibration_images_are_evenly_spaced() -> None:
    assert list(evenly_spaced(torch.arange(10).numpy(), 4)) == [0, 3, 6, 9]
    assert list(evenly_spaced(torch.arange(3).numpy(), 4)) == [0, 1, 2]


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


def test_unusable_weights_are_rejected_with_a_remedy(params: Params, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere\.pth, which is not a file; set it to none, imagenet or a path"
    ):
        pretrained_weights(str(tmp_path / "nowhere.pth"), 50)
    with pytest.raises(ValueError, match=r"torchvision publishes no resnet26"):
        pretrained_weights("imagenet", 26)
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"weights\.pth, which is not a safetensors file .*with `safetensors\.torch\.save_file`"
    ):
        pretrained_weights(str(tmp_path / "weights.pth"), 18)
