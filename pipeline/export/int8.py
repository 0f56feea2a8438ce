"""Static int8 quantisation (QDQ), kept only if the file is faster on this machine and loses little mAP.

Weights and activations are quantised; activation ranges are calibrated on training images.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from pipeline.export.runtimes import fixed_dimension
from pipeline.inference.session import INPUT, open_session  # before onnxruntime: it turns telemetry off
from pipeline.inference.timing import Gain

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static  # isort: skip
from onnxruntime.quantization.shape_inference import quant_pre_process  # isort: skip

CALIBRATION_IMAGES = 256
CALIBRATION_BATCH = 32
Inputs = npt.NDArray[np.float32]
"""A batch of normalised images, (n, 3, h, w)."""


@dataclass(frozen=True)
class Recipe:
    """Quantisation settings.

    Attributes:
        name: Types of activations and weights: U8S8 is unsigned activations and signed weights.
        unsigned: Whether activations are unsigned.
        per_channel: Whether each output channel has its own scale.
    """

    name: str
    unsigned: bool
    per_channel: bool


RECIPES = (
    Recipe("U8S8 by channel", unsigned=True, per_channel=True),
    Recipe("S8S8", unsigned=False, per_channel=False),
)
"""The fastest recipe in measurements, and the one that ONNX Runtime's manual recommends to try first.

Both use 7-bit weights. With 8 bits, x86 processors without VNNI compute wrong sums: they add two products in 16 bits,
which overflow. A file may run on another processor than the one that exported it.
"""


@dataclass(frozen=True)
class Candidate:
    """The file that a recipe gave.

    Attributes:
        recipe: Name of the recipe.
        speedup: Latency of the float file divided by that of this file, for one image (or `export.batch`) with all
            threads.
        speedup_low: Lower end of the 95 % confidence interval of `speedup`.
        map: mAP on the test set, in [0, 1]; None if it was not evaluated: not faster than float, or slower than the
            candidate that was chosen.
        bytes: Size of the file.
    """

    recipe: str
    speedup: float
    speedup_low: float
    map: float | None
    bytes: int


@dataclass(frozen=True)
class Int8Result:
    """The chosen int8 model, or the reason why there is none.

    Attributes:
        model: The chosen model; None if no candidate qualified.
        map: Its mAP on the test set; None if no candidate qualified.
        reason: Why this candidate was chosen, or why none was.
        calls: What was timed, such as `one image`.
        candidates: All candidates, fastest first.
        saturates: Result of `int8_products_saturate` on this machine.
    """

    model: onnx.ModelProto | None
    map: float | None
    reason: str
    calls: str
    candidates: tuple[Candidate, ...]
    saturates: bool

    @property
    def markdown(self) -> str:
        """The section of the model card about int8."""
        rows = "\n".join(
            f"| {candidate.recipe} | {candidate.speedup:.2f} | {candidate.speedup_low:.2f} "
            f"| {'not evaluated' if candidate.map is None else f'{candidate.map:.4f}'} | {candidate.bytes:,} |"
            for candidate in self.candidates
        )
        sums = "can overflow when adding 8-bit products" if self.saturates else "adds 8-bit products exactly"
        return (
            f"There is {'an' if self.model else 'no'} int8 file. {self.reason}.\n\n"
            f"The processor that exported these files {sums}. Int8 weights have 7 bits, which keeps sums exact on any "
            f"processor.\n\n| recipe | speed-up over float, {self.calls} | at least (95 %) | mAP | bytes |\n"
            f"|---|---|---|---|---|\n{rows}"
        )


def choose(
    model: onnx.ModelProto,
    inputs: Sequence[Inputs],
    float_map: float,
    max_map_loss: float,
    score: Callable[[bytes], float],
    gains: Callable[[Mapping[str, bytes]], Mapping[str, Gain]],
) -> Int8Result:
    """Quantise with each recipe; choose the fastest file that is faster than float and loses little mAP.

    Args:
        model: Float model.
        inputs: Calibration batches of normalised training images, (n, 3, h, w) each.
        float_map: mAP of the float model.
        max_map_loss: Largest mAP that the int8 file may lose.
        score: Computes the mAP of a file.
        gains: Measures the speed-up over the float file of each file, by name.
    """
    saturates, batch = int8_products_saturate(), fixed_dimension(model) or 1
    calls = "one image" if batch == 1 else f"{batch} images a call"
    models = {recipe.name: quantise(model, inputs, recipe) for recipe in RECIPES}
    contents = {name: quantised.SerializeToString() for name, quantised in models.items()}
    speedups, candidates, reasons = gains(contents), [], []
    chosen: tuple[str, float] | None = None
    for name in sorted(models, key=lambda name: -speedups[name].ratio):
        speedup = speedups[name]
        int8_map = score(contents[name]) if speedup.low > 1 and chosen is None else None
        candidates.append(Candidate(name, speedup.ratio, speedup.low, int8_map, len(contents[name])))
        if speedup.low <= 1:
            reasons.append(
                f"{name} is not reliably faster than float ({speedup.ratio:.2f} times, at least {speedup.low:.2f})"
            )
        elif int8_map is not None and not float_map - int8_map <= max_map_loss:  # rejects NaN too
            reasons.append(f"{name} loses {float_map - int8_map:.4f} mAP ({max_map_loss:g} allowed)")
        elif int8_map is not None:
            chosen = (name, int8_map)
    if chosen is None:
        return Int8Result(None, None, "; ".join(reasons), calls, tuple(candidates), saturates)
    name, int8_map = chosen
    reason = f"{name}: {speedups[name].ratio:.2f} times as fast as float on {calls}, mAP {int8_map - float_map:+.4f}"
    return Int8Result(models[name], int8_map, reason, calls, tuple(candidates), saturates)


def quantise(model: onnx.ModelProto, inputs: Sequence[Inputs], recipe: Recipe) -> onnx.ModelProto:
    """Return a copy of a float model with quantised weights and activations, calibrated on `inputs`."""
    with tempfile.TemporaryDirectory() as folder, _root_logger_at_error():
        floats, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("floats", "prepared", "quantised"))
        floats.write_bytes(model.SerializeToString())
        # Symbolic shape inference fails at the L2 normalisation of the embedding; plain shape inference suffices.
        quant_pre_process(str(floats), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantised),
            _Reader(inputs),
            quant_format=QuantFormat.QDQ,
            per_channel=recipe.per_channel,
            reduce_range=True,
            activation_type=QuantType.QUInt8 if recipe.unsigned else QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        graph = onnx.load(quantised).graph
    # Keep the graph only: the quantiser also lists every operator domain of ONNX Runtime, in an order that varies.
    plain = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    plain.producer_name, plain.producer_version = model.producer_name, model.producer_version
    return plain


def int8_products_saturate() -> bool:
    """Return whether this processor adds pairs of uint8 x int8 products in 16 bits, where they can overflow."""
    count = 64
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["left", "right"], ["sum"])],
        "probe",
        [
            helper.make_tensor_value_info("left", TensorProto.UINT8, [1, count]),
            helper.make_tensor_value_info("right", TensorProto.INT8, [count, 1]),
        ],
        [helper.make_tensor_value_info("sum", TensorProto.INT32, [1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    left, right = np.full((1, count), 255, np.uint8), np.full((count, 1), 127, np.int8)
    total = open_session(model.SerializeToString(), 1).run(None, {"left": left, "right": right})[0]
    return bool(total != count * 255 * 127)


class _Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime ships no types
    """Feeds calibration batches to ONNX Runtime one by one."""

    def __init__(self, inputs: Sequence[Inputs]) -> None:
        self._batches = iter([{INPUT: batch} for batch in inputs])

    def get_next(self) -> dict[str, Inputs] | None:
        return next(self._batches, None)


@contextmanager
def _root_logger_at_error() -> Iterator[None]:
    """Silence the quantiser, which logs advice such as running pre-processing to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
