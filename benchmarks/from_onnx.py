"""A student that learns from an ONNX file of another architecture: `python -m benchmarks.from_onnx --seed N`.

Trains torchvision's MobileNetV3-small on the training vehicles, exports it, and gives the file to the pipeline as the
teacher of a ResNet. Writes to evidence/from-onnx/N.json whether the student finds the same neighbours, and searches the
teacher's gallery. Run it again to resume.
"""

import argparse
import json
import logging

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.ladder import clone, origin, prepare, run
from benchmarks.short import ROOT, with_values
from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.augment import normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.files import Files, read_json, write_atomically, write_text
from pipeline.losses import identity, triplet
from pipeline.models.head import Classifier, freeze_norms
from pipeline.progress import track
from pipeline.retrieval import scoring
from pipeline.retrieval.embed import embed
from pipeline.retrieval.evaluate import sides
from pipeline.stage.presets import load_preset
from pipeline.system.locks import locked
from pipeline.teachers.given import load
from pipeline.training.optimizer import learning_rate

NEIGHBOURS = 10
FROZEN = 0.1
"""Share of the epochs after which the MobileNetV3's norms are frozen: with the statistics of batches of 12 vehicles it
learned little that held for single images (seed 1: validation mAP 0.13 before and 0.29 six epochs after freezing).
"""
SETTINGS = {
    "runtime.threads": 1,
    "teacher.source": "onnx",
    "teacher.weights": "weights/teacher/mobilenet.onnx",
    "teacher.epochs": 40,
    "student.architecture.depth": 26,
    "student.init": "random",
}


class MobileNet(nn.Module):
    """torchvision's MobileNetV3-small from random weights, with a linear map to the embedding."""

    def __init__(self, identities: int, embedding_dim: int) -> None:
        super().__init__()
        self.features = torchvision.models.mobilenet_v3_small().features
        self.embedding = nn.Sequential(nn.Linear(576, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim))
        self.classifier = Classifier(embedding_dim, identities, cosine=True)

    def forward(self, images: Tensor) -> Tensor:
        """Embed normalised images, (B, 3, H, W) -> (B, D)."""
        embedding: Tensor = self.embedding(self.features(images).mean(dim=(2, 3)))
        return embedding


def train_mobilenet(params: Params, files: Files) -> None:
    """Train the network on the training set, and write it to `teacher.weights`."""
    manifest, images = open_images(files, params)
    loader, config = training_loader(manifest, images, params.teacher, params), params.teacher
    torch.manual_seed(params.seed)
    net = MobileNet(len(manifest.train_identities), config.embedding_dim).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
    steps = len(loader) * config.epochs
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1  # torchvision's 0.01 is for longer trainings
    for epoch in track(range(config.epochs), config.epochs, "training MobileNetV3"):
        if epoch >= FROZEN * config.epochs:
            freeze_norms(net)
        for number, batch in enumerate(loader.epoch(epoch)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch * len(loader) + number) / steps, config.optimizer)
            embedding = net(normalise(batch.images))
            loss = identity.cosine_margin(
                net.classifier(embedding), batch.labels, config.losses.scale, config.losses.margin
            ) + triplet.soft(embedding, batch.labels, config.losses.triplet_scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    height, width = params.data.image_size
    example = torch.zeros(2, 3, height, width)
    path = files.root / params.teacher.weights
    write_atomically(
        path,
        lambda temporary: torch.onnx.export(
            net.eval(), (example,), str(temporary), dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), input_names=["pixels"], output_names=["features"],
        ),
    )  # fmt: skip


def neighbours(queries: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the positions of the most similar gallery images of each query, (Q, `NEIGHBOURS`)."""
    return np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :NEIGHBOURS]


def recall(found: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> float:
    """Return the share of the wanted neighbours that are found, mean over the queries."""
    return float(np.mean([len(set(a) & set(b)) for a, b in zip(found, wanted, strict=True)])) / NEIGHBOURS


def compare(files: Files, params: Params) -> dict[str, float | str]:
    """Compare the cut student with its teacher on the test set."""
    manifest, images = open_images(files, params)
    queries = len(manifest.indices("query"))
    test = np.concatenate([manifest.indices("query"), manifest.indices("gallery")])
    teacher, student = load(files.artifacts("teacher")), checkpoint.load(files.artifacts("surgery"))
    vectors = [embed(net, images, test, normalise) for net in (teacher, student)]
    (teacher_queries, teacher_gallery), (student_queries, student_gallery) = (np.split(v, [queries]) for v in vectors)
    wanted = neighbours(teacher_queries, teacher_gallery)
    halves = [sides(v, manifest, "query", "gallery", params.data.protocol) for v in vectors]
    mixed = scoring.evaluate(params.data.protocol, halves[1][0], halves[0][1])
    surgery, export, latency = (read_json(files.metrics(stage)) for stage in ("surgery", "export", "benchmark"))
    return {
        "teacher_map": read_json(files.metrics("teacher"))["map"],
        "student_map": surgery["map"],
        "student_on_teacher_map": mixed.map,
        "recall_of_neighbours": recall(neighbours(student_queries, student_gallery), wanted),
        "recall_in_teacher_gallery": recall(neighbours(student_queries, teacher_gallery), wanted),
        "distance": float(1 - np.einsum("nd,nd->n", *vectors).mean()),
        "params_reduction_to_itself": surgery["params_reduction"],
        "macs_reduction_to_itself": surgery["macs_reduction"],
        "params_reduction_to_teacher": export["params_reduction_to_teacher"],
        "macs_reduction_to_teacher": export["macs_reduction_to_teacher"],
        "speedup_over_itself": latency["speedup_over_uncompressed"],
        "speedup_over_teacher": latency["speedup"],
    }


def main() -> None:
    """Train what is missing, and print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.from_onnx", description=__doc__)
    parser.add_argument("--seed", type=int, required=True, help="seed of data, teacher and student")
    seed = parser.parse_args().seed
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    params = with_values(load_preset(ROOT, "evidence"), {**SETTINGS, "seed": seed})
    folder, result = ROOT / ".ladder" / f"from-onnx-{seed}", ROOT / "evidence" / "from-onnx" / f"{seed}.json"
    with locked(folder.with_suffix(".lock"), f"from-onnx {seed}"):
        clone(folder)
        files = Files(folder, folder)
        prepare(files, params)
        if not (folder / params.teacher.weights).is_file():
            train_mobilenet(params, files)
        for stage in ("teacher", "student", "surgery", "export", "benchmark"):
            if not files.metrics(stage).is_file():
                run(stage, files, params)
        figures = compare(files, params)
        write_text(result, json.dumps({**figures, **origin(files, "teacher.onnx")}, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name:<30} {value:.4f}")


if __name__ == "__main__":
    main()
