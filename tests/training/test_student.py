"""Training of the student: budgets, live shrinking, distillation and frozen norms."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.compress.budget import BudgetMissedError
from pipeline.compress.compactor import attach, nonzero_channels, row_norms
from pipeline.compress.shrinker import Shrinker
from pipeline.compress.student import (
    _without_gate_gradient,
    build_student,
    cache_teacher,
    evenly_spaced,
    remaining_spec,
)
from pipeline.compress.surgery import largest_difference, run_surgery
from pipeline.config import Params
from pipeline.data.augment import normalise
from pipeline.models import cost
from pipeline.models.feature_hooks import FeatureHooks, average_pool
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.training.optimizer import build_optimizer, load_state_tensors, state_tensors
from pipeline.training.teacher import build_teacher
from tests.training.short_training import IDENTITIES, RandomImages, change, digest, prepared, preprocess


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
        assert {site: len(kept) for site, kept in plan.kept.items()} == {site: small.widths[site] for site in plan.kept}
        assert set(plan.kept) >= set(small.sites)
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


def test_basic_blocks_shrink_as_well(params: Params, tmp_path: Path) -> None:
    content = params.model_dump()
    content["teacher"] |= {"depth": 18}
    content["student"]["sites"] = ["conv1"]
    params = Params.model_validate(content)
    torch.manual_seed(0)
    teacher = build_teacher(params.teacher, IDENTITIES).eval()
    test_a_student_reaches_its_budget_and_does_not_change_its_teacher(params, teacher, tmp_path, "live")


@pytest.mark.parametrize(
    "variant", [{"ibn": True, "pool": "gem", "head": "fc-bn"}, {"ibn": True, "head": "bn"}], ids=str
)
def test_the_architectures_of_other_toolkits_shrink_as_well(
    params: Params, tmp_path: Path, variant: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    dim = 16 if "fc" in variant["head"] else 512
    teacher = RetrievalNet(ArchSpec.full(26, 16, dim, identities=IDENTITIES, cosine=True, **variant)).eval()
    params = change(params, "student", sites=["conv1", "conv2", "stream"])
    test_a_student_reaches_its_budget_and_does_not_change_its_teacher(params, teacher, tmp_path, "live")


def test_a_student_of_another_architecture_learns_features_by_projections(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    params = change(params, "student", sites=["conv1", "conv2", "stream"], init="random")
    stages = {stage: teacher.spec.widths[stage] for stage in ("layer1", "layer2", "layer3", "layer4")}
    full = ArchSpec.full(14, 8, 16, identities=IDENTITIES, cosine=True).model_copy(update={"projections": stages})
    task, fit, rows = prepared(params, teacher, tmp_path, full)
    first = build_student(params, teacher, task.compression).projections["layer4"].weight.detach().clone()
    net = fit.run(lambda: build_student(params, teacher, task.compression))
    task.check(net)
    assert all(row["feature"] > 0 for row in rows)
    left = task.plan().kept["layer4"]
    assert net.projections["layer4"].weight.shape == (teacher.spec.widths["layer4"], len(left))
    assert not torch.equal(net.projections["layer4"].weight, first[:, list(left)])  # it learned
    result = run_surgery(net, full, params.surgery, preprocess(next(RandomImages().epoch(7))[0]))
    assert result.net.spec == remaining_spec(net)
    assert not result.net.projections
    assert 0.4 <= 1 - cost.macs(result.net.spec, (32, 32)) / cost.macs(full, (32, 32)) <= 0.41


def test_retrieval_losses_use_the_images_with_labels_and_distillation_losses_all(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    distill = params.student.distill.model_copy(
        update={"embedding": 10.0, "extra_losses": {"asymmetric_triplet": {"weight": 1.0, "margin": 2.0}}}
    )
    task, _, _ = prepared(change(params, "student", distill=distill.model_dump()), teacher, tmp_path)
    net = build_student(params, teacher, task.compression).eval()
    with torch.no_grad():
        net.conv1.weight.add_(torch.randn_like(net.conv1.weight), alpha=0.05)
    full = next(RandomImages().epoch(0))
    full = full._replace(images=preprocess(full.images))
    part = full._replace(labels=full.labels[:4])
    first = full._replace(images=full.images[:4], labels=full.labels[:4])
    with torch.no_grad():
        of_part, of_first, of_full = (task.losses(net, net, batch, 0.9) for batch in (part, first, full))
    for name in ("identity", "triplet", "asymmetric_triplet"):
        torch.testing.assert_close(of_part[name], of_first[name])
        assert of_part[name] != of_full[name]
    for name in ("kl", "feature", "embedding"):
        torch.testing.assert_close(of_part[name], of_full[name])
        assert of_part[name] != of_first[name]


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
    content["student"]["paper"] |= {"start": 0.2, "lasso": 2.0, "ratio": 0.9, "threshold": 0.5}
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


def test_calibration_images_are_evenly_spaced() -> None:
    assert list(evenly_spaced(torch.arange(10).numpy(), 4)) == [0, 3, 6, 9]
    assert list(evenly_spaced(torch.arange(3).numpy(), 4)) == [0, 1, 2]


def test_method_paper_refuses_stored_outputs(params: Params) -> None:
    distill = params.student.distill.model_copy(update={"views": 2})
    with pytest.raises(
        ValidationError, match=r"`student\.distill\.views` \(2\) must be 0, and `average_views` false, for"
    ):
        change(params, "student", method="paper", distill=distill.model_dump())


def test_method_paper_compares_features_in_front_of_the_compactors_and_masks_by_those_behind(
    params: Params, teacher: RetrievalNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = change(params, "student", method="paper", sites=["conv1", "conv2"])
    task, _, _ = prepared(changed, teacher, tmp_path)
    net = build_student(changed, teacher, task.compression).eval()
    batch = next(RandomImages().epoch(0))
    batch = batch._replace(images=preprocess(batch.images))
    with torch.no_grad():
        net.indicators()["layer4.1.conv2"].weight *= 3.0  # behind it are no further compactors
    seen = {}
    monkeypatch.setattr(task.compression, "observe", lambda student, teacher: seen.update(both=(student, teacher)))
    loss = task.losses(net, net, batch, 0.0)["feature"]
    for site in task.compression.observed_sites:
        factor = 3.0 if site == "layer4.1.conv2" else 1.0
        torch.testing.assert_close(seen["both"][0][site], factor * seen["both"][1][site], atol=1e-5, rtol=1e-4)
    behind = 2 * seen["both"][1]["layer4.1.conv2"].norm(dim=1).mean()
    assert loss < 0.1 * changed.student.distill.feature * behind


def test_without_the_feature_loss_no_features_are_compared(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    distill = params.student.distill.model_copy(update={"feature": 0.0, "embedding": 1.0})
    with_features, _, _ = prepared(params, teacher, tmp_path / "with")
    without, _, _ = prepared(change(params, "student", distill=distill.model_dump()), teacher, tmp_path / "without")
    assert set(with_features.feature_modules) == {"layer1", "layer2", "layer3", "layer4"}
    assert not without.feature_modules
    batch = next(RandomImages().epoch(0))
    batch = batch._replace(images=preprocess(batch.images))
    net = build_student(params, teacher, without.compression).eval()
    with torch.no_grad():
        net.conv1.weight.add_(torch.randn_like(net.conv1.weight), alpha=0.05)
    one, other = (task.losses(net, net, batch, 0.0) for task in (without, with_features))
    assert one["feature"] == 0 and one["kl"] == other["kl"] > 0
    assert other["feature"] > 0 and one["embedding"] > 0


def test_the_student_learns_the_mean_of_the_stored_views_of_an_image(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    distill = params.student.distill.model_copy(update={"views": 3, "average_views": True})
    changed = change(params, "student", distill=distill.model_dump())
    task, _, _ = prepared(changed, teacher, tmp_path / "states")
    cache_teacher(task, RandomImages(), "inputs", tmp_path / "outputs", changed)
    views = [normalise(next(RandomImages().epoch(view)).images) for view in range(3)]
    expected = torch.stack([functional.normalize(task.teacher_outputs(view)["embedding"]) for view in views]).mean(0)
    learnt = task.cache(next(RandomImages().epoch(1)))["embedding"]
    torch.testing.assert_close(learnt, expected, atol=1e-5, rtol=0)
    assert learnt.norm(dim=1).max() < 1  # the views differ


def test_stored_outputs_are_used_again_only_if_nothing_that_decides_them_differs(
    params: Params, teacher: RetrievalNet, tmp_path: Path
) -> None:
    def caches(
        inputs: str = "inputs",
        seed: int = 0,
        views: int = 1,
        feature: float = 0.5,
        kl: float = 1.0,
        pad: int = 3,
        images: RandomImages = RandomImages(),  # noqa: B008
    ) -> int:
        content = params.model_dump()
        content["seed"] = seed
        content["student"]["distill"] |= {"views": views, "feature": feature, "kl": kl}
        content["student"]["augment"]["pad"] = pad
        changed = Params.model_validate(content)
        task, _, _ = prepared(changed, teacher, tmp_path / "states")
        cache_teacher(task, images, inputs, tmp_path / "outputs", changed)
        return len(list((tmp_path / "outputs").glob("*/")))

    assert caches() == caches(views=2) == 1
    assert caches("other code") == 2
    assert caches(seed=1) == 3
    assert caches(feature=0.0) == 4
    assert caches(pad=4) == 5
    assert caches(kl=0.0) == 6
    others = RandomImages()
    others.pool = others.pool[::-1].copy() + 1
    assert caches(images=others) == 7
