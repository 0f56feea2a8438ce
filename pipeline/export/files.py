"""Export the ONNX files of a release; a file is returned only if it reproduces its torch network."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import onnx

from pipeline.config import Export
from pipeline.export import int8
from pipeline.export.embed import Embeddings, Pixels
from pipeline.export.metadata import Metadata, finish, serialise
from pipeline.export.parity import ParityCheck, Reference, cosines
from pipeline.export.preprocessing import add_preprocessing
from pipeline.export.release import ALL_IN_ONE, INT8, STUDENT, TEACHER
from pipeline.export.runtimes import Requirements
from pipeline.export.sample import MIN_COSINE_INT8
from pipeline.export.to_onnx import to_onnx
from pipeline.inference.session import open_session
from pipeline.inference.timing import Gain, gains
from pipeline.models.resnet import RetrievalNet, TeacherNet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file.

    Attributes:
        description: A few words for the model card.
        content: Bytes of the file.
        requirements: What the file needs to run.
        embeddings: (n, D) of the test images, by ONNX Runtime.
        min_cosine: Smallest cosine of these embeddings with torch's; None for int8, which is lossy.
    """

    description: str
    content: bytes
    metadata: Metadata
    requirements: Requirements
    embeddings: Embeddings
    min_cosine: float | None


@dataclass(frozen=True)
class OnnxExporter:
    """Exports student and teacher, and checks each file.

    Attributes:
        image_size: (height, width) of the input, pixels.
        settings: Section `export` of params.yaml.
        check: Compares files with torch on the test images.
        make_metadata: Builds the metadata of a file from its network and the mAP of the file.
        embed: Embeds the test images with a network, (n, D).
        calibration: Batches of normalised training images, (n, 3, h, w) each, for int8; n is `export.batch` if it is
            a number.
        originals: Test images (h, w, 3) at their original size, which may differ; read one at a time.
    """

    image_size: tuple[int, int]
    settings: Export
    check: ParityCheck
    make_metadata: Callable[[TeacherNet, float], Metadata]
    embed: Callable[[TeacherNet], Embeddings]
    calibration: Sequence[int8.Inputs]
    originals: Iterable[Pixels]

    def export(
        self, student: RetrievalNet, teacher: TeacherNet, given: onnx.ModelProto | None = None
    ) -> tuple[dict[str, ExportedFile], int8.Int8Result | None]:
        """Export all files of a release.

        Args:
            student: The network that is released.
            teacher: A `RetrievalNet`, or a network that embeds as `given` does.
            given: The teacher's file, if it is not exported here.

        Returns:
            The files by name, the student's float file first; the outcome of quantisation if `export.precisions` has
            int8, else None.

        Raises:
            ParityError: If a file does not reproduce its network.
        """
        check, reference = self.check, self.check.reference(self.embed(student))
        model = self._to_onnx(student)
        core = self._checked(STUDENT, "the student", student, model, reference)
        resizing = add_preprocessing(model, self.image_size, check.mean, check.std)
        whole = self._checked(ALL_IN_ONE, "the student with built-in preprocessing", student, resizing, reference)
        check.verify_resizing(ALL_IN_ONE, whole.content, core.content, self.originals)
        files, int8_result = {STUDENT: core, ALL_IN_ONE: whole}, None
        if "int8" in self.settings.precisions:
            int8_result, quantised = self._quantised(student, model, core)
            files |= {INT8: quantised} if quantised else {}
        teacher_model = given or self._to_onnx(cast(RetrievalNet, teacher))
        reference = check.reference(self.embed(teacher))
        return files | {TEACHER: self._checked(TEACHER, "the teacher", teacher, teacher_model, reference)}, int8_result

    def _to_onnx(self, net: RetrievalNet) -> onnx.ModelProto:
        return to_onnx(net, self.image_size, self.settings.opset, self.settings.fixed_batch)

    def _checked(
        self, name: str, description: str, net: TeacherNet, model: onnx.ModelProto, reference: Reference
    ) -> ExportedFile:
        """Check a float file and add its metadata.

        Raises:
            ParityError: If it does not reproduce its network.
        """
        parity = self.check.verify(name, serialise(model), reference)
        metadata = self.make_metadata(net, parity.map)
        content = finish(model, metadata)
        self.check.verify_batches(name, content, reference)
        needs = Requirements.of(model)
        return ExportedFile(description, content, metadata, needs, parity.embeddings, parity.min_cosine)

    def _quantised(
        self, net: RetrievalNet, model: onnx.ModelProto, core: ExportedFile
    ) -> tuple[int8.Int8Result, ExportedFile | None]:
        """Quantise the student; return the outcome, and the file if it qualifies."""
        scored: list[Embeddings] = []

        def speedups(files: Mapping[str, bytes]) -> Mapping[str, Gain]:
            return gains({STUDENT: core.content, **files}, STUDENT, self.image_size, core.requirements.batch or 1)

        def score(content: bytes) -> float:
            scored.append(self.check.embed(open_session(content)))
            return self.check.score(scored[-1])

        max_loss = self.settings.limits.int8_map_loss
        result = int8.choose(model, self.calibration, core.metadata.map, max_loss, score, speedups)
        file = None
        if result.model is not None and result.map is not None:
            metadata = self.make_metadata(net, result.map)
            content, needs = finish(result.model, metadata), Requirements.of(result.model)
            # `choose` stops scoring at the file it chooses, so the last embeddings are those of that file.
            file = ExportedFile("the student, quantised to int8", content, metadata, needs, scored[-1], None)
            if problem := self._batch_dependence(file):
                result, file = replace(result, model=None, map=None, reason=f"{result.reason}, but {problem}"), None
        log.info("int8 is %s: %s", "published" if file else "not published", result.reason)
        return result, file

    def _batch_dependence(self, file: ExportedFile) -> str:
        """Describe how the embeddings of a file depend on the batch; empty if they do not."""
        for label, subset, embeddings in self.check.embed_regrouped(open_session(file.content)):
            cosine = cosines(embeddings, file.embeddings[subset]).min()
            if not cosine >= MIN_COSINE_INT8:
                return f"at {label} an embedding has cosine {cosine:.4f} with the one that was scored"
        return ""
