"""ONNX files of any architecture as teachers: what they embed, what they cost, and which are refused."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import Params
from pipeline.data.augment import MEAN, STD, normalise
from pipeline.export.metadata import Metadata, finish
from pipeline.stage.presets import load_preset
from pipeline.teachers import onnx_cost
from pipeline.teachers.checks import Preprocessing, TeacherError
from pipeline.teachers.given import check_batches, unchecked_teacher
from pipeline.teachers.onnx_file import embedding_of, graph_tensors, normalisation_of, read_file
from pipeline.teachers.onnx_rewriting import expectation, standardised
from pipeline.teachers.onnx_teacher import OnnxTeacher
from tests.imports import ROOT
from tests.models.test_resnet import counted_macs

PIXELS = torch.randint(0, 256, (5, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGENET = Preprocessing(MEAN, STD)


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


@pytest.fixture
def metadata() -> Metadata:
    texts = dict.fromkeys(("data", "data_digest", "params_digest", "git_commit", "licence", "protocol"), "x")
    return Metadata(**texts, map=0.5, image_size=(64, 48), mean=MEAN, std=STD, embedding_dim=576, params=1, macs=None)


@pytest.fixture(scope="module")
def content(mobile: Embedder) -> bytes:
    return exported(mobile, torch.zeros(2, 3, 64, 48))


def teacher(content: bytes, size: tuple[int, int] = (64, 48), given: tuple[int, ...] = (), **kind: Any) -> OnnxTeacher:
    model = read_file(content, "a.onnx")
    expected = expectation(model, "a.onnx", replace(IMAGENET, **kind), size, given)
    whole = standardised(model, "a.onnx", expected, size)
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
    with pytest.raises(TeacherError, match=r"a\.onnx has operator set 9 of ONNX; export it with 11 or later"):
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


def test_a_file_of_bytes_gets_pixels_in_bytes_by_default() -> None:
    content = graph_of([value("x", ["n", 3, 8, 8], TensorProto.UINT8)], [value("y", ["n", 192])], "Flatten")
    assert normalisation_of(onnx.load_from_string(content)) == ((0, 0, 0), (1 / 255,) * 3)
    assert normalisation_of(onnx.load_from_string(graph_of([IMAGES], [VECTORS]))) == (MEAN, STD)


def test_the_layout_may_be_given_and_one_side_fixed() -> None:
    def expected(shape: list[Any], layout: str = "auto", size: tuple[int, ...] = ()) -> tuple[tuple[int, int], bool]:
        model = read_file(graph_of([value("x", shape)], [value("y", ["n", "d"])]), "a.onnx")
        found = expectation(model, "a.onnx", IMAGENET, (64, 48), size, layout)
        return found.size, found.channels_last

    assert expected(["n", "h", "w", "c"], "channels-last") == ((64, 48), True)
    assert expected(["n", "c", "h", "w"]) == ((64, 48), False)
    assert expected(["n", 3, 16, "w"]) == ((16, 48), False)
    assert expected(["n", 3, 16, "w"], size=(16, 20)) == ((16, 20), False)
    with pytest.raises(
        TeacherError, match=r"`teacher\.input\.size` is \[32, 20\], but a\.onnx takes images of \[16, 20\]"
    ):
        expected(["n", 3, 16, "w"], size=(32, 20))
    with pytest.raises(TeacherError, match="without a dimension of 3 channels"):
        expected(["n", 3, 16, 16], "channels-last")


def test_weights_in_another_file_are_read_or_named(mobile: Embedder, tmp_path: Path) -> None:
    model = onnx.load_from_string(exported(mobile, torch.zeros(2, 3, 64, 48)))
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    content = (tmp_path / "a.onnx").read_bytes()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.data").symlink_to(tmp_path / "a.data")  # as DVC may put them in place of files
    for folders in ([tmp_path], [tmp_path / "links"], [tmp_path / "nowhere", tmp_path]):
        read = read_file(content, "a.onnx", *folders)
        assert sum(len(tensor.raw_data) for tensor in read.graph.initializer) > 10**6
    (tmp_path / "a.data").unlink()
    with pytest.raises(TeacherError, match=r"a\.onnx has its weights in a\.data, which cannot be read; put them into"):
        read_file(content, "a.onnx", tmp_path)
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
        entry.value = "../a.data" if entry.key == "location" else entry.value
    (tmp_path.parent / "a.data").write_bytes(b"secret")
    with pytest.raises(TeacherError, match=r"a\.onnx has its weights in \.\./a\.data, which cannot be read"):
        read_file(model.SerializeToString(), "a.onnx", tmp_path)


def test_a_file_whose_embeddings_depend_on_the_batch_is_refused(content: bytes) -> None:
    check_batches(teacher(content), "a.onnx", normalise(PIXELS))
    mean = helper.make_node("ReduceMean", ["f"], ["m"], axes=[0], keepdims=1)
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), mean, helper.make_node("Sub", ["f", "m"], ["s"])]
    nodes.append(helper.make_node("Add", ["s", "f"], ["y"]))
    graph = helper.make_graph(nodes, "g", [IMAGES], [VECTORS])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with pytest.raises(
        TeacherError, match=r"in a batch of 3 and alone with a cosine of .*, below 0\.99999: export it wi"
    ):
        check_batches(teacher(model.SerializeToString(), size=(8, 8)), "a.onnx", torch.randn(3, 3, 8, 8))


@pytest.mark.parametrize("node", ["Sub", "Div", "RandomNormalLike"])
def test_a_file_of_zeros_of_nothing_finite_or_of_random_numbers_is_refused(node: str) -> None:
    inputs = ["x"] if node == "RandomNormalLike" else ["x", "x"]
    nodes = [helper.make_node(node, inputs, ["z"]), helper.make_node("Flatten", ["z"], ["y"])]
    if node == "Div":
        nodes = [helper.make_node("Sub", ["x", "x"], ["w"]), helper.make_node("Div", ["w", "w"], ["z"]), nodes[1]]
    graph = helper.make_graph(nodes, "g", [IMAGES], [VECTORS])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    message = "without random operators" if node == "RandomNormalLike" else "embeds an image as zeros, or as values"
    with pytest.raises(TeacherError, match=message):
        check_batches(teacher(model.SerializeToString(), size=(8, 8)), "a.onnx", torch.rand(3, 3, 8, 8))


def test_a_file_that_joins_the_embeddings_of_its_images_is_refused() -> None:
    shape = onnx.numpy_helper.from_array(np.array([1, -1]), "shape")
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "g", [IMAGES], [VECTORS], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with pytest.raises(TeacherError, match=r"returns \(1, 576\) for 3 images instead of \(3, 192\); export it with"):
        check_batches(teacher(model.SerializeToString(), size=(8, 8)), "a.onnx", torch.rand(3, 3, 8, 8))


def test_outdated_notes_of_shapes_and_operators_of_other_domains_are_allowed(
    content: bytes, metadata: Metadata
) -> None:
    model = onnx.load_from_string(content)
    model.graph.value_info.append(value(model.graph.node[0].output[0], [1, 2, 3]))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    given = teacher(model.SerializeToString())
    check_batches(given, "a.onnx", normalise(PIXELS))
    finish(given.model(), metadata)


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


def test_quantised_weights_are_counted_and_unknown_operators_are_not_guessed(content: bytes, tmp_path: Path) -> None:
    plain, path = teacher(content).model(), tmp_path / "a.onnx"
    path.write_bytes(content)
    quantize_dynamic(path, tmp_path / "b.onnx", weight_type=QuantType.QUInt8)
    quantised = teacher((tmp_path / "b.onnx").read_bytes()).model()
    assert onnx_cost.params(quantised) == pytest.approx(onnx_cost.params(plain), rel=0.02)
    assert onnx_cost.macs(quantised) == onnx_cost.macs(plain)
    plain.graph.node[-1].domain = "com.microsoft"
    assert onnx_cost.macs(plain) is None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(48, 32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.mean(dim=1))
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1)


def test_a_transformer_is_counted_as_well() -> None:
    projections, products = 64 * (48 * 32 + 4 * 32 * 32), 2 * 64 * 64 * 32
    for variable in (True, False):
        model = teacher(exported(Attention(), torch.zeros(2, 3, 64, 48), batch=variable)).model()
        assert onnx_cost.macs(model) == projections + products


def test_weights_that_a_branch_uses_from_outside_are_found_and_counted(tmp_path: Path) -> None:
    """One of them has the name of the rewritten file's input."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((192, 4)).astype(np.float32) for name in ("image", "other")}
    inner = onnx.numpy_helper.from_array(weights["other"], "other")
    branches = {
        f"{side}_branch": helper.make_graph(
            [helper.make_node("MatMul", ["f", name], [f"{side}/y"])],
            side,
            [],
            [value(f"{side}/y", ["n", 4])],
            constants,
        )
        for side, name, constants in (("then", "image", []), ("else", "other", [inner]))
    }
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("If", ["condition"], ["y"], **branches)]
    for condition, name in ((True, "image"), (False, "other")):
        outer = [
            onnx.numpy_helper.from_array(weights["image"], "image"),
            onnx.numpy_helper.from_array(np.array(condition), "condition"),
        ]
        graph = helper.make_graph(nodes, "g", [IMAGES], [value("y", ["n", 4])], outer)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        whole = model.SerializeToString()  # `save` moves the weights out of the model
        onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0)
        read = read_file((tmp_path / "b.onnx").read_bytes(), "b.onnx", tmp_path)
        values = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in graph_tensors(read.graph)}
        assert all(np.array_equal(values[key], weights[key]) for key in weights)
        given = teacher(whole, size=(8, 8))
        images = torch.rand(3, 3, 8, 8)
        expected = functional.normalize(images.flatten(1) @ torch.from_numpy(weights[name]))
        torch.testing.assert_close(given(images).embedding, expected, atol=2e-5, rtol=1e-3)
        assert onnx_cost.params(given.model()) == 2 * 192 * 4
        assert onnx_cost.macs(given.model()) is None


def test_macs_are_unknown_if_a_factor_is() -> None:
    ends = onnx.numpy_helper.from_array(np.array([0]), "zero")
    weight = onnx.numpy_helper.from_array(np.ones((192, 4), np.float32), "w")
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("NonZero", ["f"], ["positions"]),  # as many as there happen to be
        helper.make_node("Cast", ["positions"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["floats", "g"], ["z"]),
        helper.make_node("Transpose", ["floats"], ["g"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    nodes[3], nodes[4] = nodes[4], nodes[3]
    graph = helper.make_graph(nodes, "g", [IMAGES], [value("y", ["n", 4])], [weight, ends])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert onnx_cost.macs(teacher(model.SerializeToString(), size=(8, 8)).model()) is None


def test_weights_that_are_inputs_too_are_weights() -> None:
    weight = onnx.numpy_helper.from_array(np.ones((192, 4), np.float32), "w")
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", [IMAGES, value("w", [192, 4])], [value("y", ["n", 4])], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=3)
    assert teacher(model.SerializeToString(), size=(8, 8))(torch.rand(2, 3, 8, 8)).embedding.shape == (2, 4)


def test_images_are_made_smaller_with_antialiasing_and_bytes_are_rounded(mobile: Embedder) -> None:
    content = graph_of([value("x", ["n", 3, 16, 12])], [value("y", ["n", 3 * 16 * 12])])
    smaller = functional.interpolate(normalise(PIXELS), (16, 12), mode="bilinear", antialias=True)
    agrees(teacher(content), smaller.flatten(1))
    cast = [helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT), helper.make_node("Flatten", ["c"], ["y"])]
    graph = helper.make_graph(cast, "g", [value("x", ["n", 3, 64, 48], TensorProto.UINT8)], [value("y", ["n", 9216])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    given = teacher(model.SerializeToString(), mean=(0, 0, 0), std=(1 / 255,) * 3)
    agrees(given, PIXELS.float().flatten(1))
    beyond = normalise(PIXELS) * 3  # a resized image may leave the range of bytes
    back = ((beyond * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255).round().clamp(0, 255)
    torch.testing.assert_close(given(beyond).embedding, functional.normalize(back.flatten(1)), atol=1e-4, rtol=1e-2)


def test_metadata_in_bytes_are_divided() -> None:
    model = onnx.load_from_string(graph_of([IMAGES], [VECTORS]))
    onnx.helper.set_model_props(model, {"mean": "[127.5, 127.5, 127.5]", "std": "[51, 102, 127.5]"})
    assert normalisation_of(model) == ((0.5, 0.5, 0.5), (0.2, 0.4, 0.5))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Flatten(), "has no weights, so there is nothing to compress"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(192, 4)),
            r"takes exactly 2 images in .* `benchmark.batches` to \[2\]",
        ),
    ],
    ids=["no weights", "fixed number"],
)
def test_what_the_pipeline_cannot_use_is_refused(tmp_path: Path, net: nn.Module, message: str) -> None:
    (tmp_path / "a.onnx").write_bytes(exported(net, torch.zeros(2, 3, 8, 8), batch=isinstance(net, nn.Flatten)))
    content = load_preset(ROOT, "smoke").model_dump()
    content["data"]["image_size"] = [16, 16]
    content["teacher"] |= {"source": "onnx", "weights": str(tmp_path / "a.onnx")}
    content["student"] |= {"init": "random", "architecture": content["student"]["architecture"] | {"depth": 14}}
    content["student"]["distill"]["feature"] = 0.0
    with pytest.raises(TeacherError, match=message):
        unchecked_teacher(Params.model_validate(content), 5)


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
         "takes images of the type INT64; export it with float32, float16 or uint8"),
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
