"""How much of the ratio of MACs becomes speed: ResNet-50 at full width, 224 x 224 pixels, 65 % fewer MACs.

Widths are those of a surgery after a short training on noise: how fast a network is depends on its shape alone. About
five minutes on 2 cores.
"""

import tempfile
from pathlib import Path

from benchmarks.short import Noise, preset, train
from pipeline.compress.student import remaining_spec
from pipeline.inference.footprint import plain_layers
from pipeline.inference.timing import gain, measure
from pipeline.inference.timing_graph import timing_graph
from pipeline.models import cost

SIZE, ASKED, REPEATS = (224, 224), 0.65, 50
SETTINGS = ((1, 0), (1, 1), (8, 0))
"""Images a call, and threads (0 for all)."""


def main() -> None:
    """Print ideal and realised ratio by setting."""
    params = preset(
        "vehicles", data__image_size=list(SIZE), teacher__depth=50, teacher__width=64, student__epochs=4,
        student__budget__reduction=ASKED, student__budget__start=0.0, student__budget__end=0.5,
        student__budget__fade=0.3, student__budget__every=1,
    )  # fmt: skip
    task, net = train(params, Noise(3, 12, SIZE))
    full, small = task.teacher.spec, remaining_spec(net)
    ideal = cost.macs(full, SIZE) / cost.macs(small, SIZE)
    print(f"MACs {cost.macs(full, SIZE):,} -> {cost.macs(small, SIZE):,}, ratio {ideal:.2f}")
    print(f"parameters {cost.params(full):,} -> {cost.params(small):,}")
    with tempfile.TemporaryDirectory() as folder:
        files = {"full": Path(folder) / "full.onnx", "small": Path(folder) / "small.onnx"}
        for path, spec in zip(files.values(), (full, small), strict=True):
            path.write_bytes(timing_graph(spec, SIZE))
        print(f"convolutions outside of the fast layout: {', '.join(plain_layers(files['small'])) or 'none'}")
        for batch, threads in SETTINGS:
            slow, fast = measure(files, SIZE, [batch], [threads], REPEATS)
            found = gain(slow, fast)
            print(
                f"batch {batch}, {threads or 'all'} threads: {slow.p50_ms:.1f} -> {fast.p50_ms:.1f} ms, "
                f"{found.ratio:.2f} times ({found.low:.2f} to {found.high:.2f}"
                f"{'' if found.conclusive else ', inconclusive'}), realised {found.ratio / ideal:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
