"""Embed images with a torch network, and score the embeddings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.retrieval.embed import embed, evaluate
from pipeline.retrieval.evaluate import evaluate_embedder

SPLITS = ["train", "query", "gallery", "gallery", "gallery"]
IDENTITIES, CAMERAS = np.array(["9", "1", "1", "2", "1"]), np.array(["c1", "c1", "c2", "c2", "c1"])


class Pictures:
    """Five pictures of random pixels."""

    pixels = np.random.default_rng(0).integers(0, 256, size=(5, 6, 4, 3), dtype=np.uint8)

    def batch(self, indices):
        return self.pixels[indices]


class FakeManifest:
    """A manifest of five images."""

    items = tuple(SimpleNamespace(name=f"{index}.jpg") for index in range(5))

    def indices(self, *splits):
        return np.array([index for index, split in enumerate(SPLITS) if split in splits])

    def identities(self, indices):
        return IDENTITIES[indices]

    def cameras(self, indices):
        return CAMERAS[indices]


class Net(nn.Module):
    """A batch norm and a frozen batch norm over the mean colour; in train mode the output depends on the batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()

    def forward(self, x):
        return SimpleNamespace(embedding=self.frozen(self.norm(x)).mean(dim=(2, 3)), logits=None)


def preprocess(pixels):
    return pixels.float() / 255


def test_embeddings_are_normalised_and_do_not_depend_on_the_batch():
    indices = np.array([3, 0, 4, 1, 2])
    mean = Pictures.pixels[indices].mean(axis=(1, 2))
    for batch in (1, 2, 5, 128):
        embeddings = embed(Net(), Pictures(), indices, preprocess, batch=batch)
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5)


def test_every_module_keeps_its_mode():
    net = Net()
    net.frozen.eval()
    embed(net, Pictures(), np.arange(5), preprocess)
    assert (net.training, net.norm.training, net.frozen.training) == (True, True, False)
    assert torch.equal(net.norm.running_mean, torch.zeros(3))


def test_scores_come_from_the_given_splits():
    vectors = np.array(
        [[9, 9], [1, 0], [1, 0.5], [1, 0.2], [1, 0]], dtype=np.float32
    )  # the nearest is ignored: same camera
    result = evaluate_embedder(vectors.__getitem__, FakeManifest(), "query", "gallery", "market")
    assert (result.map, len(result.ap)) == (1 / 2, 1)
    assert len(evaluate(Net(), FakeManifest(), Pictures(), "query", "gallery", "market", preprocess).ap) == 1


def test_an_embedding_that_is_not_finite_raises_with_the_path_of_its_image():
    vectors = np.ones((5, 2), dtype=np.float32)
    vectors[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"3\.jpg"):
        evaluate_embedder(vectors.__getitem__, FakeManifest(), "query", "gallery", "market")
