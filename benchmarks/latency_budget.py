"""Do students keep a latency budget? Exported networks are timed side by side and compared with the target.

Short trainings on noise; some minutes on 2 cores.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.short import Noise, preset, train
from pipeline.compress.student import copy_of
from pipeline.compress.surgery import run_surgery
from pipeline.export.metadata import serialise
from pipeline.export.to_onnx import to_onnx
from pipeline.inference.latency_model import latency_model, stored_latency_ratio
from pipeline.inference.timing import measure
from pipeline.models.resnet import convert
from pipeline.models.spec import ArchSpec

TARGETS = (0.3, 0.5, 0.7)
ROUNDS, REPEATS = 5, 60


def main() -> None:
    """Print the target and the measured reduction of latency."""
    for depth, width, size in ((26, 32, (64, 64)), (50, 64, (128, 128))):
        spec = ArchSpec.full(depth, width, 256)
        model = latency_model(spec, size, 8)
        with TemporaryDirectory() as folder:
            budget_cost = replace(
                model, measured=partial(stored_latency_ratio, Path(folder) / "measured.json", spec, size)
            )
            files = {}
            for target in (None, *TARGETS):
                params = preset(
                    "vehicles", data__image_size=list(size), teacher__depth=depth, teacher__width=width,
                    student__epochs=2, student__sites=["conv1", "conv2", "stream"], student__budget__of="latency",
                    student__budget__reduction=target or 0.3, student__budget__start=0.0, student__budget__end=0.5,
                    student__budget__fade=0.3, student__budget__every=1,
                )  # fmt: skip
                noise = Noise(3, 12, size)
                task, net = train(params, noise, budget_cost)
                probe = task.calibration[:2]
                small = run_surgery(net, task.compression.full, params.surgery, probe).net
                bare = convert(copy_of(task.teacher), task.compression.full.model_copy(update={"identities": 0}))
                files[str(target)] = Path(folder) / f"{target}.onnx"
                files[str(target)].write_bytes(serialise(to_onnx(bare if target is None else small, size, 18)))
            runs = [{t.file: t.p50_ms for t in measure(files, size, [1], [0], REPEATS)} for _ in range(ROUNDS)]
        for target in TARGETS:
            left = float(np.median([run[str(target)] / run["None"] for run in runs]))
            print(
                f"ResNet-{depth}, {size[0]} pixels: target -{target:.0%}, measured {left - 1:.1%}, "
                f"{left / (1 - target) - 1:+.1%} from the target",
                flush=True,
            )


if __name__ == "__main__":
    main()
