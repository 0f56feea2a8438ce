"""An ONNX file of any architecture as a teacher: rewritten so that it takes the images of every other file here.

The rewritten file takes float32 (batch, 3, height, width) of `data.image_size`, normalised with ImageNet's statistics,
and returns L2-normalised embeddings. What the original expects is computed inside of the graph: other normalisation,
order of channels, layout, type and size.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.data.augment import MEAN, STD
from pipeline.inference.session import INPUT, OUTPUT
from pipeline.teachers.checks import TeacherError

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
        mean: Subtracted from pixels in [0, 1], in the order red, green, blue.
        std: The difference is divided by it.
        bgr: Whether the channels stand in the order blue, green, red.
        channels_last: Whether the layout is (batch, height, width, channels).
        type: ONNX's number of the element type.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    bgr: bool
    channels_last: bool
    type: int


def read_file(content: bytes, name: str, *folders: Path) -> onnx.ModelProto:
    """Read an ONNX file and check it.

    Args:
        folders: Where its weights may be in other files.

    Raises:
        TeacherError: If it is not a valid ONNX file with one input of images.
    """
    try:
        model = onnx.load_from_string(content)
        _load_external(model, folders)
        onnx.checker.check_model(model)
    except (FileNotFoundError, onnx.checker.ValidationError) as error:
        if others := sorted(set(_external_files(model))):
            raise TeacherError(
                f"{name} has its weights in {', '.join(others)}, which cannot be read; put them into the same folder"
            ) from error
        raise TeacherError(f"{name} is not a valid ONNX file ({_first_line(error)}); export it again") from error
    except Exception as error:  # protobuf and onnx raise different ones
        raise TeacherError(f"{name} is not a valid ONNX file ({_first_line(error)}); export it again") from error
    inputs = images_of(model)
    if len(inputs) != 1 or len(shape_of(inputs[0])) != 4:
        found = ", ".join(f"{value.name} {shape_of(value)}" for value in inputs) or "none"
        raise TeacherError(
            f"{name} must have one input, of four dimensions, and has {found}; export it with images only"
        )
    return model


def _load_external(model: onnx.ModelProto, folders: Sequence[Path]) -> None:
    """Read the weights of a model that are in other files.

    onnx refuses links, which DVC may put in place of a file; so copies are read.

    Raises:
        FileNotFoundError: If there is no such file.
        onnx.checker.ValidationError: If a path leads out of the folders.
    """
    names = set(_external_files(model))
    if not names:
        return
    with tempfile.TemporaryDirectory() as copies:
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise onnx.checker.ValidationError(f"its weights are in {name}, which is not in the same folder")
            (Path(copies) / name).parent.mkdir(parents=True, exist_ok=True)
            found = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if found is None:
                raise FileNotFoundError(name)
            shutil.copyfile(found, Path(copies) / name)
        onnx.load_external_data_for_model(model, copies)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _external_files(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the names of the files that hold weights of a model."""
    for _, tensor in graph_tensors(model.graph):
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def graph_tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield names and values of the constants of a graph and of its branches and loops; see `node_tensors`."""
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    yield from node_tensors(graph.node)


def node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, TensorProto]]:
    """Yield names and values of constants in nodes; an attribute of another node than `Constant` has an empty name."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield node.output[0] if node.op_type == "Constant" else "", attribute.t
            for inner in _graphs(attribute):
                yield from graph_tensors(inner)


def _graphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    """Return the branches or the loop in an attribute of a node."""
    return [*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []), *attribute.graphs]


def normalisation_of(model: onnx.ModelProto) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of pixels in [0, 1] that a file expects, as far as it shows them.

    Returns:
        Those of pixels in [0, 255] if it takes bytes, else those in its metadata, or ImageNet's if it has none.
    """
    (value,) = images_of(model)
    if value.type.tensor_type.elem_type == TensorProto.UINT8:
        return (0.0,) * 3, (1 / 255,) * 3
    properties = {entry.key: entry.value for entry in model.metadata_props}
    try:
        mean, std = (tuple(float(value) for value in json.loads(properties[name])) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        return MEAN, STD
    if not (len(mean) == len(std) == 3 and min(std) > 0):
        return MEAN, STD
    scale = 255 if max(mean) > 1 else 1  # statistics of pixels in [0, 255]
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def images_of(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs of a graph that are no weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    """Return the dimensions of an input or output, names or ``?`` for those that may vary."""
    dimensions = value.type.tensor_type.shape.dim
    return [entry.dim_value if entry.HasField("dim_value") else entry.dim_param or "?" for entry in dimensions]


def expectation(
    model: onnx.ModelProto,
    name: str,
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    bgr: bool,
    image_size: tuple[int, int],
    layout: str = "auto",
) -> Expected:
    """Return what a file expects: type and size by its input, the rest as given.

    Args:
        size: Height and width; empty for those of the file's input, or `image_size` if they may vary.
        image_size: Height and width of this project's images.
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
    return Expected((height, width), mean, std, bgr, channels_last, kind)


def embedding_of(model: onnx.ModelProto, name: str) -> tuple[str, int, bool]:
    """Return name and length of the output with the embedding, and whether it must be flattened.

    Raises:
        TeacherError: If no output, or more than one, may be an embedding.
    """
    try:
        outputs = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output
    except onnx.shape_inference.InferenceError:
        outputs = model.graph.output
    candidates: list[tuple[str, int, bool]] = []
    for value in outputs:
        match shape_of(value):
            case [_, int(length)] if length > 0:
                candidates.append((value.name, length, False))
            case [_, int(length), 1, 1] if length > 0:
                candidates.append((value.name, length, True))
    if len(candidates) != 1:
        found = ", ".join(f"{value.name} {shape_of(value)}" for value in outputs)
        raise TeacherError(
            f"{name} must have one output (batch, D), the embedding, and has {found}; export it with that output alone"
        )
    return candidates[0]


def standardised(
    model: onnx.ModelProto,
    name: str,
    expected: Expected,
    image_size: tuple[int, int],
    normalisation: tuple[Sequence[float], Sequence[float]],
) -> onnx.ModelProto:
    """Return the same network with the input and output of this project's files.

    Args:
        model: See `read_file`.
        image_size: Height and width of this project's images.
        normalisation: This project's mean and standard deviation of RGB pixels in [0, 1].

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
    before = _before(expected, image_size, normalisation, opset)
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
            for inner in _graphs(attribute):
                _add_prefix(inner)


class _Step:
    """A node of a chain: its operator, further inputs by name, and attributes."""

    def __init__(
        self, operator: str, inputs: Mapping[str, npt.NDArray[Any] | None] | None = None, **attributes: Any
    ) -> None:
        self.operator, self.inputs, self.attributes = operator, inputs or {}, attributes


def _before(
    expected: Expected, image_size: tuple[int, int], normalisation: tuple[Sequence[float], Sequence[float]], opset: int
) -> list[_Step]:
    """Return the steps from this project's images to those that a file expects."""
    mean, std, their_mean, their_std = (
        np.array(values, np.float64)[:, None, None] for values in (*normalisation, expected.mean, expected.std)
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
    if expected.bgr:
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
