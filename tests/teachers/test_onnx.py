"""ONNX files of any architecture as teachers: what they embed, what they cost, and which are refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from pipeline.data.augment import MEAN, STD, normalise
from pipeline.teachers import onnx_cost
from pipeline.teachers.checks import TeacherError
from pipeline.teachers.onnx_file import embedding_of, expectation, read_file, standardised
from pipeline.teachers.onnx_teacher import OnnxTeacher
from tests.models.test_resnet import counted_macs

PIXELS = torch.randint(0, 256, (5, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGENET = {"mean": MEAN, "std": STD, "bgr": False}


class Embedder(nn.Module):
    """A MobileNetV3 whose embedding is its pooled features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = torchvision.models.mobilenet_v3_small().features
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(dim=(2, 3))


class Bytes(nn.Module):
    """Takes uint8 (B, H, W, 3)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 3, 1, 2).float() / 255)


def exported(net: nn.Module, example: Tensor, batch: bool = True, sides: bool = False) -> bytes:
    axes = {0: torch.export.Dim.DYNAMIC} if batch else {}
    if sides:
        axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        net.eval(), (example,), dynamo=True, dynamic_shapes=(axes,), opset_version=18, verbose=False,
        input_names=["data"], output_names=["features"],
    )  # fmt: skip
    file = io.BytesIO()
    onnx.save(program.model_proto, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def mobile() -> Embedder:
    return Embedder().eval()


@pytest.fixture(scope="module")
def content(mobile: Embedder) -> bytes:
    return exported(mobile, torch.zeros(2, 3, 64, 48))


def teacher(content: bytes, size: tuple[int, int] = (64, 48), given: tuple[int, ...] = (), **kind: Any) -> OnnxTeacher:
    model = read_file(content, "a.onnx")
    expected = expectation(model, "a.onnx", given, image_size=size, **(IMAGENET | kind))
    whole = standardised(model, "a.onnx", expected, size, (MEAN, STD))
    onnx.checker.check_model(whole, full_check=True)
    return OnnxTeacher(whole.SerializeToString())


def agrees(teacher: OnnxTeacher, expected: Tensor) -> None:
    with torch.no_grad():
        embedding = teacher(normalise(PIXELS)).embedding
    torch.testing.assert_close(embedding, functional.normalize(expected), atol=2e-5, rtol=1e-3)


def test_a_file_embeds_as_the_network_that_was_exported(content: bytes, mobile: Embedder) -> None:
    with torch.no_grad():
        agrees(teacher(content), mobile(normalise(PIXELS)))


def test_mean_deviation_and_order_of_the_channels_are_those_of_the_file(content: bytes, mobile: Embedder) -> None:
    kind = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "bgr": True}
    mean, std = (torch.tensor(kind[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        agrees(teacher(content, **kind), mobile(((PIXELS / 255 - mean) / std).flip(1)))


def test_images_are_resized_to_the_size_of_the_file(mobile: Embedder) -> None:
    larger = functional.interpolate(normalise(PIXELS), (96, 72), mode="bilinear")
    with torch.no_grad():
        agrees(teacher(exported(mobile, torch.zeros(2, 3, 96, 72))), mobile(larger))


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_images_are_resized_by_older_operator_sets_too(opset: int) -> None:
    content = graph_of([value("x", ["n", 3, 99, 70])], [value("y", ["n", 3 * 99 * 70])], opset=opset)
    larger = functional.interpolate(normalise(PIXELS), (99, 70), mode="bilinear")
    agrees(teacher(content), larger.flatten(1))


def test_an_operator_set_that_is_too_old_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"a\.onnx has operator set 9; export it with 11 or later"):
        teacher(graph_of([IMAGES], [VECTORS], opset=9), size=(8, 8))


def test_a_file_of_any_size_takes_the_requested_one(mobile: Embedder) -> None:
    content = exported(mobile, torch.zeros(2, 3, 96, 72), sides=True)
    with torch.no_grad():
        agrees(teacher(content), mobile(normalise(PIXELS)))
        larger = functional.interpolate(normalise(PIXELS), (96, 72), mode="bilinear")
        agrees(teacher(content, given=(96, 72)), mobile(larger))


def test_a_file_of_bytes_in_channels_last_order(mobile: Embedder) -> None:
    content = exported(Bytes(mobile), torch.zeros(2, 64, 48, 3, dtype=torch.uint8))
    with torch.no_grad():
        agrees(teacher(content, mean=(0, 0, 0), std=(1 / 255,) * 3), mobile(PIXELS / 255))


def test_a_file_with_a_fixed_number_of_images_is_called_as_often_as_needed(mobile: Embedder) -> None:
    content = exported(mobile, torch.zeros(2, 3, 64, 48), batch=False)
    fixed = teacher(content)
    assert fixed.batch == 2
    with torch.no_grad():
        agrees(fixed, mobile(normalise(PIXELS)))


def test_logits_are_cosines_to_the_classifier_and_both_are_restored(content: bytes, tmp_path: Path) -> None:
    whole = teacher(content)
    assert whole(normalise(PIXELS)).logits is None
    with pytest.raises(ValueError, match="with its classifier"):
        whole.save(tmp_path)
    whole.classifier = functional.normalize(torch.randn(4, whole.embedding_dim), dim=1)
    whole.save(tmp_path)
    restored = OnnxTeacher.load(tmp_path)
    output = restored(normalise(PIXELS))
    expected = functional.normalize(output.embedding) @ whole.classifier.T
    torch.testing.assert_close(output.logits, expected)


def test_params_and_macs_are_counted_in_the_graph(content: bytes, mobile: Embedder) -> None:
    model = teacher(content).model()
    folded = sum(p.numel() for name, p in mobile.named_parameters())
    assert abs(onnx_cost.params(model) - folded) < 0.02 * folded  # exported norms are folded
    assert onnx_cost.macs(model) == counted_macs(mobile, (64, 48))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(48, 32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.mean(dim=1))
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1)


def test_a_transformer_is_counted_as_well() -> None:
    model = teacher(exported(Attention(), torch.zeros(2, 3, 64, 48))).model()
    projections, products = 64 * (48 * 32 + 4 * 32 * 32), 2 * 64 * 64 * 32
    assert onnx_cost.macs(model) == projections + products


def graph_of(inputs: list[Any], outputs: list[Any], node: str = "Flatten", opset: int = 18) -> bytes:
    graph = helper.make_graph([helper.make_node(node, ["x"], ["y"])], "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8).SerializeToString()


def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


IMAGES, VECTORS = value("x", ["n", 3, 8, 8]), value("y", ["n", 192])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"half", r"a\.onnx is not a valid ONNX file"),
        (lambda: graph_of([value("x", ["n", 192])], [VECTORS]), r"one input, of four dimensions, and has x \['n', 19"),
        (lambda: graph_of([value("x", ["n", 4, 8, 8])], [value("y", ["n", 256])]), "without a dimension of 3 channels"),
        (lambda: graph_of([value("x", ["n", 3, 8, 8], TensorProto.INT64)], [value("y", ["n", 192], TensorProto.INT64)]),
         "takes INT64; export it with an input of floats"),
        (lambda: graph_of([IMAGES], [value("y", ["n", 3, 8, 8])], "Relu"), r"must have one output \(batch, D\)"),
    ],
    ids=["no file", "vectors", "four channels", "integers", "maps"],
)  # fmt: skip
def test_a_file_that_is_no_embedder_is_refused(content: Callable[[], bytes], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        teacher(content())


def test_a_size_that_contradicts_the_file_is_refused(content: bytes) -> None:
    with pytest.raises(
        TeacherError, match=r"`teacher.input.size` is \[32, 32\], but a\.onnx takes images of \[64, 48\]"
    ):
        teacher(content, given=(32, 32))


def test_an_embedding_of_one_position_is_flattened() -> None:
    content = graph_of([IMAGES], [value("y", ["n", 3, 1, 1])], "GlobalAveragePool")
    assert embedding_of(read_file(content, "a.onnx"), "a.onnx") == ("y", 3, True)
    with torch.no_grad():
        embedding = teacher(content, size=(8, 8))(torch.rand(2, 3, 8, 8)).embedding
    assert embedding.shape == (2, 3)
    np.testing.assert_allclose(embedding.norm(dim=1), 1, rtol=1e-5)
