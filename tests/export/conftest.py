"""A tiny network, exported once for all tests: the exporter takes seconds."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from pipeline.config import Limits
from pipeline.export.metadata import Metadata, finish
from pipeline.export.parity import ParityCheck
from pipeline.export.to_onnx import to_onnx
from pipeline.models.resnet import RetrievalNet
from pipeline.retrieval.embed import embed
from tests.export.tiny_network import MEAN, METADATA, SIZE, STD, Pictures, normalise, tiny_net


@pytest.fixture(scope="session")
def net() -> RetrievalNet:
    return tiny_net(0)


@pytest.fixture(scope="session")
def translated(net: RetrievalNet) -> bytes:
    """Output of `to_onnx`, as bytes because protobuf messages are mutable."""
    return to_onnx(net, SIZE, opset=18).SerializeToString()


@pytest.fixture(scope="session")
def metadata() -> Metadata:
    return METADATA


@pytest.fixture(scope="session")
def content(translated: bytes, metadata: Metadata) -> bytes:
    """Content of a file with metadata."""
    return finish(onnx.load_from_string(translated), metadata)


@pytest.fixture(scope="session")
def reference(net: RetrievalNet) -> np.ndarray:
    """Embeddings of all images by torch."""
    return embed(net, Pictures(), np.arange(12), normalise)


@pytest.fixture
def make_check() -> Callable[..., ParityCheck]:
    """Build parity checks of all images; arguments replace the default score and limits."""

    def make(score: Callable[[np.ndarray], float] = lambda _: 0.5, **limits: float) -> ParityCheck:
        merged = Limits(**{"min_cosine": 0.99999, "map_difference": 1e-4, "int8_map_loss": 0.005} | limits)
        return ParityCheck(Pictures(), np.arange(12), 2, MEAN, STD, score, merged)

    return make
