"""Instance norms, generalised means, and heads of other toolkits: their cost, their function and their pruning."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.models import cost
from pipeline.models.head import EmbeddingHead, GeneralisedMean
from pipeline.models.input import InputAdapter
from pipeline.models.resnet import RetrievalNet, SplitNorm
from pipeline.models.spec import ArchSpec, Head, Input

VARIANTS = [
    {"ibn": True},
    {"pool": "gem"},
    {"pool": "gem", "head": "fc-bn", "neck_bias": False},
    {"head": "fc-bn-relu"},
    {"head": "bn", "ibn": True, "pool": "gem"},
    {"head": "bn", "neck_bias": False},
    {"head": "none"},
]


def variant(depth: int, **settings: object) -> ArchSpec:
    """Return a narrow spec whose embedding is as long as its head allows."""
    streams = 8 * 8 * (1 if depth in (18, 34) else 4)
    dim = 24 if "fc" in str(settings.get("head", "fc")) else streams
    return ArchSpec.full(depth, 8, dim, **settings)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("depth", [14, 18])
def test_the_cost_of_a_variant_is_that_of_its_network(depth: int, settings: dict[str, object]) -> None:
    spec = variant(depth, **settings)
    net = RetrievalNet(spec).eval()
    assert cost.params(spec) == sum(parameter.numel() for parameter in net.parameters())
    assert net(torch.randn(2, 3, 48, 32)).embedding.shape == (2, spec.embedding_dim)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_variant_is_restored_from_json(settings: dict[str, object]) -> None:
    spec = variant(14, **settings)
    assert ArchSpec.model_validate_json(spec.model_dump_json(exclude_defaults=True)) == spec


def test_the_file_of_a_plain_network_has_no_new_keys() -> None:
    keys = set(ArchSpec.full(14, 8, 24).model_dump(exclude_defaults=True))
    assert keys == {"depth", "last_stride", "embedding_dim", "identities", "cosine", "indicators", "widths"}


def test_a_split_norm_normalises_the_first_channels_for_each_image() -> None:
    norm = SplitNorm(6, 2).train()
    x = 3 + 2 * torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    y = norm(x)
    torch.testing.assert_close(y[:, :2].mean(dim=(2, 3)), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(y[:, 2:].mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert (y[:, 2:].mean(dim=(2, 3)).abs() > 1e-3).all()
    assert set(norm.state_dict()) >= {"IN.weight", "IN.bias", "BN.weight", "BN.running_mean"}


def test_a_generalised_mean_lies_between_mean_and_maximum() -> None:
    pool, x = GeneralisedMean(), torch.rand(3, 4, 5, 6)
    literal = torch.stack([(x[:, :, i, j] ** 3) for i in range(5) for j in range(6)]).mean(dim=0) ** (1 / 3)
    torch.testing.assert_close(pool(x), literal)
    assert (pool(x) >= x.mean(dim=(2, 3))).all()
    assert (pool(x) <= x.amax(dim=(2, 3))).all()


@pytest.mark.parametrize("head", ["bn", "none"])
def test_a_head_without_a_linear_map_keeps_the_width_of_the_stream(head: Head) -> None:
    with pytest.raises(ValueError, match="without a linear map in the head, an embedding is as long as layer4 is wide"):
        ArchSpec.full(14, 8, 24, head=head)


def test_heads_compute_what_their_names_say() -> None:
    x = torch.randn(4, 256, 2, 2, generator=torch.Generator().manual_seed(0))
    mean = x.mean(dim=(2, 3))
    assert torch.equal(EmbeddingHead(variant(14, head="none"))(x), mean)
    neck = EmbeddingHead(variant(14, head="bn", neck_bias=False)).eval()
    assert neck.bn2 is not None
    assert neck.bn2.bias is None
    neck.bn2.running_mean.fill_(0.5)
    torch.testing.assert_close(neck(x), (mean - 0.5) / (1 + 1e-5) ** 0.5)
    linear = EmbeddingHead(variant(14, head="fc-bn-relu")).eval()
    assert linear.fc is not None
    torch.testing.assert_close(linear(x), functional.relu(linear.fc(mean) / (1 + 1e-5) ** 0.5))


def test_an_adapter_feeds_pixels_of_another_normalisation_in_another_order() -> None:
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    ours = (pixels - mean[:, None, None]) / std[:, None, None]
    # BGR in [0, 255] minus its mean, as in Caffe's networks.
    theirs = (255 * pixels - torch.tensor([123.7, 116.3, 103.5])[:, None, None]).flip(1)
    shift = tuple((255 * mean - torch.tensor([123.7, 116.3, 103.5])).tolist())
    adapter = InputAdapter(Input(scale=tuple((255 * std).tolist()), shift=shift, bgr=True))
    torch.testing.assert_close(adapter(ours), theirs, atol=1e-3, rtol=1e-5)
    net = RetrievalNet(ArchSpec.full(14, 8, 24).model_copy(update={"input": Input(scale=(1, 1, 1), shift=(0, 0, 0))}))
    assert not any(name.startswith("adapter") for name in net.state_dict())


def test_instance_norms_need_inner_sites_and_at_most_their_channels() -> None:
    content = ArchSpec.full(14, 8, 24).model_dump()
    for invalid in ({"layer1": 4}, {"layer1.0.conv1": 9}):
        with pytest.raises(ValueError, match="instance norms must be at inner sites"):
            ArchSpec.model_validate({**content, "instance_norms": invalid})


def test_a_norm_that_has_lost_all_channels_is_gone() -> None:
    for instance in (0, 6):
        norm = SplitNorm(6, instance)
        assert [type(child) for child in norm.children()] == [nn.BatchNorm2d if not instance else nn.InstanceNorm2d]
        assert norm(torch.randn(2, 6, 3, 3)).shape == (2, 6, 3, 3)
