"""Parameters and multiply-accumulates of an ONNX file, counted in its graph."""

import math

import onnx

MATRIX_PRODUCTS = ("MatMul", "Gemm")


def params(model: onnx.ModelProto) -> int:
    """Return the number of floating-point numbers among the weights."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
    return sum(math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in floats)


def macs(model: onnx.ModelProto) -> int | None:
    """Return the multiply-accumulates of convolutions and matrix products for one image.

    Returns:
        None if a shape is unknown, or a subgraph might compute something.
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
        if any(attribute.HasField("g") for attribute in node.attribute):
            return None
        if node.op_type not in ("Conv", *MATRIX_PRODUCTS):
            continue
        left, right, out = (shapes.get(name, []) for name in (node.input[0], node.input[1], node.output[0]))
        if not (left and right and out and all(out)):
            return None
        if node.op_type == "Conv":  # (out, in / groups, height, width)
            total += math.prod(out) * math.prod(right[1:])
        else:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            total += math.prod(out) * (left[0] if transposed else left[-1])
    return total
