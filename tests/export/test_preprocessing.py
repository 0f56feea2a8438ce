"""The model with built-in preprocessing."""

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from pipeline.data import augment
from pipeline.export.embed import embed_pixels, normalise_pixels
from pipeline.export.metadata import finish
from pipeline.export.preprocessing import add_preprocessing
from pipeline.inference.session import open_session
from tests.export.tiny_network import MEAN, SIZE, STD, Pictures, normalise


@pytest.fixture(scope="module")
def whole(translated, metadata):
    return finish(add_preprocessing(onnx.load_from_string(translated), SIZE, MEAN, STD), metadata)


def test_images_of_the_input_size_get_the_same_embedding_as_from_the_float_model(whole, content):
    embeddings, expected = (embed_pixels(open_session(file), Pictures.pixels, MEAN, STD) for file in (whole, content))
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)


def test_it_accepts_uint8_images_of_any_size_and_batch_size(whole):
    model = onnx.load_from_string(whole)
    (entry,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
    assert (entry.name, entry.type.tensor_type.elem_type, dims) == ("image", 2, ["batch", "height", "width", 3])
    session = open_session(whole)
    for shape in ((1, 40, 50, 3), (3, 100, 9, 3), (8, 1, 1, 3)):
        (embeddings,) = session.run(None, {"image": np.full(shape, 128, np.uint8)})
        assert embeddings.shape == (shape[0], 16)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_images_of_a_batch_are_resized_independently(whole):
    session = open_session(whole)
    images = np.random.default_rng(3).integers(0, 256, (5, 61, 47, 3), dtype=np.uint8)
    together = embed_pixels(session, images, MEAN, STD)
    alone = np.concatenate([embed_pixels(session, image[None], MEAN, STD) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_core_model_is_not_modified(translated):
    core = onnx.load_from_string(translated)
    add_preprocessing(core, SIZE, MEAN, STD)
    assert core.SerializeToString() == translated


def test_normalisation_is_bit_identical_to_torch():
    normalised = normalise_pixels(Pictures.pixels, MEAN, STD)
    channels_first = torch.from_numpy(Pictures.pixels).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(normalised, augment.normalise(channels_first).numpy())
    np.testing.assert_allclose(normalised, normalise(channels_first).numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [(100, 150), (61, 47), (5, 300), (7, 9), (900, 1200)], ids=str)
def test_images_are_resized_as_by_pillow(whole, size):
    model = onnx.load_from_string(whole)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("preprocess/resized"))
    pixels = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    (resized,) = open_session(model.SerializeToString()).run(["preprocess/resized"], {"image": pixels[None]})
    small = np.asarray(Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    assert np.abs(resized[0].astype(int) - small).max() <= 1
