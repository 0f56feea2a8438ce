"""Folding and cutting do not change the function of a network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import checkpoint
from pipeline.compress.compactor import attach, last_norm, nonzero_channels
from pipeline.compress.fold import fold, recalibrate_norms
from pipeline.compress.surgery import (
    SurgeryError,
    SurgeryPlan,
    fold_and_cut,
    largest_difference,
    plan_cut,
    run_surgery,
    slices,
    take,
)
from pipeline.config import Surgery
from pipeline.models import cost
from pipeline.models.resnet import RetrievalNet

Make = Callable[..., RetrievalNet]
IMAGES = torch.randn(3, 3, 32, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONFIG = Surgery(tolerance=0.0, channel_multiple=8)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    depth=st.sampled_from([14, 18, 26]),
    seed=st.integers(0, 10_000),
    multiple=st.sampled_from([1, 4, 8]),
    images=st.integers(1, 5),
)
def test_surgery_does_not_change_the_function_of_any_network(
    net_with_zero_rows: Make, depth: int, seed: int, multiple: int, images: int
) -> None:
    net = net_with_zero_rows(depth, seed, multiple)
    plan = plan_cut(net, 0.0, multiple, net.spec)
    narrow = fold_and_cut(net, plan)
    pixels = torch.randn(images, 3, 32, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.isfinite(net(pixels).embedding).all()
    assert largest_difference(net, narrow, pixels) <= 1e-10
    assert narrow.spec.indicators == ()
    removable = {site for block in net.spec.removable for site in block.sites}
    for site, channels in plan.kept.items():
        assert narrow.spec.widths[site] == len(channels) >= (0 if site in removable else multiple)
        assert len(channels) % multiple == 0
    for layer in narrow.spec.layers():
        assert narrow.get_submodule(layer.name).weight.shape[0] == {**narrow.spec.widths, "embedding": 24}[layer.target]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    depth=st.sampled_from([14, 18, 26]),
    seed=st.integers(0, 10_000),
    multiple=st.sampled_from([1, 8]),
    ibn=st.booleans(),
    pool=st.sampled_from(["average", "gem"]),
    head=st.sampled_from(["bn-relu-fc-bn", "fc-bn", "fc-bn-relu", "bn", "none"]),
    neck_bias=st.booleans(),
)
def test_surgery_does_not_change_the_function_of_any_variant(
    net_with_zero_rows: Make, depth: int, seed: int, multiple: int, **variant: object
) -> None:
    net = net_with_zero_rows(depth, seed, multiple, **variant)
    plan = plan_cut(net, 0.0, multiple, net.spec)
    narrow = fold_and_cut(net, plan)
    assert torch.isfinite(net(IMAGES).embedding).all()
    assert largest_difference(net, narrow, IMAGES) <= 1e-10
    assert narrow.spec.indicators == ()
    assert cost.params(narrow.spec) == sum(parameter.numel() for parameter in narrow.parameters())
    for site, count in narrow.spec.instance_norms.items():
        assert count == sum(channel < net.spec.instance_norms[site] for channel in plan.kept[site])


def test_all_gradients_are_finite_where_rows_are_exactly_zero(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows(26).train()
    net(IMAGES).embedding.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_cutting_a_nonzero_channel_changes_the_function(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows()
    kept = dict(plan_cut(net, 0.0, 8, net.spec).kept)
    kept["layer2.0.conv1"] = kept["layer2.0.conv1"][1:]
    assert largest_difference(net, fold_and_cut(net, SurgeryPlan(kept)), IMAGES) > 1e-6


def test_surgery_fails_if_it_would_cut_a_nonzero_channel(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows()
    with torch.no_grad():
        net.indicators()["layer4.0.conv2"].weight[:, :, 0, 0] *= 1e-3
    loose = Surgery(tolerance=1e-2, channel_multiple=1)
    with pytest.raises(SurgeryError):
        run_surgery(net.float(), net.spec, loose, IMAGES)


def test_surgery_removes_compactors_and_classifier_and_returns_the_difference(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows(identities=5).float()
    result = run_surgery(net, net.spec, CONFIG, IMAGES.float())
    assert result.max_abs_diff <= 1e-10
    assert result.net.classifier is None
    assert result.net.conv1.weight.dtype == torch.float32
    assert largest_difference(net, result.net, IMAGES.float()) < 1e-3


def test_a_width_that_is_not_a_multiple_is_rejected_with_the_name_of_the_site(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows(multiple=8)
    with torch.no_grad():
        net.indicators()["layer3.0.conv1"].weight[:3] = 0.0
        net.indicators()["layer3.0.conv1"].weight[3:, :, 0, 0] = torch.eye(64)[3:]
    with pytest.raises(SurgeryError, match=r"layer3\.0\.conv1 would keep 61 channels"):
        plan_cut(net, 0.0, 8, net.spec)


def test_a_width_that_was_cut_during_training_must_be_a_multiple_too(net_with_zero_rows: Make) -> None:
    full = net_with_zero_rows()
    kept = {"layer3.0.conv1": tuple(range(61))}
    cut_live = attach(fold_and_cut(full, SurgeryPlan(kept)), kept)
    with pytest.raises(SurgeryError, match=r"layer3\.0\.conv1 would keep 61 channels"):
        plan_cut(cut_live, 0.0, 8, full.spec)


def test_a_site_without_nonzero_channels_is_rejected_by_name(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows()
    with torch.no_grad():
        net.indicators()["layer2.0.conv2"].weight.zero_()
    with pytest.raises(SurgeryError, match=r"every channel of layer2\.0\.conv2"):
        plan_cut(net, 0.0, 8, net.spec)


def test_recalibrated_norms_do_not_change_the_function(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows()
    folded = fold(net, net.spec.indicators)
    recalibrate_norms(folded, net.spec.sites, IMAGES)
    assert largest_difference(net, folded, IMAGES[:1]) <= 1e-10
    captured = {}
    folded.layer2[0].conv2.register_forward_hook(lambda _m, _i, output: captured.update(x=output))
    folded(IMAGES)
    torch.testing.assert_close(folded.layer2[0].bn2.running_mean, captured["x"].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(folded.layer2[0].bn2.running_var, captured["x"].var(dim=(0, 2, 3)))


def test_slices_fit_every_tensor_of_the_narrow_network(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows(26)
    plan = plan_cut(net, 0.0, 8, net.spec)
    narrow = attach(fold_and_cut(net, plan), [site for site, channels in plan.kept.items() if channels])
    indices = slices(net.spec, plan)
    for name, tensor in narrow.state_dict().items():
        assert take(net.state_dict()[name], indices.get(name, ())).shape == tensor.shape, name


def test_plans_compose_into_channels_of_the_first_network() -> None:
    earlier = SurgeryPlan({"a": (1, 4, 6), "b": (0, 2)})
    later = SurgeryPlan({"a": (0, 2), "c": (5,)})
    assert later.after(earlier).kept == {"a": (1, 6), "b": (0, 2), "c": (5,)}


def test_a_plan_and_a_network_are_restored_from_disk(net_with_zero_rows: Make, tmp_path: Path) -> None:
    net = net_with_zero_rows(18).float()
    plan = plan_cut(net, 0.0, 8, net.spec)
    plan.write(tmp_path)
    assert SurgeryPlan.read(tmp_path) == plan
    narrow = fold_and_cut(net, plan)
    checkpoint.save(tmp_path, narrow)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "spec.json", "weights.safetensors"}
    assert largest_difference(narrow, checkpoint.load(tmp_path), IMAGES.float()) == 0.0


def test_weights_that_do_not_fit_the_spec_are_rejected(net_with_zero_rows: Make, tmp_path: Path) -> None:
    net = net_with_zero_rows().float()
    checkpoint.save(tmp_path, net)
    spec = (tmp_path / "spec.json").read_text().replace('"layer1.0.conv1": 16', '"layer1.0.conv1": 8')
    (tmp_path / "spec.json").write_text(spec)
    with pytest.raises(RuntimeError, match=r"layer1\.0"):
        checkpoint.load(tmp_path)


def test_new_compactors_do_not_change_the_function(net_with_zero_rows: Make) -> None:
    net = fold_and_cut(full := net_with_zero_rows(), plan_cut(full, 0.0, 8, full.spec))
    assert largest_difference(net, attach(net, net.spec.widths), IMAGES) == 0.0
    assert all(
        len(channels) == net.spec.widths[site]
        for site, channels in nonzero_channels(attach(net, net.spec.widths)).items()
    )


def test_a_block_that_still_adds_a_constant_is_not_removed(net_with_zero_rows: Make) -> None:
    net = net_with_zero_rows(26)
    block = net.spec.removable[0]
    with torch.no_grad():
        for site in block.sites:
            net.indicators()[site].weight.zero_()
        norm = net.get_submodule(last_norm(block))
        norm.weight.zero_()
        norm.bias.zero_()
        norm.bias[3] = 1e-9
    with pytest.raises(SurgeryError, match=rf"{block.sites[0]} is zero, but its block cannot be removed"):
        plan_cut(net, 0.0, 8, net.spec)
