"""Parameters, MACs and latency of published small networks beside teacher and student, at the same image size.

torchvision's networks have random weights here, so their retrieval quality is not measured. Run `dvc repro` first.
"""

import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from pipeline.files import Files, read_json
from pipeline.inference.timing import gain, measure
from pipeline.stage.params_file import load

NAMES = ("shufflenet_v2_x0_5", "mobilenet_v3_small", "mobilenet_v3_large", "resnet18", "resnet50")
REPEATS = 50


def main() -> None:
    """Print one line per network."""
    files = Files.here()
    settings = load(files.params)
    size, batch = settings.data.image_size, min(settings.benchmark.batches)
    export = files.artifacts("export")
    paths = {"teacher": export / "teacher.onnx", "student": export / "model.onnx"}
    records = {"teacher": read_json(files.metrics("teacher")), "student": read_json(files.metrics("export"))}
    sizes = {name: (int(record["params"]), int(record["macs"])) for name, record in records.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            net = models.get_model(name, weights=None).eval()
            image = torch.zeros(2, 3, *size)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(image[:1])
            sizes[name] = (sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops() // 2)
            paths[name] = Path(folder) / f"{name}.onnx"
            torch.onnx.export(
                net, (image,), str(paths[name]), dynamo=True, external_data=False, verbose=False,
                input_names=["image"], output_names=["embedding"], dynamic_shapes={"x": {0: "batch"}},
            )  # fmt: skip
        timings = measure(paths, (size[0], size[1]), [batch], [0], REPEATS)
    teacher = timings[0]
    print(f"{size[0]} x {size[1]} pixels, batch {batch}, all threads")
    for timing in timings:
        speedup = gain(teacher, timing)
        params, macs = sizes[timing.file]
        text = (
            f"{speedup.ratio:.2f} times"
            if speedup.conclusive
            else f"inconclusive, {speedup.low:.2f} to {speedup.high:.2f} times"
        )
        print(f"{timing.file:20} {params / 1e6:7.2f} M params {macs / 1e6:8.1f} M MACs {timing.p50_ms:7.2f} ms  {text}")


if __name__ == "__main__":
    main()
