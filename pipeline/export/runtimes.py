"""What an exported file needs to run, and which runtimes load it."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Self

import onnx

from pipeline.export.release import ALL_IN_ONE, INT8, STUDENT, TEACHER

STANDARD_DOMAINS = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""

LEAST_ONNX_RUNTIME = {18: "1.15", 19: "1.16", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.24"}
"""Least version of ONNX Runtime that runs every file of a release on the CPU, by operator set.

Measured with the releases that PyPI has for Python 3.11, of which 1.15.0 is the oldest: the version runs all files, and
the minor version before it refuses at least one. https://onnxruntime.ai/docs/reference/compatibility.html names earlier
versions for some: they support the operator set, but lack kernels (1.15 for QuantizeLinear of 19, 1.23 for that of 23).
"""


@dataclass(frozen=True)
class Runtime:
    """A runtime other than ONNX Runtime for Python.

    Attributes:
        name: Name and version.
        files: Names of the files that suit it: their embeddings have a cosine of at least 0.9999 with ONNX Runtime's.
        note: What a user must consider, in Markdown.
    """

    name: str
    files: tuple[str, ...]
    note: str


WEB = Runtime("ONNX Runtime Web 1.30, WebAssembly", (STUDENT, ALL_IN_ONE, INT8, TEACHER), "tried in Node.js")
OPENVINO = Runtime(
    "OpenVINO 2026.4",
    (STUDENT, TEACHER),
    f"set `INFERENCE_PRECISION_HINT` to f32, else it computes in bf16 where the processor can; `{ALL_IN_ONE}` and "
    "an int8 file run, but round differently: cosines of 0.9997 and 0.998 with ONNX Runtime were measured",
)
OPENCV = Runtime(
    "OpenCV 4.14 and 5.0, `cv2.dnn`",
    (STUDENT, TEACHER),
    f"it has no Resize as in `{ALL_IN_ONE}`; OpenCV 5 refuses an int8 file, OpenCV 4 computes wrong embeddings with "
    "some",
)
NOT_TRIED = (
    Runtime(
        "TensorRT 10",
        (STUDENT, TEACHER),
        "not tried; by its list of operators it has no antialiased Resize, no uint8 inside of a network, and no int8 "
        "zero points other than 0: build float engines, or let TensorRT quantise",
    ),
    Runtime(
        "ONNX Runtime for Android, `onnxruntime-android`",
        (STUDENT, ALL_IN_ONE, INT8, TEACHER),
        "not tried; by its description it has all operators; the older `onnxruntime-mobile` has not, and needs another "
        "file format",
    ),
)
"""From docs/operators.md (10.15) of https://github.com/onnx/onnx-tensorrt and the packages' pages on Maven Central."""
RUNTIMES = (WEB, OPENVINO, OPENCV, *NOT_TRIED)


@dataclass(frozen=True)
class Requirements:
    """What a file needs.

    Attributes:
        opset: Version of the ONNX operator set.
        ir_version: Version of the ONNX file format.
        onnxruntime: Least version of ONNX Runtime, see `LEAST_ONNX_RUNTIME`.
        batch: Images in a call; None for any number.
    """

    opset: int
    ir_version: int
    onnxruntime: str
    batch: int | None

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Self:
        """Derive them from a model, which may be one from elsewhere with operators of other sets too."""
        opset = next(entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS)
        known = max(opset, min(LEAST_ONNX_RUNTIME))  # earlier sets run in every version
        return cls(
            opset, model.ir_version, LEAST_ONNX_RUNTIME.get(known, version("onnxruntime")), fixed_dimension(model)
        )

    def properties(self) -> Mapping[str, str]:
        """Convert to ONNX metadata properties."""
        return {"opset": f"{self.opset}", "ir_version": f"{self.ir_version}", "onnxruntime": f">={self.onnxruntime}"}


def fixed_dimension(model: onnx.ModelProto) -> int | None:
    """Return the number of images that every call of a model takes; None if it takes any number."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None
