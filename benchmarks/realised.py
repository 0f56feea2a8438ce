"""Speedup of ResNet-50 at full width with 65 % fewer MACs, 224 x 224 pixels, compared with the ratio of MACs.

The widths come from a short training on noise, because latency depends on the shape only; five minutes on 2 cores.
"""

import tempfile
from pathlib import Path

from benchmarks.short import Noise, preset, train
from pipeline.compress.student import remaining_spec
from pipeline.inference.footprint import plain_layers
from pipeline.inference.timing import gain, measure
from pipeline.inference.timing_graph import timing_graph
from pipeline.models import cost

SIZE, REDUCTION, REPEATS = (224, 224), 0.65, 50
SETTINGS = ((1, 0), (1, 1), (8, 0))
"""Images per call, and threads (0 for all)."""


def main() -> None:
    """Print the ideal and the realised speedup by setting."""
    params = preset(
        "vehicles", data__image_size=list(SIZE), teacher__depth=50, teacher__width=64, student__epochs=4,
        student__budget__reduction=REDUCTION, student__budget__start=0.0, student__budget__end=0.5,
        student__budget__fade=0.3, student__budget__every=1,
    )  # fmt: skip
    task, net = train(params, Noise(3, 12, SIZE))
    full, small = task.compression.full, remaining_spec(net)
    ideal = cost.macs(full, SIZE) / cost.macs(small, SIZE)
    print(f"MACs {cost.macs(full, SIZE):,} -> {cost.macs(small, SIZE):,}, ratio {ideal:.2f}")
    print(f"parameters {cost.params(full):,} -> {cost.params(small):,}")
    with tempfile.TemporaryDirectory() as folder:
        files = {"full": Path(folder) / "full.onnx", "small": Path(folder) / "small.onnx"}
        for path, spec in zip(files.values(), (full, small), strict=True):
            path.write_bytes(timing_graph(spec, SIZE))
        print(f"convolutions that do not run in the fast layout: {', '.join(plain_layers(files['small'])) or 'none'}")
        for batch, threads in SETTINGS:
            slow, fast = measure(files, SIZE, [batch], [threads], REPEATS)
            speedup = gain(slow, fast)
            print(
                f"batch {batch}, {threads or 'all'} threads: {slow.p50_ms:.1f} -> {fast.p50_ms:.1f} ms, "
                f"{speedup.ratio:.2f} times ({speedup.low:.2f} to {speedup.high:.2f}"
                f"{'' if speedup.conclusive else ', inconclusive'}), realised {speedup.ratio / ideal:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
