"""Does a latency budget keep its word: exported networks, timed side by side, against what was asked for.

Short trainings on noise. Some minutes on 2 cores.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.short import Noise, preset, train
from pipeline.compress.surgery import run_surgery
from pipeline.export.metadata import serialise
from pipeline.export.to_onnx import to_onnx
from pipeline.inference.latency_model import latency_model, stored_latency_ratio
from pipeline.inference.timing import measure
from pipeline.models.resnet import convert
from pipeline.models.spec import ArchSpec

ASKED = (0.3, 0.5, 0.7)
ROUNDS, REPEATS = 5, 60


def main() -> None:
    """Print the latency that was promised and the one that was measured."""
    for depth, width, size in ((26, 32, (64, 64)), (50, 64, (128, 128))):
        spec = ArchSpec.full(depth, width, 256)
        model = latency_model(spec, size, 8)
        with TemporaryDirectory() as folder:
            counted = replace(model, measured=partial(stored_latency_ratio, Path(folder) / "measured.json", spec, size))
            files = {}
            for asked in (None, *ASKED):
                params = preset(
                    "vehicles", data__image_size=list(size), teacher__depth=depth, teacher__width=width,
                    student__epochs=2, student__sites=["conv1", "conv2", "stream"], student__budget__of="latency",
                    student__budget__reduction=asked or 0.3, student__budget__start=0.0, student__budget__end=0.5,
                    student__budget__fade=0.3, student__budget__every=1,
                )  # fmt: skip
                noise = Noise(3, 12, size)
                task, net = train(params, noise, counted)
                probe = task.calibration[:2]
                small = run_surgery(net, task.teacher.spec, params.surgery, probe).net
                bare = convert(task.teacher, task.teacher.spec.model_copy(update={"identities": 0}))
                files[str(asked)] = Path(folder) / f"{asked}.onnx"
                files[str(asked)].write_bytes(serialise(to_onnx(bare if asked is None else small, size, 18)))
            runs = [{t.file: t.p50_ms for t in measure(files, size, [1], [0], REPEATS)} for _ in range(ROUNDS)]
        for asked in ASKED:
            left = float(np.median([run[str(asked)] / run["None"] for run in runs]))
            print(
                f"ResNet-{depth}, {size[0]} pixels: asked -{asked:.0%}, measured {left - 1:.1%}, "
                f"{left / (1 - asked) - 1:+.1%} off what was promised",
                flush=True,
            )


if __name__ == "__main__":
    main()
