"""A file that takes pictures as they are: nobody who runs it can resize or normalise otherwise than it was trained.

Resizing works on bytes and antialiases as Pillow's bilinear filter does, so that both give nearly the same pixels.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.export.embed import Colour, scaled
from pipeline.inference.session import INPUT

NORMALISED = "preprocess/normalised"


def all_in_one(core: onnx.ModelProto, image_size: tuple[int, int], mean: Colour, std: Colour) -> onnx.ModelProto:
    """Put preprocessing before a network.

    Args:
        core: Takes normalised floats (n, 3, h, w); left as it is.
        image_size: Its height and width, pixels.
        mean: By channel (RGB), of pixels in [0, 1].
        std: Likewise.

    Returns:
        The same from uint8 (n, height, width, 3), RGB, of any height and width.
    """
    constants: dict[str, npt.NDArray[Any]] = {
        "size": np.array(image_size, np.int64),
        "mean": scaled(mean),
        "std": scaled(std),
    }
    nodes = [
        # While channels come last: ONNX Runtime's resizing of bytes knows no other order.
        _node("Resize", [INPUT, "", "", "preprocess/size"], "resized", mode="linear", antialias=1, axes=[1, 2],
              coordinate_transformation_mode="half_pixel"),
        _node("Transpose", ["preprocess/resized"], "channels", perm=[0, 3, 1, 2]),
        _node("Cast", ["preprocess/channels"], "floats", to=TensorProto.FLOAT),
        _node("Sub", ["preprocess/floats", "preprocess/mean"], "centred"),
        _node("Div", ["preprocess/centred", "preprocess/std"], "normalised"),
    ]  # fmt: skip
    model = onnx.ModelProto()
    model.CopyFrom(core)
    for node in model.graph.node:
        node.input[:] = [NORMALISED if name == INPUT else name for name in node.input]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + rest)
    model.graph.initializer.extend(numpy_helper.from_array(v, f"preprocess/{name}") for name, v in constants.items())
    del model.graph.input[:]
    shape: list[str | int | None] = ["batch", "height", "width", 3]
    model.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape))
    return model


def _node(operator: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [f"preprocess/{output}"], name=f"preprocess/{operator}", **attributes)
