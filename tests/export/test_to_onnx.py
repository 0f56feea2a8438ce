"""The content of an exported file."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from pipeline.export.embed import embed
from pipeline.export.metadata import Metadata, finish, params_digest
from pipeline.export.to_onnx import to_onnx
from pipeline.inference.session import open_session
from pipeline.models import cost
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec, Input
from pipeline.stage.presets import load_preset
from tests.export.tiny_network import MEAN, SIZE, STD, Pictures, normalise, tiny_net

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_it_computes_the_l2_normalised_embedding_in_eval_mode_for_any_batch_size(content, net, batch):
    with torch.no_grad():
        pixels = torch.from_numpy(Pictures.pixels[:batch]).permute(0, 3, 1, 2)
        expected = torch.nn.functional.normalize(tiny_net(0).eval()(normalise(pixels)).embedding).numpy()
    embeddings = embed(open_session(content), Pictures(), np.arange(batch), MEAN, STD, batch)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert net.training  # the network itself is not modified


@pytest.mark.parametrize(
    "variant",
    [{"ibn": True, "pool": "gem", "head": "fc-bn"}, {"head": "bn", "neck_bias": False}, {"head": "none"}],
    ids=str,
)
def test_the_architectures_of_other_toolkits_are_exported(variant):
    torch.manual_seed(0)
    spec = ArchSpec.full(14, 8, 16 if "fc" in variant["head"] else 256, identities=7, **variant)
    spec = spec.model_copy(update={"input": Input(scale=(2, 2, 2), shift=(0, 0.1, 0), bgr=True)})
    net = RetrievalNet(spec).eval()
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.nn.functional.normalize(net(images).embedding).numpy()
    session = open_session(to_onnx(net, SIZE, 18).SerializeToString())
    (embeddings,) = session.run(None, {"image": images.numpy()})
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_it_has_one_input_one_output_a_dynamic_batch_and_the_requested_versions(content):
    model = onnx.load_from_string(content)
    assert (model.ir_version, [(entry.domain, entry.version) for entry in model.opset_import]) == (8, [("", 18)])
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"image": ["batch", 3, *SIZE], "embedding": ["batch", 16]}


def test_the_classifier_is_removed_and_all_weights_are_inside(content, net):
    model = onnx.load_from_string(content)
    assert not any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
    sizes = [math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    # Batch norms are folded into weights and biases; the first one of the head keeps its running statistics.
    assert cost.params(net.spec) * 0.9 < sum(sizes) < cost.params(net.spec) * 1.1
    assert not any(7 in tensor.dims[:1] for tensor in model.graph.initializer)


def test_no_paths_or_stack_traces_are_inside(content):
    for trace in (b".py", b"File ", b"site-packages", b"pipeline.", b"stack_trace", str(ROOT).encode()):
        assert trace not in content


def test_a_zero_embedding_stays_finite(content):
    model = onnx.load_from_string(content)
    head = {name for node in model.graph.node if node.op_type == "Gemm" for name in node.input[1:]}
    assert head
    for tensor in model.graph.initializer:
        if tensor.name in head:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    embeddings = embed(open_session(model.SerializeToString()), Pictures(), np.arange(3), MEAN, STD)
    np.testing.assert_array_equal(embeddings, 0)


def test_metadata_can_be_read_with_onnxruntime_alone(content, metadata):
    properties = open_session(content).get_modelmeta().custom_metadata_map
    assert {name: properties[name] for name in ("data", "protocol", "data_digest", "git_commit", "licence")} == {
        "data": "vehicles",
        "protocol": "market",
        "data_digest": "d" * 64,
        "git_commit": "c" * 40,
        "licence": "as you like",
    }
    numbers = ("map", "image_size", "mean", "std", "embedding_dim", "params", "macs")
    assert [json.loads(properties[name]) for name in numbers] == [
        0.625,
        list(SIZE),
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
        16,
        1234,
        56789,
    ]
    assert Metadata.parse(properties) == metadata
    with pytest.raises(KeyError, match="licence"):
        Metadata.parse({name: text for name, text in properties.items() if name != "licence"})


def test_an_invalid_model_is_rejected(translated, metadata):
    model = onnx.load_from_string(translated)
    model.graph.node[3].input[0] = "nowhere"
    with pytest.raises(onnx.checker.ValidationError, match="nowhere"):
        finish(model, metadata)


def test_equal_weights_give_equal_bytes_in_another_process(translated):
    code = """
import hashlib
from pipeline.export.to_onnx import to_onnx
from tests.export.tiny_network import SIZE, tiny_net
print(hashlib.sha256(to_onnx(tiny_net(0), SIZE, opset=18).SerializeToString()).hexdigest())
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == hashlib.sha256(translated).hexdigest()


def test_the_params_digest_depends_on_the_sections_that_decide_the_file_only():
    params = load_preset(ROOT, "smoke")

    def changed(section, **values):
        return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})

    digest = params_digest(params)
    assert params_digest(load_preset(ROOT, "smoke")) == digest
    for section, value in (("student", {"epochs": 99}), ("data", {"image_size": [48, 48]}), ("export", {"opset": 20})):
        assert params_digest(changed(section, **value)) != digest
    for section, value in (("benchmark", {"repeats": 99}), ("tracking", {"experiment": "other"})):
        assert params_digest(changed(section, **value)) == digest
    assert params_digest(params.model_copy(update={"seed": 1})) != digest


def test_other_weights_and_another_opset_give_another_model(translated):
    other = to_onnx(tiny_net(1), SIZE, opset=20)
    assert other.opset_import[0].version == 20
    first = {tensor.name: tensor for tensor in onnx.load_from_string(translated).graph.initializer}
    assert any(tensor != first.get(tensor.name) for tensor in other.graph.initializer)
