"""State dicts of other toolkits: the translated network computes what theirs does."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.models.toolkits import Translation, normalisation_of, relative_input, translate
from tests.models.other_toolkits import FastReid, StrongBaseline, TorchReid, randomised

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = torch.rand(3, 3, 70, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
R14, R18, R26 = (1, 1, 1, 1), (2, 2, 2, 2), (2, 2, 2, 2)

WRAPS: list[Callable[[str], str]] = [
    lambda name: name,
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.{name}",
    lambda name: name.replace("backbone.", "backbone.module.").replace("base.", "base.module."),
]


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def loaded(translation: Translation) -> RetrievalNet:
    net = RetrievalNet(translation.spec)
    net.load_state_dict(net.state_dict() | translation.state, strict=True)
    return net.double().eval()


@pytest.mark.parametrize(
    ("make", "head", "left_out"),
    [
        (lambda: TorchReid(R26, 8, 2, ibn=False), "none", 2),
        (lambda: TorchReid(R26, 8, 2, ibn=True), "none", 2),
        (lambda: TorchReid(R14, 8, 1, ibn=False, fc_dim=24), "fc-bn-relu", 2),
        (lambda: FastReid(R26, 8, ibn=True), "bn", 1),
        (lambda: FastReid(R14, 8, ibn=False, embedding_dim=24), "fc-bn", 1),
        (lambda: FastReid(R18, 8, ibn=True, gem=False, basic=True), "bn", 1),
        (lambda: StrongBaseline(R14, 8), "bn", 1),
    ],
    ids=["torchreid", "torchreid-ibn", "torchreid-fc", "fast-reid-ibn", "fast-reid-fc", "fast-reid-basic", "bnneck"],
)
@pytest.mark.parametrize("wrap", WRAPS, ids=["plain", "parallel", "compiled", "backbone alone parallel"])
def test_a_translated_network_computes_the_embeddings_of_the_toolkit(
    make: Callable[[], nn.Module], head: str, left_out: int, wrap: Callable[[str], str]
) -> None:
    torch.manual_seed(0)
    theirs = randomised(make())
    state = {wrap(name): tensor for name, tensor in theirs.state_dict().items()}
    stride = theirs.layer4[0].conv2.stride[0] if isinstance(theirs, TorchReid) else 1
    translation = translate(state, stride, (MEAN, STD))
    theirs.double()
    with torch.no_grad():
        expected = theirs(255 * PIXELS if isinstance(theirs, FastReid) else normalised(PIXELS))
        embedding = loaded(translation)(normalised(PIXELS)).embedding
    assert translation.spec.head == head
    assert len(translation.left_out) == left_out
    torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=1e-5)


def test_torchvision_gives_pooled_features() -> None:
    theirs = torchvision.models.resnet18().eval()
    translation = translate(theirs.state_dict(), 2, (MEAN, STD))
    assert translation.spec == ArchSpec.full(18, 64, 512, last_stride=2, head="none").model_copy(
        update={"neck_bias": False}
    )
    theirs.fc = nn.Identity()
    theirs.double()
    with torch.no_grad():
        torch.testing.assert_close(loaded(translation)(normalised(PIXELS)).embedding, theirs(normalised(PIXELS)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"fc.weight": torch.zeros(3, 4)}, r"not a ResNet, because no tensor is named layer1\.0\.conv1"),
        (
            lambda state: state | {"layer1.0.se.fc.0.weight": torch.zeros(1)},
            r"1 tensors of layers .* layer1\.0\.se\.fc",
        ),
        (lambda state: state | {"NL_2.0.g.weight": torch.zeros(1)}, r"1 tensors of layers .* NL_2\.0\.g\.weight"),
        (lambda state: {k: v for k, v in state.items() if k != "bn1.running_mean"}, "1 tensors are missing"),
        (lambda state: {k: v for k, v in state.items() if "layer4.1" not in k}, "2, 2, 2, 1 bottlenecks"),
        (
            lambda state: state | {"layer1.0.conv2.weight": torch.zeros(8, 2, 3, 3)},
            r"layer1\.0\.conv2\.weight is a grouped convolution, which is not supported",
        ),
        (
            lambda state: state | {"bottleneck.weight": torch.ones(256), "fc.1.weight": torch.ones(256)},
            r"fc\.1\.weight is a second tensor of head\.bn2\.weight, so its head is not supported",
        ),
        (lambda state: state | {"layer2.0.bn2.weight": torch.zeros(3)}, r"layer2\.0\.bn2\.weight has the shape \(3,\)"),
        (
            lambda state: state | {"conv1.weight": state["conv1.weight"] * torch.nan},
            "values that are not finite",
        ),
        (
            lambda state: state | {"bn1.running_var": -state["bn1.running_var"]},
            "running_var has negative values",
        ),
        (lambda state: state | {"pixel_std": torch.zeros(1, 3, 1, 1)}, "pixel_std has values that are not positive"),
        (
            lambda state: state | {"bn1.bias": state["bn1.bias"].to_sparse()},
            r"bn1\.bias is a sparse or qua",
        ),
        (
            lambda state: {f"model.{k}": v for k, v in state.items()} | {"fc.0.weight": torch.ones(8, 256)},
            r"the names of the network begin with model\., but not fc\.0\.weight",
        ),
    ],
    ids=[
        "mlp",
        "squeeze-excitation",
        "non-local",
        "missing",
        "blocks",
        "grouped",
        "two heads",
        "shape",
        "not finite",
        "negative",
        "no deviation",
        "sparse",
        "outside",
    ],
)
def test_what_is_not_supported_is_named(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str) -> None:
    state = dict(TorchReid(R26, 8, 2, ibn=False).state_dict())
    with pytest.raises(ValueError, match=message):
        translate(change(state), 2, (MEAN, STD))


def test_what_is_not_used_may_have_any_values() -> None:
    state = TorchReid(R14, 8, 1, ibn=False).state_dict()
    state["classifier.weight"] = state["classifier.weight"] * torch.nan
    assert "classifier.weight" in translate(state, 1, (MEAN, STD)).left_out
    with pytest.raises(ValueError, match=r"more than one tensor conv1\.weight, with and without"):
        translate(state | {"module.conv1.weight": state["conv1.weight"]}, 1, (MEAN, STD))


def test_half_precision_is_loaded_as_float32() -> None:
    theirs = randomised(TorchReid(R14, 8, 1, ibn=False, fc_dim=24)).half()
    translation = translate(theirs.state_dict(), 1, (MEAN, STD))
    assert {tensor.dtype for tensor in translation.state.values()} == {torch.float32}
    theirs.double()
    with torch.no_grad():
        expected = theirs(normalised(PIXELS))
        torch.testing.assert_close(loaded(translation)(normalised(PIXELS)).embedding, expected, atol=1e-6, rtol=1e-5)


def test_pooling_without_a_tensor_may_be_given() -> None:
    theirs = randomised(FastReid(R14, 8, ibn=False))
    with torch.no_grad():
        theirs.heads.pool_layer.p.fill_(3.0)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "heads.pool_layer.p"}
    with torch.no_grad():
        expected = theirs.double()(255 * PIXELS)
        given = translate(state, 1, (MEAN, STD), pool="gem")
        torch.testing.assert_close(loaded(given)(normalised(PIXELS)).embedding, expected, atol=1e-6, rtol=1e-5)
    assert translate(state, 1, (MEAN, STD)).spec.pool == "average"
    with pytest.raises(ValueError, match="its pooling is a generalised mean, whose exponent is a tensor"):
        translate(theirs.state_dict(), 1, (MEAN, STD), pool="average")


def test_images_of_another_normalisation_follow_from_ours() -> None:
    mean, std = (torch.tensor(values).double() for values in ([0.5, 0.4, 0.3], [0.1, 0.2, 0.3]))
    given = relative_input((MEAN, STD), mean.tolist(), std.tolist(), bgr=True)
    assert given is not None
    net = RetrievalNet(ArchSpec.full(14, 8, 24).model_copy(update={"input": given})).double()
    assert net.adapter is not None
    expected = ((PIXELS - mean[:, None, None]) / std[:, None, None]).flip(1)
    torch.testing.assert_close(net.adapter(normalised(PIXELS)), expected, atol=1e-6, rtol=1e-6)
    assert relative_input((MEAN, STD), MEAN, STD) is None
    for restored, values in zip(normalisation_of((MEAN, STD), given), (mean, std), strict=True):
        torch.testing.assert_close(torch.tensor(restored).double(), values, atol=1e-6, rtol=1e-6)
    assert normalisation_of((MEAN, STD), None) == (MEAN, STD)
