"""An ONNX file of any architecture: its weights, its input, and the output with the embedding."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from pipeline.data.augment import MEAN, STD
from pipeline.teachers.checks import TeacherError, first_line


def read_file(content: bytes, name: str, *folders: Path) -> onnx.ModelProto:
    """Read an ONNX file and check it.

    Args:
        folders: Where its weights may be in other files.

    Raises:
        TeacherError: If it is not a valid ONNX file with one input of images.
    """
    model = None
    try:
        model = onnx.load_from_string(content)
        _load_external(model, folders)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and onnx raise different ones
        if model is not None and (others := sorted(set(_external_files(model)))):
            raise TeacherError(
                f"{name} has its weights in {', '.join(others)}, which cannot be read; put them into the same folder"
            ) from error
        raise TeacherError(f"{name} is not a valid ONNX file ({first_line(error)}); export it again") from error
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
            for inner in graphs_of(attribute):
                yield from graph_tensors(inner)


def graphs_of(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
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
