"""Stage `export`: write student and teacher as ONNX files that reproduce the trained networks.

Reads   artifacts/prepare/, artifacts/student/full.json, artifacts/surgery/, artifacts/teacher/
Writes  artifacts/export/, metrics/export.json
"""

import logging
from pathlib import Path

import numpy as np

from pipeline import checkpoint
from pipeline.config import Params
from pipeline.data.augment import MEAN, STD, normalise
from pipeline.data.images import open_images
from pipeline.data.manifest import UNLABELLED
from pipeline.data.requirements import check_requirements
from pipeline.data.sources import LAYOUTS
from pipeline.export import int8, sample
from pipeline.export.card import CardEntry, gallery_note, render_card, teacher_note
from pipeline.export.embed import Embeddings, fill, normalise_pixels
from pipeline.export.files import OnnxExporter
from pipeline.export.metadata import RENDERED_LICENCES, Metadata, params_digest
from pipeline.export.parity import ParityCheck
from pipeline.export.release import ALL_IN_ONE, INT8, STUDENT, TEACHER, sha256, write_release
from pipeline.models import cost
from pipeline.models.resnet import RetrievalNet, TeacherNet
from pipeline.models.spec import ArchSpec
from pipeline.protocols import conditions
from pipeline.records import ExportRecord
from pipeline.retrieval.compatibility import compare
from pipeline.retrieval.embed import embed
from pipeline.retrieval.evaluate import evaluate_embedder, sides
from pipeline.runtime import launch
from pipeline.stage.run import Run, run_stage
from pipeline.teachers.given import load
from pipeline.teachers.onnx_teacher import OnnxTeacher

MAX_ORIGINALS = 64
"""Test images at their original size that check the preprocessing inside `model.allinone.onnx`."""

log = logging.getLogger(__name__)


def export(run: Run) -> ExportRecord:
    """Export all files, compare each with torch on all test images, and write them only if all checks pass."""
    params, commit = run.params, run.commit
    fabric = launch(params.runtime.alone(), params.seed)
    manifest, images = open_images(run.files, params)
    check_requirements(manifest.items, params)
    height, width = params.data.image_size
    queries, gallery = manifest.indices("query"), manifest.indices("gallery")
    test = np.concatenate([queries, gallery])
    protocol = params.data.protocol

    def shown(protocol: str) -> str:
        return conditions(protocol, manifest.seen_identities, len(manifest.test_identities))

    def score(embeddings: Embeddings, protocol: str = protocol) -> float:
        return evaluate_embedder(lambda _: embeddings, manifest, "query", "gallery", protocol).map

    licence = params.export.licence
    if params.data.source != "vehicles" and licence in RENDERED_LICENCES:
        licence = "not stated"
        log.warning(
            "`export.licence` is that of the rendered images; state the terms of your data, or cards say %s", licence
        )

    def make_metadata(net: TeacherNet, test_map: float) -> Metadata:
        return Metadata(
            data=params.data.source,
            data_digest=manifest.digest,
            params_digest=params_digest(params),
            git_commit=commit,
            licence=licence,
            protocol=shown(protocol),
            map=test_map,
            image_size=(height, width),
            mean=MEAN,
            std=STD,
            embedding_dim=net.embedding_dim,
            params=net.count_params(),
            macs=net.count_macs((height, width)),
        )

    def embed_test(net: TeacherNet) -> Embeddings:
        return embed(net.to(fabric.device), images, test, normalise, fabric.device)

    train = manifest.indices("train")
    train = train[np.linspace(0, len(train) - 1, min(int8.CALIBRATION_IMAGES, len(train))).astype(int)]
    size = params.export.fixed_batch or int8.CALIBRATION_BATCH
    exporter = OnnxExporter(
        image_size=(height, width),
        settings=params.export,
        check=ParityCheck(images, test, len(queries), MEAN, STD, score, params.export.limits),
        make_metadata=make_metadata,
        embed=embed_test,
        calibration=[
            normalise_pixels(fill(images.batch(train[start : start + size]), size), MEAN, STD)
            for start in range(0, len(train), size)
        ],
        originals=(images.original(index) for index in test[:: -(-len(test) // MAX_ORIGINALS)]),
    )
    student, teacher = checkpoint.load(run.files.artifacts("surgery")), load(run.files.artifacts("teacher"))
    before = checkpoint.load_spec(run.files.artifacts("student"), checkpoint.FULL)
    given = teacher.model() if isinstance(teacher, OnnxTeacher) else None
    files, int8_result = exporter.export(student, teacher, given)

    compatibility = compare(
        protocol,
        *(sides(files[name].embeddings, manifest, "query", "gallery", protocol) for name in (TEACHER, STUDENT)),
    )
    more_protocols = [name for name in LAYOUTS[params.data.source].protocols if name != protocol]
    entries = {
        name: CardEntry(
            file.description,
            file.metadata,
            {shown(protocol): file.metadata.map}
            | {shown(more): score(file.embeddings, more) for more in more_protocols},
            len(file.content),
            sha256(file.content),
            file.requirements,
            resizes=name == ALL_IN_ONE,
            untried=not is_plain(teacher if name == TEACHER else student),
        )
        for name, file in files.items()
    }
    notes = {
        f"Can the student search a gallery that `{TEACHER}` embedded?": gallery_note(
            compatibility.old, compatibility.mixed
        )
    }
    if params.teacher.source != "train":
        notes["Which network was the teacher?"] = _teacher_note(params, teacher, student, before)
    if manifest.has_boxes:
        notes["Which part of a picture?"] = (
            "The images of training and test are boxes that were cut out of pictures: cut objects out of yours in the "
            "same way, before the model resizes them."
        )
    contents = {name: file.content for name, file in files.items()}
    unlabelled = len(manifest.indices(UNLABELLED))
    if unlabelled and params.student.batch.unlabelled:
        notes["Which images without labels were used?"] = (
            f"Beside the training set, the student learned from {unlabelled:,} images without labels, by the teacher's "
            "outputs for them."
        )
    if int8_result is not None:
        notes["Is there an int8 file?"] = int8_result.markdown
    write_release(
        run.out,
        contents
        | {"card.md": render_card(entries, notes).encode()}
        | {sample.PICTURE: sample.as_png(sample.picture((height, width)))}
        | {sample.EXPECTED: sample.expected(contents, (height, width))},
    )
    small, full = files[STUDENT].metadata, files[TEACHER].metadata
    return ExportRecord(
        map=small.map,
        map_allinone=files[ALL_IN_ONE].metadata.map,
        map_int8=files[INT8].metadata.map if INT8 in files else None,
        map_teacher=full.map,
        map_student_on_teacher=compatibility.mixed,
        min_cosine=min(file.min_cosine for file in files.values() if file.min_cosine is not None),
        bytes=len(contents[STUDENT]),
        bytes_allinone=len(contents[ALL_IN_ONE]),
        bytes_int8=len(contents[INT8]) if INT8 in files else None,
        bytes_teacher=len(contents[TEACHER]),
        params=small.params,
        macs=cost.macs(student.spec, (height, width)),
        params_reduction=1 - cost.params(student.spec) / cost.params(before),
        macs_reduction=1 - cost.macs(student.spec, (height, width)) / cost.macs(before, (height, width)),
        params_reduction_to_teacher=1 - small.params / full.params,
        macs_reduction_to_teacher=1 - cost.macs(student.spec, (height, width)) / full.macs if full.macs else None,
        int8_published=int(INT8 in files),
    )


def is_plain(net: TeacherNet) -> bool:
    """Return whether a network has only layers that were tried in all runtimes of the card.

    All heads consist of the same operators.
    """
    if not isinstance(net, RetrievalNet):
        return False
    spec = net.spec
    return not spec.instance_norms and spec.pool == "average" and spec.max_pool == "padded" and spec.input is None


def _teacher_note(params: Params, teacher: TeacherNet, student: RetrievalNet, before: ArchSpec) -> str:
    size = (params.data.image_size[0], params.data.image_size[1])
    costs: dict[str, tuple[int, int | None]] = {"the teacher": (teacher.count_params(), teacher.count_macs(size))}
    if params.student.architecture.depth:
        costs["its own network before compression"] = (cost.params(before), cost.macs(before, size))
    reductions = {
        name: {
            "parameters": 1 - cost.params(student.spec) / weights,
            "MACs": 1 - cost.macs(student.spec, size) / macs if macs else None,
        }
        for name, (weights, macs) in costs.items()
    }
    return teacher_note(Path(params.teacher.weights).name, reductions, params.student.init == "teacher")


if __name__ == "__main__":
    run_stage(export)
