"""The versions that a file needs."""

import onnx
import onnxruntime
import pytest
from onnx.helper import VERSION_TABLE

from pipeline.config import Export
from pipeline.export import int8
from pipeline.export.embed import normalise_pixels
from pipeline.export.metadata import Metadata, finish
from pipeline.export.preprocessing import add_preprocessing
from pipeline.export.runtimes import LEAST_ONNX_RUNTIME, Requirements
from pipeline.export.to_onnx import to_onnx
from pipeline.inference.session import open_session
from tests.export.tiny_network import MEAN, SIZE, STD, Pictures, tiny_net


def variants(core):
    """Every kind of file that is made from a float file."""
    inputs = [normalise_pixels(Pictures.pixels, MEAN, STD)]
    return [core, add_preprocessing(core, SIZE, MEAN, STD), int8.quantise(core, inputs, int8.RECIPES[0])]


@pytest.mark.parametrize("opset", [18, 19, 21, 23])
def test_every_kind_of_file_has_the_lowest_ir_version_of_its_operator_set(opset, metadata):
    lowest = min(ir_version for _, ir_version, version, *_ in VERSION_TABLE if version == opset)
    for model in variants(to_onnx(tiny_net(0), SIZE, opset)):
        content = finish(model, metadata)
        assert onnx.load_from_string(content).ir_version == lowest
        properties = open_session(content).get_modelmeta().custom_metadata_map
        expected = {"opset": f"{opset}", "ir_version": f"{lowest}", "onnxruntime": f">={LEAST_ONNX_RUNTIME[opset]}"}
        assert {name: properties[name] for name in expected} == expected
        assert Metadata.parse(properties) == metadata


def test_a_later_ir_version_of_a_step_does_not_reach_the_file(translated, metadata):
    model = onnx.load_from_string(translated)
    model.ir_version = 13
    assert onnx.load_from_string(finish(model, metadata)).ir_version == 8


def test_every_allowed_operator_set_has_a_least_version():
    schema = Export.model_json_schema()["properties"]["opset"]
    assert list(LEAST_ONNX_RUNTIME) == list(range(schema["minimum"], schema["maximum"] + 1))
    parts = [tuple(map(int, version.split("."))) for version in LEAST_ONNX_RUNTIME.values()]
    assert parts == sorted(parts)


def test_requirements_are_read_from_the_model(translated, net):
    needs = Requirements.of(onnx.load_from_string(translated))
    assert (needs.opset, needs.onnxruntime, needs.batch) == (18, "1.15", None)
    assert Requirements.of(to_onnx(net, SIZE, 18, batch=5)).batch == 5


@pytest.mark.parametrize(("opset", "version"), [(11, "1.15"), (21, "1.18"), (99, onnxruntime.__version__)])
def test_requirements_of_a_network_from_elsewhere(translated, opset, version):
    model = onnx.load_from_string(translated)
    del model.opset_import[:]
    model.opset_import.extend(
        [onnx.helper.make_opsetid("com.microsoft", 1), onnx.helper.make_opsetid("ai.onnx", opset)]
    )
    needs = Requirements.of(model)
    assert (needs.opset, needs.onnxruntime) == (opset, version)
