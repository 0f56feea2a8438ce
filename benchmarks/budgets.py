"""Do students reach their budgets? ResNet-18, 50 and 101, MACs and params, multiples of 8 and of 1.

Short trainings on noise at full width; about ten minutes on 2 cores.
"""

import itertools

from benchmarks.short import Noise, preset, train
from pipeline.compress.student import remaining_spec
from pipeline.models import cost

SIZE = (32, 32)
WINDOWS = {8: 0.01, 1: 0.005}


def main() -> None:
    """Print the target and the reached reduction, and whether it lies in its window."""
    noise, misses = Noise(3, 12, SIZE), 0
    print("depth  of      multiple  target  reached  in window")
    for depth, of, multiple, target in itertools.product(
        (18, 50, 101), ("macs", "params"), (8, 1), (0.3, 0.5, 0.65, 0.8)
    ):
        params = preset(
            "vehicles", data__image_size=list(SIZE), teacher__depth=depth, teacher__width=64, student__epochs=4,
            student__sites=["conv1", "conv2", "stream"], student__channel_multiple=multiple,
            surgery__channel_multiple=multiple, student__budget__of=of, student__budget__reduction=target,
            student__budget__start=0.0, student__budget__end=0.5, student__budget__fade=0.3, student__budget__every=1,
        )  # fmt: skip
        task, net = train(params, noise)
        small, full = remaining_spec(net), task.compression.full
        count = cost.params if of == "params" else lambda spec: cost.macs(spec, SIZE)
        reached = 1 - count(small) / count(full)
        inside = target <= reached <= target + WINDOWS[multiple]
        misses += not inside
        print(f"{depth:<6} {of:<7} {multiple:<9} {target:<7} {reached:<8.4f} {'yes' if inside else 'NO'}", flush=True)
    print(f"{misses} outside their window")


if __name__ == "__main__":
    main()
