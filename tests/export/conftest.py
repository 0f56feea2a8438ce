"""A tiny network, exported once for all tests: the exporter takes seconds."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from pipeline.config import Limits
from pipeline.export.metadata import Metadata, finish
from pipeline.export.parity import Probe
from pipeline.export.to_onnx import to_onnx
from pipeline.models.resnet import RetrievalNet
from pipeline.retrieval.embed import embed
from tests.export.tiny_network import ABOUT, MEAN, SIZE, STD, Pictures, normalise, tiny_net


@pytest.fixture(scope="session")
def net() -> RetrievalNet:
    return tiny_net(0)


@pytest.fixture(scope="session")
def translated(net: RetrievalNet) -> bytes:
    """What `to_onnx` returns, as bytes: messages are mutable."""
    return to_onnx(net, SIZE, opset=18).SerializeToString()


@pytest.fixture(scope="session")
def metadata() -> Metadata:
    return ABOUT


@pytest.fixture(scope="session")
def content(translated: bytes, metadata: Metadata) -> bytes:
    """Content of a finished file."""
    return finish(onnx.load_from_string(translated), metadata)


@pytest.fixture(scope="session")
def reference(net: RetrievalNet) -> np.ndarray:
    """Torch's embeddings of all pictures."""
    return embed(net, Pictures(), np.arange(12), normalise)


@pytest.fixture
def probe() -> Callable[..., Probe]:
    """Makes probes of all pictures; what is given replaces the default."""

    def make(score: Callable[[np.ndarray], float] = lambda _: 0.5, **limits: float) -> Probe:
        bounds = Limits(**{"min_cosine": 0.99999, "map_difference": 1e-4, "int8_map_loss": 0.005} | limits)
        return Probe(Pictures(), np.arange(12), 2, MEAN, STD, score, bounds)

    return make
