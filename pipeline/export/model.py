"""An exported file as its users run it: hashed before it is parsed, looked through before it is loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from pipeline.export.embed import Embeddings, Pixels, embed_pixels, takes_pixels
from pipeline.export.metadata import Metadata
from pipeline.export.release import ReleaseError, read_checked, sha256
from pipeline.inference.session import InferenceSession, open_session

DOMAINS = {"", "ai.onnx"}
"""Of operators: the standard's own. Others are code that a runtime was given beside it."""
LARGEST = 2**31 - 1
"""Bytes; a protobuf message holds no more."""
NATIVE = b"ORTM"
"""At byte 4 of files in ONNX Runtime's own format, which may be ONNX as well; only one of the two is looked through."""


@dataclass(frozen=True)
class Model:
    """A file that can be run.

    Attributes:
        name: Of the file.
        sha256: Of its content.
        metadata: What it says about itself.
        session: That runs it.
    """

    name: str
    sha256: str
    metadata: Metadata
    session: InferenceSession

    @property
    def resizes(self) -> bool:
        """Whether it takes pictures of any size."""
        return takes_pixels(self.session)

    def embed(self, pixels: Pixels) -> Embeddings:
        """Embed upright pictures of the model's input size, (n, h, w, 3) uint8 RGB -> (n, D)."""
        return embed_pixels(self.session, pixels, self.metadata.mean, self.metadata.std)


def open_model(path: Path) -> Model:
    """Load a file of a release; SHA256SUMS is beside it.

    Raises:
        ReleaseError: If its hash is not the one that was written, or it is no file that this package writes.
    """
    return load_model(path.name, read_checked(path.parent, path.name))


def load_model(name: str, content: bytes) -> Model:
    """Load the content of a file whose hash is right.

    Raises:
        ReleaseError: If it is no file that this package writes.
    """
    check_graph(name, content)
    session = open_session(content)
    try:
        metadata = Metadata.parse(session.get_modelmeta().custom_metadata_map)
    except (KeyError, TypeError, ValueError) as error:
        raise ReleaseError(f"{name} does not say what it is ({error}); it was not written by this package") from None
    return Model(name, sha256(content), metadata, session)


def check_graph(name: str, content: bytes) -> None:
    """Refuse what could do more than compute.

    Raises:
        ReleaseError: If it is no ONNX, keeps weights in other files, or has operators that are not the standard's.
    """
    if len(content) > LARGEST:
        raise ReleaseError(f"{name} has {len(content)} bytes; at most {LARGEST} can be ONNX")
    if content[4 : 4 + len(NATIVE)] == NATIVE:
        raise ReleaseError(f"{name} is in ONNX Runtime's own format; only ONNX is loaded")
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own, of no public class
        raise ReleaseError(f"{name} is no ONNX file ({error})") from None
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            raise ReleaseError(f"{name} keeps `{message.name}` in another file; only single files are loaded")
        if isinstance(message, onnx.NodeProto) and message.domain not in DOMAINS:
            raise ReleaseError(f"{name} has an operator {message.domain}::{message.op_type}, which is not ONNX's own")


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all inside of it, at any depth: an operator's attribute may hold a graph."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(child)
