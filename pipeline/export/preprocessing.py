"""Preprocessing as part of the ONNX graph: users pass raw images and cannot resize or normalise them incorrectly.

The graph resizes uint8 images with antialiasing, like Pillow's bilinear filter; pixels differ by at most one level.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.export.embed import PerChannel, scale_to_255
from pipeline.export.runtimes import fixed_dimension
from pipeline.inference.session import INPUT

NORMALISED = "preprocess/normalised"


def add_preprocessing(
    core: onnx.ModelProto, image_size: tuple[int, int], mean: PerChannel, std: PerChannel
) -> onnx.ModelProto:
    """Return a copy of a model with resizing and normalisation in front.

    The core has float input (n, 3, h, w), where (h, w) is `image_size`; the result has uint8 input
    (n, height, width, 3), RGB, of any height and width. The number of images n is fixed if the core's is.
    """
    constants: dict[str, npt.NDArray[Any]] = {
        "size": np.array(image_size, np.int64),
        "mean": scale_to_255(mean),
        "std": scale_to_255(std),
    }
    nodes = [
        # Resize comes before Transpose: ONNX Runtime resizes uint8 with antialiasing only in channels-last order.
        # Without `exclude_outside`, pixels at the border are weighted again where the filter reaches beyond the image.
        _node("Resize", [INPUT, "", "", "preprocess/size"], "resized", mode="linear", antialias=1, axes=[1, 2],
              coordinate_transformation_mode="half_pixel", exclude_outside=1),
        _node("Transpose", ["preprocess/resized"], "channels", perm=[0, 3, 1, 2]),
        _node("Cast", ["preprocess/channels"], "floats", to=TensorProto.FLOAT),
        _node("Sub", ["preprocess/floats", "preprocess/mean"], "centred"),
        _node("Div", ["preprocess/centred", "preprocess/std"], "normalised"),
    ]  # fmt: skip
    model = onnx.ModelProto()
    model.CopyFrom(core)
    for node in model.graph.node:
        node.input[:] = [NORMALISED if name == INPUT else name for name in node.input]
    core_nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + core_nodes)
    model.graph.initializer.extend(numpy_helper.from_array(v, f"preprocess/{name}") for name, v in constants.items())
    batch = fixed_dimension(core) or "batch"
    del model.graph.input[:]
    shape: list[str | int | None] = [batch, "height", "width", 3]
    model.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape))
    return model


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [f"preprocess/{output}"], name=f"preprocess/{operator}", **attributes)
