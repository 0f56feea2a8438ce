"""Metadata stored inside an ONNX file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import onnx
from pydantic import TypeAdapter

from pipeline.config import Params
from pipeline.export.runtimes import STANDARD_DOMAINS, Requirements

DIGEST_SECTIONS = ("data", "seed", "teacher", "student", "surgery", "export")
"""Sections of params.yaml that decide the content of a file; the others change speed or logging only."""


RENDERED_LICENCES = ("Apache-2.0 (trained on rendered images)", "Apache-2.0 (it learnt from rendered images)")
"""Defaults of `export.licence`, now and in 0.1.0: they hold for the rendered data set only."""


@dataclass(frozen=True)
class Metadata:
    """The custom metadata of an exported ONNX file.

    Attributes:
        data: `data.source` of the training and test images.
        data_digest: SHA-256 of the manifest.
        params_digest: See `params_digest`.
        git_commit: Commit of the sources, with a trailing "+" if they had uncommitted changes; `unknown` outside Git.
        licence: `export.licence`.
        protocol: Evaluation protocol of `map`, as `pipeline.protocols.conditions` shows it.
        map: mAP of this file on the test set, computed with ONNX Runtime, in [0, 1].
        image_size: (height, width) of the input, pixels.
        mean: Per channel (RGB), for pixels in [0, 1], as `std`.
        params: Number of learnable parameters.
        macs: Multiply-accumulates per image; None if they are not known.
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
    macs: int | None

    def properties(self) -> dict[str, str]:
        """Convert to ONNX metadata properties: strings are kept, numbers and lists become JSON."""
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.__dict__.items()}

    @classmethod
    def parse(cls, properties: Mapping[str, str]) -> Self:
        """Build from ONNX metadata properties.

        Raises:
            KeyError: If a property is missing.
            ValueError: If a property has the wrong type.
        """
        texts = ((field.name, field.type, properties[field.name]) for field in fields(cls))
        return TypeAdapter(cls).validate_python({name: t if kind is str else json.loads(t) for name, kind, t in texts})


def params_digest(params: Params) -> str:
    """Compute the SHA-256 of `DIGEST_SECTIONS` as JSON with sorted keys."""
    content = params.model_dump(mode="json", include=set(DIGEST_SECTIONS))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finish(model: onnx.ModelProto, metadata: Metadata) -> bytes:
    """Set the metadata and the IR version of a model in place, check the model, and return the content of its file.

    The IR version is the lowest that the operator set allows, because a runtime refuses files with a later one than its
    own. Exporter and quantiser write their own, so it is set last. A network from elsewhere with operators of another
    domain keeps its own.

    Raises:
        onnx.checker.ValidationError: If the model is not valid ONNX.
    """
    if all(entry.domain in STANDARD_DOMAINS for entry in model.opset_import):
        model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    onnx.helper.set_model_props(model, {**metadata.properties(), **Requirements.of(model).properties()})
    onnx.checker.check_model(model, full_check=True)
    return serialise(model)


def serialise(model: onnx.ModelProto) -> bytes:
    """Serialise deterministically: equal models give equal bytes."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
