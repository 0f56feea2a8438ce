"""A file that does not do what the network did is refused."""

import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pipeline.export import parity
from pipeline.export.allinone import all_in_one
from pipeline.export.metadata import finish
from pipeline.export.parity import ParityError, cosines, neighbours, verify, verify_batches, verify_resizing
from tests.export.tiny_network import MEAN, SIZE, STD, Pictures, normalise


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


def check(name, content, embeddings, probe):
    """Compare a file with a network that gave these embeddings."""
    return verify(name, content, probe.reference(embeddings), probe)


def check_batches(name, content, embeddings, probe):
    return verify_batches(name, content, probe.reference(embeddings), probe)


def test_a_good_file_is_told_how_good_it_is(content, reference, probe):
    scores = iter([0.61005, 0.61])
    found = check("model.onnx", content, reference, probe(score=lambda _: next(scores)))
    assert found.map == 0.61
    np.testing.assert_allclose(found.embeddings, reference, atol=1e-5)
    assert 0.999999 < found.min_cosine <= 1 + 1e-12
    check_batches("model.onnx", content, reference, probe())


def test_scores_are_those_of_each_ones_own_embeddings(content, reference, probe):
    seen = []
    check("model.onnx", content, reference, probe(score=lambda found: seen.append(found) or 0.5))
    assert len(seen) == 2
    assert seen[0] is reference
    assert not np.array_equal(seen[1], reference)
    np.testing.assert_allclose(seen[1], reference, atol=1e-5)


def test_a_damaged_file_is_named_with_figure_and_bound(content, reference, probe):
    with pytest.raises(ParityError, match=r"^teacher\.onnx: cosine with torch is 0\.\d+ .* asks for 0\.99999"):
        check("teacher.onnx", damaged(content), reference, probe())


def test_one_bad_image_among_many_is_enough_and_is_named(content, reference, probe):
    wrong = reference.copy()
    wrong[9] = np.roll(wrong[9], 1)
    with pytest.raises(ParityError, match="row 9 of the manifest"):
        check("model.onnx", content, wrong, probe())


@pytest.mark.parametrize("broken", [np.nan, 0.0])
def test_an_embedding_without_direction_never_passes(content, reference, probe, broken):
    wrong = reference.copy()
    wrong[2] = broken
    with pytest.raises(ParityError, match="row 2 "):
        check("model.onnx", content, wrong, probe())


@pytest.mark.parametrize("other", [0.6102, np.nan])
def test_another_map_is_named_with_figure_and_bound(content, reference, probe, other):
    scores = iter([other, 0.61])
    with pytest.raises(ParityError, match=r"model\.onnx: mAP is 0\.610000 .*map_difference` allows 0\.0001"):
        check("model.onnx", content, reference, probe(score=lambda _: next(scores)))


def test_gates_can_be_wider(content, reference, probe):
    scores = iter([0.55, 0.5])
    wide = probe(score=lambda _: next(scores), min_cosine=1e-6, map_difference=0.1)
    assert check("model.onnx", damaged(content), reference, wide).min_cosine < 0.99999


def test_an_embedding_that_depends_on_its_batch_is_refused(probe):
    pixels = torch.from_numpy(Pictures.pixels).permute(0, 3, 1, 2)
    colour = normalise(pixels).mean(dim=(2, 3)).numpy()  # alone, each has this direction; in a batch of 3, none
    with pytest.raises(ParityError, match=r"model\.onnx, batch 3: cosine"):
        check_batches("model.onnx", of_batch(), colour, probe())


def test_another_embedding_length_is_refused(content, reference, probe):
    with pytest.raises(ParityError, match=r"\(12, 16\) in ONNX Runtime and \(12, 15\) in torch"):
        check("model.onnx", content, reference[:, :15], probe())


def test_cosines_are_those_of_the_definition():
    left, right = np.array([[3, 4], [1, 0]], np.float32), np.array([[4, 3], [0, 2]], np.float32)
    np.testing.assert_allclose(cosines(left, right), [24 / 25, 0], atol=1e-15)


def test_map_is_compared_in_every_batch_size(content, reference, probe):
    scores = iter([0.5, 0.5, 0.502])
    with pytest.raises(ParityError, match=r"model\.onnx, batch 3: mAP is 0\.502000 .* 0\.500000"):
        check_batches("model.onnx", content, reference, probe(score=lambda _: next(scores)))


def test_of_many_images_some_of_all_kinds_are_tried_in_batches(content, reference, probe, monkeypatch, caplog):
    monkeypatch.setattr(parity, "PROBED", 5)
    seen = []
    with caplog.at_level(logging.INFO):
        check_batches("model.onnx", content, reference, probe(score=lambda found: seen.append(found) or 0.5))
    assert "one in 3 of 12 test images" in caplog.text
    for found in seen[1:]:  # the others are torch's own
        ran = (found != reference).any(axis=1)
        assert ran[[0, 3, 6, 9]].any()
        assert not ran[[1, 2, 4, 5, 7, 8, 10, 11]].any()
    wrong = reference.copy()
    wrong[9] = np.roll(wrong[9], 1)
    with pytest.raises(ParityError, match="row 9 of the manifest"):
        check_batches("model.onnx", content, wrong, probe())


def at(angle):
    """A vector of length 1 in the plane of the first two axes."""
    found = np.zeros(16, np.float32)
    found[:2] = np.cos(angle), np.sin(angle)
    return found


def test_a_query_that_finds_another_image_first_is_named_though_every_cosine_is_high(probe):
    reference = np.stack([at(0), at(3), at(0.8), at(0.801), *[at(3.1 + 0.1 * number) for number in range(8)]])
    moved = reference.copy()
    moved[2] = at(0.8015)
    assert cosines(reference, moved).min() > 0.99999
    parity._compare("model.onnx", probe().reference(reference), reference, probe())
    with pytest.raises(ParityError, match=r"\.onnx: 1 of 2 queries find another image first .* row 0 .* 7\.1\de-04"):
        parity._compare("model.onnx", probe().reference(reference), moved, probe())
    reference[3] = at(0.800001)  # 7e-7 behind: rounding may change places
    parity._compare("model.onnx", probe().reference(reference), moved, probe())


def test_neighbours_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for queries in (300, 600):
        nearest, gap = neighbours(vectors, queries)
        for query in range(queries):
            others = [row for row in range(0 if queries == 600 else queries, 600) if row != query]
            ranked = sorted(others, key=lambda row: -float(vectors[query] @ vectors[row]))
            assert nearest[query] == ranked[0]
            first, second = (float(vectors[query] @ vectors[row]) for row in ranked[:2])
            assert gap[query] == pytest.approx(first - second, abs=1e-6)
    assert neighbours(vectors[:2], 1)[1][0] == np.inf


def test_a_file_that_resizes_otherwise_is_refused(content, translated, metadata, probe):
    core = onnx.load_from_string(translated)
    whole = finish(all_in_one(core, SIZE, MEAN, STD), metadata)
    rng = np.random.default_rng(1)
    sizes = [(50, 70), (32, 24), (20, 90), (200, 31), (7, 5), (1, 1)]
    pictures = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size)) for size in sizes
    ]
    assert verify_resizing("model.allinone.onnx", whole, content, pictures, probe()) >= 0.999
    other = onnx.load_from_string(whole)
    scale = next(tensor for tensor in other.graph.initializer if tensor.name == "preprocess/std")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 8, scale.name))
    with pytest.raises(ParityError, match=r"allinone\.onnx: for a picture of \d+ x \d+ pixels the cosine .* 0\.999 is"):
        verify_resizing("model.allinone.onnx", other.SerializeToString(), content, pictures, probe())
