"""ONNX graphs with random weights, built from a spec, to measure latency, which depends on the widths only.

Batch norms are folded, as ONNX Runtime does with an exported network.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.inference.session import INPUT, OUTPUT
from pipeline.models.spec import EMBEDDING, ArchSpec, Layer
from pipeline.models.spec import INPUT as IMAGE

OPSET, IR = 18, 10


class _Graph:
    """The nodes and weights of a graph under construction."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
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
        for operator in operators:
            output = self.add(operator, [output], f"{layer.name}/{operator}")
        return output


def timing_graph(spec: ArchSpec, image_size: tuple[int, int]) -> bytes:
    """Return the content of an ONNX file with the layers of a spec, without indicators and classifier.

    Images have `image_size` (height, width). Each node is named ``LAYER/OPERATOR`` after its layer.
    """
    graph = _Graph({IMAGE: 3, EMBEDDING: spec.embedding_dim, **spec.widths})
    layers = {layer.name: layer for layer in spec.layers()}
    x = graph.convolution(layers["conv1"], INPUT, "Relu")
    x = graph.add("MaxPool", [x], "conv1/MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for block in filter(spec.has, spec.blocks()):
        names = [f"{block.name}.conv{number + 1}" for number in range(len(block.sites) + 1)]
        y = x
        for name in names[:-1]:
            y = graph.convolution(layers[name], y, "Relu")
        y = graph.convolution(layers[names[-1]], y)
        shortcut = graph.convolution(layers[f"{block.name}.downsample.0"], x) if block.shortcut else x
        x = graph.add("Relu", [graph.add("Add", [y, shortcut], f"{names[-1]}/Add")], f"{names[-1]}/Relu")
    channels = spec.widths["layer4"]
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x], "head.fc/Pool")], "head.fc/Flatten")
    x = graph.add("Mul", [x, graph.constant("head.scale", (channels,), 1.0)], "head.fc/Scale")
    x = graph.add("Add", [x, graph.constant("head.shift", (channels,), 1.0)], "head.fc/Shift")
    x = graph.add("Relu", [x], "head.fc/Relu")
    weight = graph.constant("head.fc.weight", (spec.embedding_dim, channels), 0.1)
    bias = graph.constant("head.fc.bias", (spec.embedding_dim,), 0.1)
    x = graph.add("Gemm", [x, weight, bias], "head.fc/Gemm", transB=1)
    graph.nodes.append(helper.make_node("LpNormalization", [x], [OUTPUT], name="head.fc/Normalize", axis=1, p=2))
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
