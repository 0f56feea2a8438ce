"""The content of a small ONNX file."""

import pytest

from pipeline.inference.timing_graph import timing_graph
from pipeline.models.spec import ArchSpec


@pytest.fixture(scope="session")
def content() -> bytes:
    return timing_graph(ArchSpec.full(14, 8, 16), (32, 32))
