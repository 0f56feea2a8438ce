"""A network as one ONNX file: float images in, embeddings of length 1 out, what it is in its metadata.

Equal weights of one commit give equal bytes: nothing in a file tells when, where or by whom it was made.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import onnx
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from pipeline.config import Params
from pipeline.inference.session import INPUT, OUTPUT
from pipeline.models.head import l2_normalise
from pipeline.models.resnet import RetrievalNet, convert

IR_VERSION = 10
"""Of the file format; ONNX Runtime from 1.19 (2024) reads it."""

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


class Embedder(nn.Module):
    """What is exported: a network without its classifier, and its embedding scaled to length 1.

    Args:
        net: Network, left as it is.
    """

    def __init__(self, net: RetrievalNet) -> None:
        super().__init__()
        self.net = convert(net, net.spec.model_copy(update={"identities": 0})).cpu()

    def forward(self, image: Tensor) -> Tensor:
        """Embed normalised images, (B, 3, H, W) -> (B, D)."""
        return l2_normalise(self.net(image).embedding)


def to_onnx(net: RetrievalNet, image_size: tuple[int, int], opset: int) -> onnx.ModelProto:
    """Translate a network.

    Args:
        net: Network in torch.
        image_size: Height and width of the input, pixels; the batch may have any size.
        opset: Operator set.

    Raises:
        RuntimeError: If the exporter falls back to another operator set.
    """
    example = torch.zeros(2, 3, *image_size)  # a batch of 1 would be taken for a constant
    program = torch.onnx.export(
        Embedder(net).eval(),
        (example,),
        dynamo=True,
        external_data=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={"image": {0: "batch"}},
        opset_version=opset,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model_proto
    used = {entry.domain: entry.version for entry in model.opset_import}
    if used != {"": opset}:
        raise RuntimeError(
            f"`export.opset` {opset} became {used}; set it to one that torch {torch.__version__} can write"
        )
    model.ir_version = IR_VERSION
    _strip(model)
    return model


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


def _strip(message: Any) -> None:
    """Take the exporter's notes out of a protobuf message, at any depth: stack traces with local paths, class names."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                _strip(child)
