"""The ONNX file of a teacher, rewritten so that it takes the images of every other file here.

The rewritten file takes float32 (batch, 3, height, width) of `data.image_size`, normalised with ImageNet's statistics,
and returns L2-normalised embeddings. What the original expects is computed inside of the graph: other normalisation,
order of channels, layout, type and size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.data.augment import MEAN, STD
from pipeline.inference.session import INPUT, OUTPUT
from pipeline.teachers.checks import Preprocessing, TeacherError
from pipeline.teachers.onnx_file import embedding_of, graphs_of, images_of, shape_of

PREFIX = "given/"
"""In front of the names of the original's nodes and tensors, which might be those that are added."""

OLDEST_OPSET, RESIZES_AXES = 11, 18
"""The first operator sets whose `Resize` works as needed here, and resizes single axes, with antialiasing."""


UNLISTED_WEIGHTS = 4
"""The first IR version in which weights need not be inputs of the graph."""


@dataclass(frozen=True)
class Expected:
    """The images that a file expects.

    Attributes:
        size: Height and width, pixels.
        preprocessing: Normalisation and order of the channels.
        channels_last: Whether the layout is (batch, height, width, channels).
        type: ONNX's number of the element type.
    """

    size: tuple[int, int]
    preprocessing: Preprocessing
    channels_last: bool
    type: int


def expectation(
    model: onnx.ModelProto,
    name: str,
    preprocessing: Preprocessing,
    image_size: tuple[int, int],
    size: Sequence[int] = (),
    layout: str = "auto",
) -> Expected:
    """Return what a file expects: type and size by its input, the rest as given.

    Args:
        image_size: Height and width of this project's images.
        size: Height and width; empty for those of the file's input, or `image_size` if they may vary.
        layout: `channels-first`, `channels-last`, or `auto` for the one in which the input has 3 channels.

    Raises:
        TeacherError: If the input contradicts `size`, or has no dimension for three channels.
    """
    (value,) = images_of(model)
    shape = shape_of(value)
    channels_last = layout == "channels-last" or (layout == "auto" and shape[1] != 3 and shape[3] == 3)
    channels = shape[3 if channels_last else 1]
    if channels != 3 and isinstance(channels, int):
        raise TeacherError(f"{name} takes images of the shape {shape}, without a dimension of 3 channels")
    sides = shape[1:3] if channels_last else shape[2:4]
    height, width = (
        side if isinstance(side, int) and side > 0 else wanted
        for side, wanted in zip(sides, size or image_size, strict=True)
    )
    if size and (height, width) != tuple(size):
        raise TeacherError(
            f"`teacher.input.size` is {list(size)}, but {name} takes images of {[height, width]}; set it to [] or to "
            "those"
        )
    kind = value.type.tensor_type.elem_type
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8):
        raise TeacherError(
            f"{name} takes images of the type {TensorProto.DataType.Name(kind)}; export it with float32, float16 or "
            "uint8"
        )
    return Expected((height, width), preprocessing, channels_last, kind)


def standardised(
    model: onnx.ModelProto,
    name: str,
    expected: Expected,
    image_size: tuple[int, int],
) -> onnx.ModelProto:
    """Return the same network with the input and output of this project's files.

    Args:
        model: See `read_file`.
        image_size: Height and width of this project's images.

    Raises:
        TeacherError: If it has no embedding, or its operator set is too old.
    """
    output, length, flatten = embedding_of(model, name)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < OLDEST_OPSET:
        raise TeacherError(f"{name} has operator set {opset or 'none'} of ONNX; export it with {OLDEST_OPSET} or later")
    result = _prefixed(model)
    result.ir_version = max(result.ir_version, UNLISTED_WEIGHTS)
    graph = result.graph
    del graph.value_info[:]  # notes of the exporter, which may be outdated
    (given,) = images_of(result)
    batch = shape_of(given)[0]
    before = _before(expected, image_size, opset)
    after = [_Step("Flatten")] * flatten + [_Step("Cast", to=TensorProto.FLOAT), _Step("LpNormalization", axis=1, p=2)]
    nodes = [
        *_chain(before, INPUT, given.name, "before", graph),
        *graph.node,
        *_chain(after, PREFIX + output, OUTPUT, "after", graph),
    ]
    for field in (graph.node, graph.input, graph.output):
        del field[:]
    graph.node.extend(nodes)
    count = batch if isinstance(batch, int) and batch > 0 else "batch"
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [count, 3, *image_size]))
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [count, length]))
    return result


def _prefixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same model with `PREFIX` in front of the names of all values.

    `onnx.compose.add_prefix` leaves weights as they are that branches and loops use from outside.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _add_prefix(result.graph)
    return result


def _add_prefix(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = PREFIX + value.name
    for sparse in graph.sparse_initializer:
        sparse.values.name = PREFIX + sparse.values.name
    del graph.quantization_annotation[:]  # notes of the exporter
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [name and PREFIX + name for name in names]  # an empty name: the input is left out
        node.name = node.name and PREFIX + node.name
        for attribute in node.attribute:
            for inner in graphs_of(attribute):
                _add_prefix(inner)


class _Step:
    """A node of a chain: its operator, further inputs by name, and attributes."""

    def __init__(
        self, operator: str, inputs: Mapping[str, npt.NDArray[Any] | None] | None = None, **attributes: Any
    ) -> None:
        self.operator, self.inputs, self.attributes = operator, inputs or {}, attributes


def _before(expected: Expected, image_size: tuple[int, int], opset: int) -> list[_Step]:
    """Return the steps from this project's images to those that a file expects."""
    kind = expected.preprocessing
    mean, std, their_mean, their_std = (
        np.array(values, np.float64)[:, None, None] for values in (MEAN, STD, kind.mean, kind.std)
    )
    steps = []
    if expected.size != image_size and opset >= RESIZES_AXES:
        sizes = {"roi": None, "scales": None, "sizes": np.array(expected.size, np.int64)}
        steps.append(_Step("Resize", sizes, mode="linear", axes=[2, 3], antialias=1, exclude_outside=1))
    elif expected.size != image_size:
        ratios = [after / before * (1 + 1e-6) for after, before in zip(expected.size, image_size, strict=True)]
        steps.append(
            _Step(
                "Resize",
                {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, *ratios], np.float32)},
                mode="linear",
            )
        )
    steps += [
        _Step("Mul", {"scale": (std / their_std).astype(np.float32)}),
        _Step("Add", {"shift": ((mean - their_mean) / their_std).astype(np.float32)}),
    ]
    if kind.bgr:
        steps.append(_Step("Gather", {"order": np.array([2, 1, 0])}, axis=1))
    if expected.channels_last:
        steps.append(_Step("Transpose", perm=[0, 2, 3, 1]))
    if expected.type == TensorProto.UINT8:
        steps += [_Step("Round"), _Step("Clip", {"least": np.array(0, np.float32), "most": np.array(255, np.float32)})]
    return [*steps, _Step("Cast", to=expected.type)]


def _chain(steps: Sequence[_Step], first: str, last: str, name: str, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return nodes that lead from the tensor `first` to the tensor `last`, and add their constants to the graph."""
    nodes, source = [], first
    for number, step in enumerate(steps):
        label = f"{name}/{number}/{step.operator}"
        inputs = [source]
        for key, value in step.inputs.items():
            inputs.append("" if value is None else f"{label}/{key}")
            if value is not None:
                graph.initializer.append(numpy_helper.from_array(np.asarray(value), inputs[-1]))
        target = last if number == len(steps) - 1 else label
        nodes.append(helper.make_node(step.operator, inputs, [target], name=label, **step.attributes))
        source = target
    return nodes
