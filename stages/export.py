"""Stage `export`: write student and teacher as ONNX files, and prove that they are what was trained.

Reads   artifacts/prepare/, artifacts/surgery/, artifacts/teacher/
Writes  artifacts/export/, metrics/export.json
"""

import numpy as np

from pipeline import checkpoint
from pipeline.data.augment import MEAN, STD, normalise
from pipeline.data.images import open_images
from pipeline.data.sources import LAYOUTS
from pipeline.export import int8, sample
from pipeline.export.card import Entry, card
from pipeline.export.embed import Embeddings, normalised
from pipeline.export.files import OnnxExporter
from pipeline.export.metadata import Metadata, params_digest
from pipeline.export.parity import Probe
from pipeline.export.release import ALL_IN_ONE, INT8, STUDENT, TEACHER, sha256, write_release
from pipeline.models import cost
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.records import ExportRecord
from pipeline.retrieval.compatibility import compare
from pipeline.retrieval.embed import embed
from pipeline.retrieval.evaluate import evaluate_embedder, sides
from pipeline.runtime import launch
from pipeline.stage.run import Run, run_stage

ORIGINALS = 64
"""Test images that a file which resizes is tried with in their own size."""


def export(run: Run) -> ExportRecord:
    """Translate, compare with torch on all test images; only if all gates hold, write."""
    params, commit = run.params, run.commit
    fabric = launch(params.runtime.alone(), params.seed)
    manifest, images = open_images(run.files, params)
    height, width = params.data.image_size
    queries, gallery = manifest.indices("query"), manifest.indices("gallery")
    rows = np.concatenate([queries, gallery])
    protocol = params.data.protocol

    def score(found: Embeddings, protocol: str = protocol) -> float:
        return evaluate_embedder(lambda _: found, manifest, "query", "gallery", protocol).map

    def describe(spec: ArchSpec, quality: float) -> Metadata:
        return Metadata(
            data=params.data.source,
            data_digest=manifest.digest,
            params_digest=params_digest(params),
            git_commit=commit,
            licence=params.export.licence,
            protocol=protocol,
            map=quality,
            image_size=(height, width),
            mean=MEAN,
            std=STD,
            embedding_dim=spec.embedding_dim,
            params=cost.params(spec),
            macs=cost.macs(spec, (height, width)),
        )

    def by_torch(net: RetrievalNet) -> Embeddings:
        return embed(net.to(fabric.device), images, rows, normalise, fabric.device)

    seen = manifest.indices("train")
    seen = seen[np.linspace(0, len(seen) - 1, min(int8.CALIBRATED, len(seen))).astype(int)]
    workshop = OnnxExporter(
        image_size=(height, width),
        settings=params.export,
        probe=Probe(images, rows, len(queries), MEAN, STD, score, params.export.limits),
        describe=describe,
        embed=by_torch,
        calibration=[
            normalised(images.batch(seen[start : start + int8.BATCH]), MEAN, STD)
            for start in range(0, len(seen), int8.BATCH)
        ],
        originals=(images.original(row) for row in rows[:: -(-len(rows) // ORIGINALS)]),
    )
    student, teacher = (checkpoint.load(run.files.artifacts(stage)) for stage in ("surgery", "teacher"))
    files, verdict = workshop.files(student, teacher)

    mixed = compare(
        protocol,
        *(sides(files[name].embeddings, manifest, "query", "gallery", protocol) for name in (TEACHER, STUDENT)),
    )
    others = [other for other in LAYOUTS[params.data.source].protocols if other != protocol]
    entries = {
        name: Entry(
            file.what,
            file.metadata,
            {protocol: file.metadata.map} | {other: score(file.embeddings, other) for other in others},
            len(file.content),
            sha256(file.content),
            resizes=name == ALL_IN_ONE,
        )
        for name, file in files.items()
    }
    remarks = {f"Galleries that `{TEACHER}` has embedded": f"Where the student takes its place, {mixed.verdict}."}
    contents = {name: file.content for name, file in files.items()}
    if verdict is not None:
        remarks["Eight bits"] = verdict.text
    write_release(
        run.out,
        contents
        | {"card.md": card(entries, remarks).encode()}
        | {sample.PICTURE: sample.as_png(sample.picture((height, width)))}
        | {sample.EXPECTED: sample.expected(contents, (height, width))},
    )
    about, original = files[STUDENT].metadata, files[TEACHER].metadata
    return ExportRecord(
        map=about.map,
        map_allinone=files[ALL_IN_ONE].metadata.map,
        map_int8=files[INT8].metadata.map if INT8 in files else None,
        map_teacher=original.map,
        map_student_on_teacher=mixed.mixed,
        min_cosine=min(file.min_cosine for file in files.values() if file.min_cosine is not None),
        bytes=len(contents[STUDENT]),
        bytes_allinone=len(contents[ALL_IN_ONE]),
        bytes_int8=len(contents[INT8]) if INT8 in files else None,
        bytes_teacher=len(contents[TEACHER]),
        params=about.params,
        macs=about.macs,
        params_reduction=1 - about.params / original.params,
        macs_reduction=1 - about.macs / original.macs,
        int8_published=int(INT8 in files),
    )


if __name__ == "__main__":
    run_stage(export)
