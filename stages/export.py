"""Stage `export`: write student and teacher as ONNX files, and prove that they are what was trained.

Reads   artifacts/prepare/, artifacts/surgery/, artifacts/teacher/
Writes  artifacts/export/, metrics/export.json
"""

import numpy as np

from pipeline import checkpoint
from pipeline.data.augment import MEAN, STD, normalise
from pipeline.data.images import open_images
from pipeline.export.card import Entry, card
from pipeline.export.onnx import Metadata, finish, params_digest, serialise, to_onnx
from pipeline.export.parity import Parity, Probe, verify, verify_batches
from pipeline.export.release import sha256, write_release
from pipeline.models import cost
from pipeline.ops.stage import Run, run_stage
from pipeline.records import ExportRecord
from pipeline.retrieval.embed import embed, evaluate_embedder
from pipeline.runtime import launch

FILES = {"model.onnx": ("surgery", "the student"), "teacher.onnx": ("teacher", "the network that it learnt from")}


def export(run: Run) -> ExportRecord:
    """Translate, compare with torch on all test images; only if all gates hold, write."""
    params = run.params
    fabric = launch(params.runtime.alone(), params.seed)
    manifest, images = open_images(run.files, params)
    height, width = params.data.image_size
    probe = Probe(
        images=images,
        rows=np.concatenate([manifest.rows("query"), manifest.rows("gallery")]),
        preprocess=normalise,
        score=lambda found: evaluate_embedder(lambda _: found, manifest, "query", "gallery", params.data.protocol).map,
        gates=params.export.gates,
    )
    contents: dict[str, bytes] = {}
    entries: dict[str, Entry] = {}
    parities: dict[str, Parity] = {}
    for name, (stage, what) in FILES.items():
        net = checkpoint.load(run.files.artifacts(stage))
        model = to_onnx(net, (height, width), params.export.opset)
        reference = embed(net.to(fabric.device), images, probe.rows, normalise, fabric.device)
        parities[name] = verify(name, serialise(model), reference, probe)
        metadata = Metadata(
            data=params.data.source,
            data_digest=manifest.digest,
            params_digest=params_digest(params),
            protocol=params.data.protocol,
            map=parities[name].map,
            image_size=(height, width),
            mean=tuple(MEAN),
            std=tuple(STD),
            embedding_dim=net.spec.embedding_dim,
            params=cost.params(net.spec),
            macs=cost.macs(net.spec, (height, width)),
        )
        contents[name] = finish(model, metadata)
        verify_batches(name, contents[name], reference, probe)
        entries[name] = Entry(what, metadata, len(contents[name]), sha256(contents[name]))
    write_release(run.out, contents | {"card.md": card(entries).encode()})
    student, teacher = (entries[name].metadata for name in FILES)
    return ExportRecord(
        map=student.map,
        map_teacher=teacher.map,
        min_cosine=min(parity.min_cosine for parity in parities.values()),
        bytes=len(contents["model.onnx"]),
        bytes_teacher=len(contents["teacher.onnx"]),
        params=student.params,
        macs=student.macs,
        params_reduction=1 - student.params / teacher.params,
        macs_reduction=1 - student.macs / teacher.macs,
        int8_published=0,
    )


if __name__ == "__main__":
    run_stage(export)
