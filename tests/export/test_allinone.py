"""The file that takes pictures as they are."""

import io

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from pipeline.data import augment
from pipeline.export.allinone import all_in_one
from pipeline.export.embed import embed_pixels, normalised
from pipeline.export.metadata import finish
from pipeline.inference.session import open_session
from tests.export.tiny_network import MEAN, SIZE, STD, Pictures, normalise


@pytest.fixture(scope="module")
def whole(translated, metadata):
    return finish(all_in_one(onnx.load_from_string(translated), SIZE, MEAN, STD), metadata)


def test_pictures_of_the_right_size_get_the_embedding_of_the_other_file(whole, content):
    found, expected = (embed_pixels(open_session(file), Pictures.pixels, MEAN, STD) for file in (whole, content))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_it_takes_bytes_of_any_size_and_number(whole):
    model = onnx.load_from_string(whole)
    (entry,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
    assert (entry.name, entry.type.tensor_type.elem_type, dims) == ("image", 2, ["batch", "height", "width", 3])
    session = open_session(whole)
    for shape in ((1, 40, 50, 3), (3, 100, 9, 3), (8, 1, 1, 3)):
        (found,) = session.run(None, {"image": np.full(shape, 128, np.uint8)})
        assert found.shape == (shape[0], 16)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_every_picture_of_a_batch_is_resized_as_if_it_were_alone(whole):
    session = open_session(whole)
    pictures = np.random.default_rng(3).integers(0, 256, (5, 61, 47, 3), dtype=np.uint8)
    together = embed_pixels(session, pictures, MEAN, STD)
    alone = np.concatenate([embed_pixels(session, picture[None], MEAN, STD) for picture in pictures])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_core_is_left_as_it_was(translated):
    core = onnx.load_from_string(translated)
    all_in_one(core, SIZE, MEAN, STD)
    assert core.SerializeToString() == translated


def test_normalisation_has_the_bits_of_torchs():
    found = normalised(Pictures.pixels, MEAN, STD)
    channels_first = torch.from_numpy(Pictures.pixels).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(found, augment.normalise(channels_first).numpy())
    np.testing.assert_allclose(found, normalise(channels_first).numpy(), atol=1e-5)


def test_a_photograph_turned_upright_needs_no_more_than_pillow_and_numpy(whole, content):
    rng = np.random.default_rng(5)
    picture = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(
        (150, 100), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    pixels = np.asarray(Image.open(file))
    small = np.asarray(Image.fromarray(pixels).resize(SIZE[::-1], Image.Resampling.BILINEAR))
    inside = embed_pixels(open_session(whole), pixels[None], MEAN, STD)
    outside = embed_pixels(open_session(content), small[None], MEAN, STD)
    assert float((inside * outside).sum()) > 0.999
