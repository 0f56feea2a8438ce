"""Load an exported file for inference: check its hash, then its graph, then open it in ONNX Runtime."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from pipeline.export.embed import Embeddings, Pixels, embed_pixels, has_preprocessing
from pipeline.export.metadata import Metadata
from pipeline.export.release import ReleaseError, read_checked, sha256
from pipeline.inference.session import InferenceSession, open_session

ALLOWED_DOMAINS = {"", "ai.onnx"}
"""Operator domains of the ONNX standard; operators of other domains may run custom code."""
MAX_BYTES = 2**31 - 1
"""Size limit of a protobuf message."""
ORT_MAGIC = b"ORTM"
"""Bytes 4 to 8 of a file in ONNX Runtime's own format. Such a file may also parse as ONNX: the graph that was checked
would then not be the graph that runs."""


@dataclass(frozen=True)
class Model:
    """An exported file, opened in ONNX Runtime.

    Attributes:
        name: File name.
        sha256: Hexadecimal SHA-256 of the file.
    """

    name: str
    sha256: str
    metadata: Metadata
    session: InferenceSession

    @property
    def resizes(self) -> bool:
        """Whether the model accepts images of any size and resizes them itself."""
        return has_preprocessing(self.session)

    def embed(self, pixels: Pixels) -> Embeddings:
        """Embed upright images of the model's input size, (n, h, w, 3) uint8 RGB -> (n, D)."""
        return embed_pixels(self.session, pixels, self.metadata.mean, self.metadata.std)


def open_model(path: Path) -> Model:
    """Load a file of a release folder, after checking it against SHA256SUMS.

    Raises:
        ReleaseError: If it is missing, its hash differs, or this package did not write it.
    """
    if not path.exists():
        raise ReleaseError(f"{path} is missing; run `dvc repro` or `dvc pull`, or name an ONNX file of another release")
    return load_model(path.name, read_checked(path.parent, path.name))


def load_model(name: str, content: bytes) -> Model:
    """Load a model from bytes whose hash was checked already.

    Raises:
        ReleaseError: If this package did not write it.
    """
    check_graph(name, content)
    session = open_session(content)
    try:
        metadata = Metadata.parse(session.get_modelmeta().custom_metadata_map)
    except (KeyError, TypeError, ValueError) as error:
        raise ReleaseError(
            f"{name} lacks the metadata of stage `export` ({error}); only its files can be loaded"
        ) from None
    return Model(name, sha256(content), metadata, session)


def check_graph(name: str, content: bytes) -> None:
    """Reject models that could do more than compute an output from their input.

    Raises:
        ReleaseError: If the content is not ONNX, stores weights in other files, or uses operators outside the standard.
    """
    if len(content) > MAX_BYTES:
        raise ReleaseError(f"{name} has {len(content)} bytes; an ONNX file has at most {MAX_BYTES}")
    if content[4 : 4 + len(ORT_MAGIC)] == ORT_MAGIC:
        raise ReleaseError(f"{name} is in ONNX Runtime's own format; only ONNX files can be loaded")
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf raises DecodeError, which has no public import path
        raise ReleaseError(f"{name} is not an ONNX file ({error})") from None
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            raise ReleaseError(f"{name} stores `{message.name}` in another file; only single-file models can be loaded")
        if isinstance(message, onnx.NodeProto) and message.domain not in ALLOWED_DOMAINS:
            raise ReleaseError(
                f"{name} uses operator {message.domain}::{message.op_type}; only standard ONNX operators are allowed"
            )


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all nested ones: the attribute of an operator may hold a whole graph."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(child)
