"""Networks against torchvision's, and specs against the networks they describe."""

import pytest
import torch
import torchvision
from torch import nn

from pipeline.models import cost
from pipeline.models.feature_hooks import FeatureHooks
from pipeline.models.resnet import RetrievalNet, convert
from pipeline.models.spec import ArchSpec


def counted_macs(net: nn.Module, size: tuple[int, int]) -> int:
    """Count multiply-accumulates by forward hooks, layer by layer."""
    total = 0

    def count(module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    net(torch.zeros(1, 3, *size))
    return total


@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_weights_give_torchvision_features(depth: int) -> None:
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    spec = ArchSpec.full(depth, 64, 128, last_stride=2)
    ours = RetrievalNet(spec.model_copy(update={"projections": {"layer1": 8}})).eval()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if depth == 50 or "num_batches" not in name}
    ours.load_backbone(state, "torchvision")  # with and without the counts that old files lack
    theirs.fc = nn.Identity()
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FeatureHooks(ours, ["layer4"]) as hooks:
        ours(image)
        torch.testing.assert_close(hooks.read()["layer4"].mean(dim=(2, 3)), theirs(image))


def test_weights_of_another_depth_are_rejected_with_names_and_remedy() -> None:
    net = RetrievalNet(ArchSpec.full(50, 64, 128))
    with pytest.raises(ValueError, match=r"do not fit a ResNet-50.*missing.*or set its depth, width and stem"):
        net.load_backbone(torchvision.models.resnet18().state_dict(), "resnet18.pth")


@pytest.mark.parametrize("depth", [14, 18, 26, 34, 50, 101])
@pytest.mark.parametrize("last_stride", [1, 2])
def test_the_cost_of_a_spec_is_that_of_the_network(depth: int, last_stride: int) -> None:
    spec = ArchSpec.full(depth, 16, 24, last_stride)
    narrower = {site: width - 1 - index % 5 for index, (site, width) in enumerate(spec.widths.items())}
    spec = spec.model_copy(update={"widths": spec.widths | {site: narrower[site] for site in spec.sites}})
    net = RetrievalNet(spec).eval()
    assert cost.params(spec) == sum(parameter.numel() for parameter in net.parameters())
    assert cost.macs(spec, (65, 48)) == counted_macs(net, (65, 48))


def test_a_stem_may_have_a_width_of_its_own() -> None:
    spec = ArchSpec.full(14, 8, 24, stem=20)
    net = RetrievalNet(spec).eval()
    assert (
        net.conv1.out_channels == 20 and net.layer1[0].conv1.in_channels == 20 and net.layer1[0].conv1.out_channels == 8
    )
    assert cost.params(spec) == sum(parameter.numel() for parameter in net.parameters())
    assert ArchSpec.full(14, 8, 24, stem=8) == ArchSpec.full(14, 8, 24)
    with pytest.raises(ValueError, match="the stem of a ResNet-18 has as many channels as its first stage, 8"):
        ArchSpec.full(18, 8, 24, stem=20)


def test_a_spec_is_restored_from_json() -> None:
    spec = ArchSpec.full(26, 16, 32, identities=7, cosine=True).model_copy(update={"indicators": ("layer2.1.conv2",)})
    assert ArchSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 19}, r"depth must be one of .*, got 19"),
        ({"widths": {"conv1": 8}}, "missing or unknown"),
        ({"indicators": ("layer9.0.conv1",)}, "unknown sites"),
    ],
)
def test_an_invalid_spec_is_rejected(change: dict[str, object], message: str) -> None:
    content = ArchSpec.full(26, 16, 32).model_dump() | change
    with pytest.raises(ValueError, match=message):
        ArchSpec.model_validate(content)


def test_converting_names_a_missing_weight() -> None:
    net = RetrievalNet(ArchSpec.full(14, 8, 16))
    state = dict(net.state_dict())
    del state["layer3.0.conv2.weight"]
    with pytest.raises(KeyError, match=r"layer3\.0\.conv2\.weight"):
        convert(net, net.spec, state)


def test_hooks_are_empty_after_reading_and_removed_on_exit() -> None:
    net = RetrievalNet(ArchSpec.full(14, 8, 16)).eval()
    with FeatureHooks(net, ["layer1.0.compactor1", "layer2"]) as hooks:
        net(torch.zeros(1, 3, 32, 32))
        assert set(hooks.read()) == {"layer1.0.compactor1", "layer2"}
        assert hooks.read() == {}
    net(torch.zeros(1, 3, 32, 32))
    assert hooks.read() == {}


def test_only_whole_blocks_with_an_identity_shortcut_may_be_removed() -> None:
    spec = ArchSpec.full(26, 8, 16)

    def without(*sites: str) -> ArchSpec:
        return ArchSpec.model_validate({**spec.model_dump(), "widths": spec.widths | dict.fromkeys(sites, 0)})

    narrow = without("layer2.1.conv1", "layer2.1.conv2")
    net = RetrievalNet(narrow).eval()
    assert not any(name.startswith("layer2.1.") for name in net.state_dict())
    assert not any(layer.name.startswith("layer2.1.") for layer in narrow.layers())
    assert net(torch.randn(2, 3, 32, 32)).embedding.shape == (2, 16)
    for sites in (("layer2.1.conv1",), ("layer2.0.conv1", "layer2.0.conv2"), ("layer2",)):
        with pytest.raises(ValueError, match="or 0 throughout a block with an identity shortcut"):
            without(*sites)
