"""Embedding with files that take any number of images in a call, and with files that fix it."""

import numpy as np
import onnx
import pytest

from pipeline.export import int8
from pipeline.export.embed import embed, embed_pixels, fill, fixed_batch, normalise_pixels
from pipeline.export.metadata import finish
from pipeline.export.parity import ParityCheck, ParityError
from pipeline.export.preprocessing import add_preprocessing
from pipeline.export.to_onnx import to_onnx
from pipeline.inference.session import open_session
from tests.export.tiny_network import MEAN, SIZE, STD, Pictures

FIXED = 5


@pytest.fixture(scope="module")
def fixed_model(net):
    return to_onnx(net, SIZE, 18, FIXED)


@pytest.fixture(scope="module")
def sessions(fixed_model, metadata):
    """A file of each kind with a fixed batch."""
    copies = [onnx.load_from_string(fixed_model.SerializeToString()) for _ in range(3)]
    inputs = [normalise_pixels(fill(Pictures.pixels[start : start + FIXED], FIXED), MEAN, STD) for start in (0, 5, 10)]
    models = {
        "float": copies[0],
        "all-in-one": add_preprocessing(copies[1], SIZE, MEAN, STD),
        "int8": int8.quantise(copies[2], inputs, int8.RECIPES[0]),
    }
    return {name: open_session(finish(model, metadata)) for name, model in models.items()}


def test_the_graph_of_a_fixed_batch_has_static_shapes(fixed_model):
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*fixed_model.graph.input, *fixed_model.graph.output)
    }
    assert shapes == {"image": [FIXED, 3, *SIZE], "embedding": [FIXED, 16]}


def test_no_graph_computes_with_the_batch_size(translated, fixed_model):
    """OpenCV 4 runs neither Shape nor Expand of the batch for more than one image."""
    for model in (onnx.load_from_string(translated), fixed_model):
        assert not {node.op_type for node in model.graph.node} & {"Shape", "Expand", "Concat", "Reshape"}


@pytest.mark.parametrize("count", [1, 4, 5, 6, 12])
@pytest.mark.parametrize("kind", ["float", "all-in-one", "int8"])
def test_a_fixed_batch_embeds_any_number_of_images(sessions, reference, kind, count):
    session = sessions[kind]
    assert fixed_batch(session) == FIXED
    embeddings = embed_pixels(session, Pictures.pixels[:count], MEAN, STD)
    assert embeddings.shape == (count, 16)
    if kind == "int8":
        assert np.einsum("nd,nd->n", embeddings, reference[:count]).min() > 0.9
    else:
        np.testing.assert_allclose(embeddings, reference[:count], atol=1e-5)


def test_a_manifest_is_read_in_fixed_batches(sessions, reference):
    sizes = []

    class Counted(Pictures):
        def batch(self, indices):
            sizes.append(len(indices))
            return super().batch(indices)

    embeddings = embed(sessions["float"], Counted(), np.arange(12), MEAN, STD)
    np.testing.assert_allclose(embeddings, reference, atol=1e-5)
    assert sizes == [5, 5, 2]


def test_the_parity_check_moves_images_within_a_fixed_batch(sessions, reference, make_check):
    check: ParityCheck = make_check()
    ((label, subset, embeddings),) = check.embed_regrouped(sessions["float"])
    assert label == "batch 5, other neighbours"
    np.testing.assert_allclose(embeddings, reference[subset], atol=1e-5)


def test_a_fixed_batch_whose_embeddings_depend_on_their_neighbours_fails(fixed_model, reference, make_check):
    model = onnx.load_from_string(fixed_model.SerializeToString())
    head = next(node for node in model.graph.node if node.op_type == "ReduceL2")
    mixed = onnx.helper.make_node("ReduceMean", [head.input[0], "batch axis"], ["mean of the batch"], keepdims=1)
    added = onnx.helper.make_node("Add", [head.input[0], "mean of the batch"], ["dependent"])
    model.graph.initializer.append(onnx.helper.make_tensor("batch axis", onnx.TensorProto.INT64, [1], [0]))
    nodes = list(model.graph.node)
    place = nodes.index(head)
    for node in nodes[place:]:
        node.input[:] = ["dependent" if name == mixed.input[0] else name for name in node.input]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], mixed, added, *nodes[place:]])
    content = model.SerializeToString()
    check = make_check()
    own = check.embed(open_session(content))  # a network that agrees in the first order of the images
    with pytest.raises(ParityError, match=r"model\.onnx, batch 5, other neighbours: cosine"):
        check.verify_batches("model.onnx", content, check.reference(own))


def test_fill_repeats_the_last_image():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 1, 1, 3)
    assert fill(pixels, 4)[:, 0, 0, 0].tolist() == [0, 3, 3, 3]
    np.testing.assert_array_equal(fill(pixels, 2), pixels)
