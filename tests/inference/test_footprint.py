"""Size, memory and layout of ONNX files."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.inference.footprint import footprints, plain_layers


def network(path: Path, channels: int, weights: int = 0) -> Path:
    """Write three convolutions, 3 -> 32 -> channels -> 32, and a tensor of `weights` numbers that takes space only."""
    rng = np.random.default_rng(0)
    shapes = {
        "first.weight": (32, 3, 3, 3),
        "second.weight": (channels, 32, 3, 3),
        "third.weight": (32, channels, 3, 3),
        "padding": (max(weights, 1),),
    }
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["image", "first.weight"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["a", "second.weight"], ["b"], pads=[1] * 4),
        helper.make_node("Conv", ["b", "third.weight"], ["c"], pads=[1] * 4),
        helper.make_node("ReduceSum", ["padding"], ["padding_sum"], keepdims=0),
        helper.make_node("Add", ["c", "padding_sum"], ["embedding"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [image], [embedding], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def test_layers_with_odd_widths_are_listed(tmp_path):
    optimised = plain_layers(network(tmp_path / "good.onnx", 32))
    if optimised:
        pytest.skip("ONNX Runtime has no convolutions on blocks of channels on this processor")
    assert plain_layers(network(tmp_path / "odd.onnx", 33)) == ("third",)


def test_memory_is_that_of_the_file_only(tmp_path):
    held = np.ones(50_000_000, np.float32)  # 200 MB of this process must not count
    small, large = network(tmp_path / "small.onnx", 32), network(tmp_path / "large.onnx", 32, weights=20_000_000)
    result = footprints({"small": small, "large": large}, (16, 16), batch=2)
    assert held.sum() == 50_000_000
    assert result["large"].bytes == large.stat().st_size > 80_000_000
    if result["small"].memory is not None:
        assert result["small"].memory < 60_000_000
        assert result["large"].memory > result["small"].memory + 70_000_000
