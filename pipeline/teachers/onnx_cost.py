"""Parameters and multiply-accumulates of a given ONNX file, counted in its graph."""

import math
from collections.abc import Iterator

import onnx
from onnx import TensorProto

from pipeline.teachers.onnx_file import PREFIX

WEIGHTS = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE),
    *(TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32),  # int32: biases of quantised networks
)
"""Types of weights; shapes and indices are int64."""

CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
PRODUCTS = {"MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "QLinearMatMul": 3}
"""Operators, and the position of the second factor among their inputs."""

UNCOUNTED = ("Attention", "ConvTranspose", "DeformConv", "Einsum", "GRU", "LSTM", "RNN")
"""Operators that compute as much, and are not counted."""


def params(model: onnx.ModelProto) -> int:
    """Return the number of weights, floating-point or quantised; without the nodes that `onnx_file` adds."""
    return sum(math.prod(tensor.dims) for tensor in _constants(model) if tensor.data_type in WEIGHTS)


def _constants(model: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from (tensor for tensor in model.graph.initializer if tensor.name.startswith(PREFIX))
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0].startswith(PREFIX):
            yield from (attribute.t for attribute in node.attribute if attribute.name == "value")


def macs(model: onnx.ModelProto) -> int | None:
    """Return the multiply-accumulates of convolutions and matrix products for one image.

    Returns:
        None if a shape is unknown, or an operator might compute something that is not counted.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.shape.Clear()
    try:
        graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        return None
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = [entry.dim_value for entry in value.type.tensor_type.shape.dim]
    total = 0
    for node in graph.node:
        subgraph = any(attribute.HasField("g") for attribute in node.attribute)
        if subgraph or node.domain not in ("", "ai.onnx") or node.op_type in UNCOUNTED:
            return None
        second = {**CONVOLUTIONS, **PRODUCTS}.get(node.op_type)
        if second is None:
            continue
        left, right, out = (shapes.get(name, []) for name in (node.input[0], node.input[second], node.output[0]))
        if not (left and right and out and all(out)):
            return None
        if node.op_type in CONVOLUTIONS:  # (out, in / groups, height, width)
            total += math.prod(out) * math.prod(right[1:])
        else:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            total += math.prod(out) * (left[0] if transposed else left[-1])
    return total
