"""Parameters and multiply-accumulates of a given ONNX file, counted in its graph."""

import math

import onnx
from onnx import TensorProto

from pipeline.teachers.onnx_file import graph_tensors, node_tensors
from pipeline.teachers.onnx_rewriting import PREFIX

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
    """Return the number of weights, floating-point or quantised; without the nodes that `onnx_rewriting` adds.

    Those of branches, loops and local functions count once.
    """
    constants = [tensor for name, tensor in graph_tensors(model.graph) if name.startswith(PREFIX)]
    for function in model.functions:
        constants += [tensor for name, tensor in node_tensors(function.node) if name]
    return sum(math.prod(tensor.dims) for tensor in constants if tensor.data_type in WEIGHTS)


def macs(model: onnx.ModelProto) -> int | None:
    """Return the multiply-accumulates of convolutions and matrix products for one image.

    Products of constants count as well, although a runtime computes them once.

    Returns:
        None if a shape is unknown, or an operator might compute something that is not counted.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    batch = fixed.graph.input[0].type.tensor_type.shape.dim[0]
    images = batch.dim_value or 1  # files for a fixed number have it in constants too
    batch.dim_value = images
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
        if not (left and right and out):
            return None
        if node.op_type in CONVOLUTIONS:  # (out, in / groups, height, width)
            product = math.prod(out) * math.prod(right[1:])
        else:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            product = math.prod(out) * (left[0] if transposed else left[-1])
        if not product:  # a dimension is not known
            return None
        total += product
    return total // images
