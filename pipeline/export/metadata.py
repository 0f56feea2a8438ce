"""What an ONNX file says about itself."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import onnx
from pydantic import TypeAdapter

from pipeline.config import Params

DECISIVE = ("data", "seed", "teacher", "student", "surgery", "export")
"""Sections of params.yaml that decide what is exported; the others change how fast it runs or where it is recorded."""


@dataclass(frozen=True)
class Metadata:
    """What a file says about itself.

    Attributes:
        data: Kind of data that it was trained and evaluated on.
        data_digest: SHA-256 of the manifest.
        params_digest: SHA-256 of the params, see `params_digest`.
        git_commit: Of the sources, with a plus sign where they were changed since; `unknown` outside of Git.
        licence: What the file may be used for, in the words of params.yaml.
        protocol: Of the mAP.
        map: mAP of this file on the test set, by ONNX Runtime, in [0, 1].
        image_size: Height and width of the input, pixels.
        mean: By channel (RGB), of pixels in [0, 1].
        std: Likewise.
        embedding_dim: Length of the embedding.
        params: Learnable parameters.
        macs: Multiply-accumulates an image.
    """

    data: str
    data_digest: str
    params_digest: str
    git_commit: str
    licence: str
    protocol: str
    map: float
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embedding_dim: int
    params: int
    macs: int

    def properties(self) -> dict[str, str]:
        """As ONNX holds them: text under text; numbers and lists are JSON."""
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.__dict__.items()}

    @classmethod
    def parse(cls, properties: Mapping[str, str]) -> Self:
        """Back from what ONNX holds.

        Raises:
            KeyError: If a property is missing.
            ValueError: If one is not what it should be.
        """
        held = ((field.name, field.type, properties[field.name]) for field in fields(cls))
        return TypeAdapter(cls).validate_python({name: t if kind is str else json.loads(t) for name, kind, t in held})


def params_digest(params: Params) -> str:
    """SHA-256 of the sections that decide what is exported, as JSON with sorted keys."""
    content = params.model_dump(mode="json", include=set(DECISIVE))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finish(model: onnx.ModelProto, metadata: Metadata) -> bytes:
    """Content of a file with its metadata, checked in full.

    Args:
        model: From `to_onnx`.
        metadata: Replaces what the model has.

    Raises:
        onnx.checker.ValidationError: If it is not valid ONNX.
    """
    onnx.helper.set_model_props(model, metadata.properties())
    onnx.checker.check_model(model, full_check=True)
    return serialise(model)


def serialise(model: onnx.ModelProto) -> bytes:
    """Bytes that depend on the content alone."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
