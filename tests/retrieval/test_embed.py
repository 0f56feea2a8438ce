"""Images to embeddings to scores."""

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

    def batch(self, rows):
        return self.pixels[rows]


class Table:
    """A manifest of five rows."""

    items = tuple(SimpleNamespace(path=f"{row}.jpg") for row in range(5))

    def rows(self, *splits):
        return np.array([row for row, split in enumerate(SPLITS) if split in splits])

    def identities(self, rows):
        return IDENTITIES[rows]

    def cameras(self, rows):
        return CAMERAS[rows]


class Net(nn.Module):
    """Batch norm with a frozen twin over the mean colour; in train mode it would depend on the batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()

    def forward(self, x):
        return SimpleNamespace(embedding=self.frozen(self.norm(x)).mean(dim=(2, 3)), logits=None)


def preprocess(pixels):
    return pixels.float() / 255


def test_embeddings_have_length_one_and_do_not_depend_on_the_batch():
    rows = np.array([3, 0, 4, 1, 2])
    mean = Pictures.pixels[rows].mean(axis=(1, 2))
    for batch in (1, 2, 5, 128):
        found = embed(Net(), Pictures(), rows, preprocess, batch=batch)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5)


def test_every_module_keeps_its_mode():
    net = Net()
    net.frozen.eval()
    embed(net, Pictures(), np.arange(5), preprocess)
    assert (net.training, net.norm.training, net.frozen.training) == (True, True, False)
    assert torch.equal(net.norm.running_mean, torch.zeros(3))


def test_scores_come_from_the_splits_that_are_asked_for():
    vectors = np.array([[9, 9], [1, 0], [1, 0.5], [1, 0.2], [1, 0]], dtype=np.float32)  # the nearest is left out
    found = evaluate_embedder(vectors.__getitem__, Table(), "query", "gallery", "market")
    assert (found.map, len(found.ap)) == (1 / 2, 1)
    assert len(evaluate(Net(), Table(), Pictures(), "query", "gallery", "market", preprocess).ap) == 1


def test_the_image_is_named_whose_embedding_is_not_finite():
    vectors = np.ones((5, 2), dtype=np.float32)
    vectors[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"3\.jpg"):
        evaluate_embedder(vectors.__getitem__, Table(), "query", "gallery", "market")
