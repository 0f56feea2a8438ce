"""A file that does not do what the network did is refused."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pipeline.export.parity import Parity, ParityError, cosines, verify, verify_batches
from tests.export.tiny_network import Pictures, normalise


def damaged(content: bytes) -> bytes:
    """The same file with one channel of the first convolution gone."""
    model = onnx.load_from_string(content)
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weights = numpy_helper.to_array(tensor).copy()
    weights[0] = 0
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    return model.SerializeToString()


def of_batch() -> bytes:
    """A file whose embedding is the image's mean colour plus that of the batch."""
    axes = [helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in (("hw", (2, 3)), ("b", (0,)))]
    nodes = [
        helper.make_node("ReduceMean", ["image", "hw"], ["colour"], keepdims=0),
        helper.make_node("ReduceMean", ["colour", "b"], ["mean"], keepdims=1),
        helper.make_node("Add", ["colour", "mean"], ["embedding"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, None, None])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "g", [image], [embedding], axes)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


def test_a_good_file_is_told_how_good_it_is(content, reference, probe):
    scores = iter([0.61, 0.61005])
    parity = verify("model.onnx", content, reference, probe(score=lambda _: next(scores)))
    assert parity == Parity(parity.min_cosine, map=0.61, map_torch=0.61005)
    assert 0.999999 < parity.min_cosine <= 1 + 1e-12
    verify_batches("model.onnx", content, reference, probe())


def test_scores_are_those_of_each_ones_own_embeddings(content, reference, probe):
    seen = []
    verify("model.onnx", content, reference, probe(score=lambda found: seen.append(found) or 0.5))
    assert seen[1] is reference
    assert not np.array_equal(seen[0], reference)
    np.testing.assert_allclose(seen[0], reference, atol=1e-5)


def test_a_damaged_file_is_named_with_figure_and_bound(content, reference, probe):
    with pytest.raises(ParityError, match=r"^teacher\.onnx: cosine with torch is 0\.\d+ .* asks for 0\.99999"):
        verify("teacher.onnx", damaged(content), reference, probe())


def test_one_bad_image_among_many_is_enough_and_is_named(content, reference, probe):
    wrong = reference.copy()
    wrong[9] = np.roll(wrong[9], 1)
    with pytest.raises(ParityError, match="row 9 of the manifest"):
        verify("model.onnx", content, wrong, probe())


@pytest.mark.parametrize("broken", [np.nan, 0.0])
def test_an_embedding_without_direction_never_passes(content, reference, probe, broken):
    wrong = reference.copy()
    wrong[2] = broken
    with pytest.raises(ParityError, match="row 2 "):
        verify("model.onnx", content, wrong, probe())


@pytest.mark.parametrize("other", [0.6102, np.nan])
def test_another_map_is_named_with_figure_and_bound(content, reference, probe, other):
    scores = iter([0.61, other])
    with pytest.raises(ParityError, match=r"model\.onnx: mAP is 0\.610000 .*map_difference` allows 0\.0001"):
        verify("model.onnx", content, reference, probe(score=lambda _: next(scores)))


def test_gates_can_be_wider(content, reference, probe):
    scores = iter([0.5, 0.55])
    wide = probe(score=lambda _: next(scores), min_cosine=1e-6, map_difference=0.1)
    assert verify("model.onnx", damaged(content), reference, wide).min_cosine < 0.99999


def test_an_embedding_that_depends_on_its_batch_is_refused(probe):
    pixels = torch.from_numpy(Pictures.pixels).permute(0, 3, 1, 2)
    colour = normalise(pixels).mean(dim=(2, 3)).numpy()  # alone, each has this direction; in a batch of 3, none
    with pytest.raises(ParityError, match=r"model\.onnx, batch 3: cosine"):
        verify_batches("model.onnx", of_batch(), colour, probe())


def test_another_embedding_length_is_refused(content, reference, probe):
    with pytest.raises(ParityError, match=r"\(12, 16\) in ONNX Runtime and \(12, 15\) in torch"):
        verify("model.onnx", content, reference[:, :15], probe())


def test_cosines_are_those_of_the_definition():
    left, right = np.array([[3, 4], [1, 0]], np.float32), np.array([[4, 3], [0, 2]], np.float32)
    np.testing.assert_allclose(cosines(left, right), [24 / 25, 0], atol=1e-15)
