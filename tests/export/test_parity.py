"""The parity check: files that do not reproduce their network are rejected."""

import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pipeline.export import parity
from pipeline.export.metadata import finish
from pipeline.export.parity import ParityError, cosines, nearest_neighbours
from pipeline.export.preprocessing import add_preprocessing
from tests.export.tiny_network import MEAN, SIZE, STD, Pictures, normalise


def damaged(content: bytes) -> bytes:
    """Zero one channel of the first convolution."""
    model = onnx.load_from_string(content)
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weights = numpy_helper.to_array(tensor).copy()
    weights[0] = 0
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    return model.SerializeToString()


def batch_dependent() -> bytes:
    """Build a model whose embedding is the mean colour of the image plus that of the batch."""
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


def verify(name, content, embeddings, check):
    """Compare a file with a network that gave these embeddings."""
    return check.verify(name, content, check.reference(embeddings))


def verify_batches(name, content, embeddings, check):
    return check.verify_batches(name, content, check.reference(embeddings))


def test_a_correct_file_passes_and_its_map_and_cosine_are_returned(content, reference, make_check):
    scores = iter([0.61005, 0.61])
    result = verify("model.onnx", content, reference, make_check(score=lambda _: next(scores)))
    assert result.map == 0.61
    np.testing.assert_allclose(result.embeddings, reference, atol=1e-5)
    assert 0.999999 < result.min_cosine <= 1 + 1e-12
    verify_batches("model.onnx", content, reference, make_check())


def test_map_is_computed_from_the_embeddings_of_torch_and_of_onnx_runtime(content, reference, make_check):
    scored = []
    verify("model.onnx", content, reference, make_check(score=lambda embeddings: scored.append(embeddings) or 0.5))
    assert len(scored) == 2
    assert scored[0] is reference
    assert not np.array_equal(scored[1], reference)
    np.testing.assert_allclose(scored[1], reference, atol=1e-5)


def test_the_error_names_the_file_its_cosine_and_the_limit(content, reference, make_check):
    with pytest.raises(ParityError, match=r"^teacher\.onnx: cosine with torch is 0\.\d+ .* requires 0\.99999"):
        verify("teacher.onnx", damaged(content), reference, make_check())


def test_one_wrong_embedding_fails_and_the_error_names_its_image(content, reference, make_check):
    wrong = reference.copy()
    wrong[9] = np.roll(wrong[9], 1)
    with pytest.raises(ParityError, match="row 9 of the manifest"):
        verify("model.onnx", content, wrong, make_check())


@pytest.mark.parametrize("broken", [np.nan, 0.0])
def test_nan_and_zero_embeddings_fail(content, reference, make_check, broken):
    wrong = reference.copy()
    wrong[2] = broken
    with pytest.raises(ParityError, match="row 2 "):
        verify("model.onnx", content, wrong, make_check())


@pytest.mark.parametrize("other", [0.6102, np.nan])
def test_the_error_names_the_map_and_the_limit(content, reference, make_check, other):
    scores = iter([other, 0.61])
    with pytest.raises(ParityError, match=r"model\.onnx: mAP is 0\.610000 .*map_difference` allows 0\.0001"):
        verify("model.onnx", content, reference, make_check(score=lambda _: next(scores)))


def test_limits_can_be_relaxed(content, reference, make_check):
    scores = iter([0.55, 0.5])
    wide = make_check(score=lambda _: next(scores), min_cosine=1e-6, map_difference=0.1)
    assert verify("model.onnx", damaged(content), reference, wide).min_cosine < 0.99999


def test_an_embedding_that_depends_on_the_batch_fails(make_check):
    pixels = torch.from_numpy(Pictures.pixels).permute(0, 3, 1, 2)
    colour = normalise(pixels).mean(dim=(2, 3)).numpy()  # exact at batch size 1, wrong at 3
    with pytest.raises(ParityError, match=r"model\.onnx, batch 3: cosine"):
        verify_batches("model.onnx", batch_dependent(), colour, make_check())


def test_another_embedding_length_fails(content, reference, make_check):
    with pytest.raises(ParityError, match=r"\(12, 16\) in ONNX Runtime and \(12, 15\) in torch"):
        verify("model.onnx", content, reference[:, :15], make_check())


def test_cosines_follow_the_definition():
    left, right = np.array([[3, 4], [1, 0]], np.float32), np.array([[4, 3], [0, 2]], np.float32)
    np.testing.assert_allclose(cosines(left, right), [24 / 25, 0], atol=1e-15)


def test_map_is_compared_at_every_batch_size(content, reference, make_check):
    scores = iter([0.5, 0.5, 0.502])
    with pytest.raises(ParityError, match=r"model\.onnx, batch 3: mAP is 0\.502000 .* 0\.500000"):
        verify_batches("model.onnx", content, reference, make_check(score=lambda _: next(scores)))


def test_large_test_sets_are_subsampled_for_the_batch_sizes(content, reference, make_check, monkeypatch, caplog):
    monkeypatch.setattr(parity, "MAX_BATCH_IMAGES", 5)
    scored = []
    with caplog.at_level(logging.INFO):
        verify_batches(
            "model.onnx", content, reference, make_check(score=lambda embeddings: scored.append(embeddings) or 0.5)
        )
    assert "one in 3 of 12 test images" in caplog.text
    for embeddings in scored[1:]:  # images outside the subset keep the embeddings of torch
        ran = (embeddings != reference).any(axis=1)
        assert ran[[0, 3, 6, 9]].any()
        assert not ran[[1, 2, 4, 5, 7, 8, 10, 11]].any()
    wrong = reference.copy()
    wrong[9] = np.roll(wrong[9], 1)
    with pytest.raises(ParityError, match="row 9 of the manifest"):
        verify_batches("model.onnx", content, wrong, make_check())


def unit_vector(angle):
    """Return a vector (16,) of length 1 in the plane of the first two axes; the angle is in radians."""
    vector = np.zeros(16, np.float32)
    vector[:2] = np.cos(angle), np.sin(angle)
    return vector


def test_a_changed_nearest_neighbour_fails_even_if_every_cosine_is_high(make_check):
    reference = np.stack(
        [
            unit_vector(0),
            unit_vector(3),
            unit_vector(0.8),
            unit_vector(0.801),
            *[unit_vector(3.1 + 0.1 * number) for number in range(8)],
        ]
    )
    moved = reference.copy()
    moved[2] = unit_vector(0.8015)
    check = make_check()
    assert cosines(reference, moved).min() > 0.99999
    check.compare("model.onnx", check.reference(reference), reference)
    with pytest.raises(ParityError, match=r"\.onnx: 1 of 2 queries have another nearest image .* row 0 .* 7\.1\de-04"):
        check.compare("model.onnx", check.reference(reference), moved)
    reference[3] = unit_vector(0.800001)  # the gap is 7e-7, within rounding
    check.compare("model.onnx", check.reference(reference), moved)


def test_nearest_neighbours_follow_the_definition():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for queries in (300, 600):
        nearest, gap = nearest_neighbours(vectors, queries)
        for query in range(queries):
            others = [row for row in range(0 if queries == 600 else queries, 600) if row != query]
            ranked = sorted(others, key=lambda row: -float(vectors[query] @ vectors[row]))
            assert nearest[query] == ranked[0]
            first, second = (float(vectors[query] @ vectors[row]) for row in ranked[:2])
            assert gap[query] == pytest.approx(first - second, abs=1e-6)
    assert nearest_neighbours(vectors[:2], 1)[1][0] == np.inf


def test_a_file_that_resizes_differently_from_pillow_fails(content, translated, metadata, make_check):
    core = onnx.load_from_string(translated)
    whole = finish(add_preprocessing(core, SIZE, MEAN, STD), metadata)
    rng = np.random.default_rng(1)
    sizes = [(50, 70), (32, 24), (20, 90), (200, 31), (7, 5), (1, 1)]
    originals = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size)) for size in sizes
    ]
    assert make_check().verify_resizing("model.allinone.onnx", whole, content, originals) >= 0.999
    other = onnx.load_from_string(whole)
    scale = next(tensor for tensor in other.graph.initializer if tensor.name == "preprocess/std")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 8, scale.name))
    with pytest.raises(ParityError, match=r"allinone\.onnx: for an image of \d+ x \d+ pixels the cosine .* 0\.999 is"):
        make_check().verify_resizing("model.allinone.onnx", other.SerializeToString(), content, originals)
