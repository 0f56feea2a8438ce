"""Eight bits instead of 32: static quantisation, kept only if it is faster here and finds the same.

Weights and activations are quantised (QDQ) with ranges seen on training images.
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

from pipeline.inference.session import INPUT, open_session  # before the next: it turns telemetry off
from pipeline.inference.timing import Gain

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static  # isort: skip
from onnxruntime.quantization.shape_inference import quant_pre_process  # isort: skip

CALIBRATED = 256
"""Training images that ranges are seen on."""
BATCH = 32
"""Of them at a time."""
Inputs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """One way to quantise.

    Attributes:
        name: Activations and weights, signed or not.
        unsigned: Whether activations are.
        per_channel: Whether each output channel has a scale of its own.
    """

    name: str
    unsigned: bool
    per_channel: bool


RECIPES = (
    Recipe("U8S8 by channel", unsigned=True, per_channel=True),
    Recipe("S8S8", unsigned=False, per_channel=False),
)
"""What measuring gave, and what ONNX Runtime's manual says to try first.

All weights have seven bits. With eight, x86 processors without VNNI are wrong: they add two products in 16 bits, which
overflow. A file may run on another processor than it was made on.
"""


@dataclass(frozen=True)
class Candidate:
    """What a recipe led to.

    Attributes:
        recipe: Its name.
        speedup: Time of the float file / its own, one image, all threads.
        at_least: Lower end of the speed-up's 95 % interval.
        map: mAP on the test set; None where it was not asked, for want of speed.
        bytes: Size of the file.
    """

    recipe: str
    speedup: float
    at_least: float
    map: float | None
    bytes: int

    @property
    def quality(self) -> str:
        """Its mAP, in words."""
        return "not asked" if self.map is None else f"{self.map:.4f}"


@dataclass(frozen=True)
class Int8Result:
    """Whether there is an int8 file.

    Attributes:
        model: It; None if there is none.
        map: Its mAP on the test set; None if there is none.
        reason: Why there is one, or none.
        trials: All that was tried.
        saturates: Whether this processor gets sums of 8-bit products wrong, see `saturates`.
    """

    model: onnx.ModelProto | None
    map: float | None
    reason: str
    trials: tuple[Candidate, ...]
    saturates: bool

    @property
    def text(self) -> str:
        """For people, as Markdown."""
        rows = "\n".join(
            f"| {trial.recipe} | {trial.speedup:.2f} | {trial.at_least:.2f} | {trial.quality} | {trial.bytes:,} |"
            for trial in self.trials
        )
        sums = "gets some sums of 8-bit products wrong" if self.saturates else "adds 8-bit products rightly"
        return (
            f"{'There is an int8 file' if self.model else 'There is no int8 file'}. {self.reason}. The processor that "
            f"it was tried on {sums}; the weights have 7 bits, with which no sum overflows.\n\n"
            f"| recipe | times as fast, one image | at least | mAP | bytes |\n|---|---|---|---|---|\n{rows}"
        )


def choose(
    model: onnx.ModelProto,
    inputs: Sequence[Inputs],
    reference: float,
    largest_loss: float,
    score: Callable[[bytes], float],
    gains: Callable[[Mapping[str, bytes]], Mapping[str, Gain]],
) -> Int8Result:
    """Quantise by each recipe; take the fastest that is faster than floats and loses little.

    Args:
        model: With floats.
        inputs: (n, 3, h, w) each, normalised training images; ranges are seen on them.
        reference: mAP of the float file.
        largest_loss: Of mAP.
        score: mAP of a file.
        gains: How much faster than the float file each of some files is, by name.
    """
    wrong_sums = saturates()
    files = {recipe.name: quantise(model, inputs, recipe) for recipe in RECIPES}
    contents = {name: file.SerializeToString() for name, file in files.items()}
    found, trials, reasons = gains(contents), [], []
    chosen: tuple[str, float] | None = None
    for name in sorted(files, key=lambda name: -found[name].ratio):
        speed = found[name]
        quality = score(contents[name]) if speed.low > 1 and chosen is None else None
        trials.append(Candidate(name, speed.ratio, speed.low, quality, len(contents[name])))
        if speed.low <= 1:
            reasons.append(
                f"{name} is not faster than floats for sure ({speed.ratio:.2f} times, at least {speed.low:.2f})"
            )
        elif quality is not None and not reference - quality <= largest_loss:  # NaN loses
            reasons.append(f"{name} loses {reference - quality:.4f} mAP ({largest_loss:g} are allowed)")
        elif quality is not None:
            chosen = (name, quality)
    if chosen is None:
        return Int8Result(None, None, "; ".join(reasons), tuple(trials), wrong_sums)
    name, quality = chosen
    reason = f"{name}: {found[name].ratio:.2f} times as fast as floats on one image, mAP {quality - reference:+.4f}"
    return Int8Result(files[name], quality, reason, tuple(trials), wrong_sums)


def quantise(model: onnx.ModelProto, inputs: Sequence[Inputs], recipe: Recipe) -> onnx.ModelProto:
    """Quantise weights and activations.

    Args:
        model: With floats; left as it is.
        inputs: As in `choose`.
        recipe: How.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        floats, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("floats", "prepared", "quantised"))
        floats.write_bytes(model.SerializeToString())
        # Symbolic shapes fail at the embedding's scaling to length 1; plain ones suffice.
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
        found = onnx.load(quantised)
    # What it names beside the graph (all domains that the runtime knows, in any order) says nothing about it.
    plain = helper.make_model(found.graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    plain.producer_name, plain.producer_version = model.producer_name, model.producer_version
    return plain


def saturates() -> bool:
    """Whether this processor adds two products of unsigned and signed bytes in 16 bits, which is too few."""
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
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    left, right = np.full((1, count), 255, np.uint8), np.full((count, 1), 127, np.int8)
    total = open_session(probe.SerializeToString(), 1).run(None, {"left": left, "right": right})[0]
    return bool(total != count * 255 * 127)


class _Reader(CalibrationDataReader):  # type: ignore[misc] # of a library without types
    """Hands batches to the calibration, one by one."""

    def __init__(self, inputs: Sequence[Inputs]) -> None:
        self._rest = iter([{INPUT: batch} for batch in inputs])

    def get_next(self) -> dict[str, Inputs] | None:
        return next(self._rest, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the quantiser says to users that it takes for others."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
