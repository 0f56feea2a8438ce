"""ONNX graphs with random weights, built from a spec, to measure latency, which depends on the widths only.

Batch norms are folded, as ONNX Runtime does with an exported network, but not those beside an instance norm.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.inference.session import INPUT, OUTPUT
from pipeline.models.spec import EMBEDDING, INSTANCE, LAST, ArchSpec, Layer
from pipeline.models.spec import INPUT as IMAGE

OPSET, IR = 18, 10

HEAD = Layer("head.fc", "head.bn2", LAST, EMBEDDING, 1, 1)
"""Pooling and head as a layer, whether it has a linear map or not."""


class _Graph:
    """The nodes and weights of a graph under construction."""

    def __init__(self, spec: ArchSpec) -> None:
        self.spec = spec
        self.sizes = {IMAGE: 3, EMBEDDING: spec.embedding_dim, **spec.widths}
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def add(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append a node, and return the name of its output, which is the name of the node."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, shape: tuple[int, ...], scale: float) -> str:
        """Append a normally distributed weight, and return its name."""
        values: npt.NDArray[np.float32] = self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def convolution(self, layer: Layer, source: str, *operators: str) -> str:
        """Append a convolution with a folded batch norm, then `operators`; all nodes are named after the layer."""
        channels, out, kernel = self.sizes[layer.source], self.sizes[layer.target], layer.kernel
        weight = self.constant(
            f"{layer.name}.weight", (out, channels, kernel, kernel), (2 / (channels * kernel**2)) ** 0.5
        )
        bias = self.constant(f"{layer.name}.bias", (out,), 0.1)
        output = self.add(
            "Conv", [source, weight, bias], f"{layer.name}/Conv",
            kernel_shape=[kernel] * 2, strides=[layer.stride] * 2, pads=[kernel // 2] * 4,
        )  # fmt: skip
        if layer.target in self.spec.instance_norms:
            output = self.split_norm(layer, output)
        for operator in operators:
            output = self.add(operator, [output], f"{layer.name}/{operator}")
        return output

    def split_norm(self, layer: Layer, source: str) -> str:
        """Append an instance norm of the first channels and a batch norm of the others."""
        parts = self.spec.norm_parts(layer)
        sizes = [part.stop - part.start for part in parts.values()]
        self.weights.append(numpy_helper.from_array(np.array(sizes, dtype=np.int64), f"{layer.name}/sizes"))
        pieces = [f"{norm}/Split" for norm in parts]
        self.nodes.append(
            helper.make_node("Split", [source, f"{layer.name}/sizes"], pieces, f"{layer.name}/Split", axis=1)
        )
        outputs = []
        for norm, piece, size in zip(parts, pieces, sizes, strict=True):
            kinds = ["scale", "shift"] if norm.endswith(INSTANCE) else ["scale", "shift", "mean"]
            values = [self.constant(f"{norm}/{kind}", (size,), 1.0) for kind in kinds]
            operator = "InstanceNormalization"
            if not norm.endswith(INSTANCE):
                operator = "BatchNormalization"
                self.weights.append(numpy_helper.from_array(np.ones(size, dtype=np.float32), f"{norm}/variance"))
                values.append(f"{norm}/variance")
            outputs.append(f"{norm}/output")
            self.nodes.append(helper.make_node(operator, [piece, *values], [outputs[-1]], f"{layer.name}/{operator}"))
        return self.add("Concat", outputs, f"{layer.name}/Concat", axis=1)

    def head(self, source: str) -> str:
        """Append pooling and the head, as the spec describes them, and return the name of the embedding."""
        channels, dim = self.spec.widths[LAST], self.spec.embedding_dim
        x, name = source, HEAD.name
        if self.spec.pool == "gem":
            values = {"least": 1e-6, "exponent": 3.0, "root": 1 / 3}
            for key, value in values.items():
                self.weights.append(numpy_helper.from_array(np.array(value, dtype=np.float32), f"{name}/{key}"))
            x = self.add(
                "Pow", [self.add("Clip", [x, f"{name}/least"], f"{name}/Clip"), f"{name}/exponent"], f"{name}/Pow"
            )
        x = self.add("Flatten", [self.add("GlobalAveragePool", [x], f"{name}/Pool")], f"{name}/Flatten")
        if self.spec.pool == "gem":
            x = self.add("Pow", [x, f"{name}/root"], f"{name}/Root")
        if self.spec.head in ("bn-relu-fc-bn", "bn"):
            x = self.add("Mul", [x, self.constant("head.scale", (channels,), 1.0)], f"{name}/Scale")
            x = self.add("Add", [x, self.constant("head.shift", (channels,), 1.0)], f"{name}/Shift")
        if self.spec.head == "bn-relu-fc-bn":
            x = self.add("Relu", [x], f"{name}/Relu")
        if self.spec.has_linear:
            parts = [self.constant(f"{name}.weight", (dim, channels), 0.1), self.constant(f"{name}.bias", (dim,), 0.1)]
            x = self.add("Gemm", [x, *parts], f"{name}/Gemm", transB=1)
        return self.add("Relu", [x], f"{name}/Last") if self.spec.head.endswith("relu") else x


def timing_graph(spec: ArchSpec, image_size: tuple[int, int]) -> bytes:
    """Return the content of an ONNX file with the layers of a spec, without indicators and classifier.

    Images have `image_size` (height, width). Each node is named ``LAYER/OPERATOR`` after its layer.
    """
    graph = _Graph(spec)
    layers = {layer.name: layer for layer in spec.layers()}
    image = INPUT
    if spec.input is not None:
        image = graph.add("Mul", [image, graph.constant("input.scale", (3, 1, 1), 1.0)], "conv1/Scale")
        image = graph.add("Add", [image, graph.constant("input.shift", (3, 1, 1), 1.0)], "conv1/Shift")
    x = graph.convolution(layers["conv1"], image, "Relu")
    border = {"pads": [1, 1, 1, 1]} if spec.max_pool == "padded" else {"ceil_mode": 1}
    x = graph.add("MaxPool", [x], "conv1/MaxPool", kernel_shape=[3, 3], strides=[2, 2], **border)
    for block in filter(spec.has, spec.blocks()):
        names = [f"{block.name}.conv{number + 1}" for number in range(len(block.sites) + 1)]
        y = x
        for name in names[:-1]:
            y = graph.convolution(layers[name], y, "Relu")
        y = graph.convolution(layers[names[-1]], y)
        shortcut = graph.convolution(layers[f"{block.name}.downsample.0"], x) if block.shortcut else x
        x = graph.add("Relu", [graph.add("Add", [y, shortcut], f"{names[-1]}/Add")], f"{names[-1]}/Relu")
    x = graph.head(x)
    graph.nodes.append(helper.make_node("LpNormalization", [x], [OUTPUT], name=f"{HEAD.name}/Normalize", axis=1, p=2))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes, "timing",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, *image_size])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", spec.embedding_dim])],
            initializer=graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR,
    )  # fmt: skip
    return bytes(model.SerializeToString())
