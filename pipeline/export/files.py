"""The files of a release, each proven to be what was trained before it is one."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from pipeline.config import Export
from pipeline.export import int8
from pipeline.export.allinone import all_in_one
from pipeline.export.embed import Embeddings, Pixels
from pipeline.export.metadata import Metadata, finish, serialise
from pipeline.export.parity import BATCHES, Probe, Reference, cosines, probed, verify, verify_batches, verify_resizing
from pipeline.export.release import ALL_IN_ONE, INT8, STUDENT, TEACHER
from pipeline.export.sample import BYTES
from pipeline.export.to_onnx import to_onnx
from pipeline.inference.session import open_session
from pipeline.inference.timing import Gain, gains
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec

log = logging.getLogger(__name__)

Describe = Callable[[ArchSpec, float], Metadata]
"""What a file says about itself, given its network's spec and its own mAP."""


@dataclass(frozen=True)
class File:
    """An ONNX file.

    Attributes:
        what: What it is, in a few words.
        content: Of it.
        metadata: What it says about itself.
        embeddings: (n, D) that it gives the probe's images.
        min_cosine: Smallest cosine of them with torch's; None where bits were given up on purpose.
    """

    what: str
    content: bytes
    metadata: Metadata
    embeddings: Embeddings
    min_cosine: float | None


@dataclass(frozen=True)
class OnnxExporter:
    """What files are made and judged with.

    Attributes:
        image_size: Height and width of the input, pixels.
        settings: Section of params.yaml.
        probe: What files are compared with torch on.
        describe: Makes metadata.
        embed: Embeddings (n, D) of the probe's images by a torch network.
        calibration: (n, 3, h, w) each, normalised training images.
        originals: (h, w, 3) each, test images of their own size; they need not fit into memory together.
    """

    image_size: tuple[int, int]
    settings: Export
    probe: Probe
    describe: Describe
    embed: Callable[[RetrievalNet], Embeddings]
    calibration: Sequence[int8.Inputs]
    originals: Iterable[Pixels]

    def files(self, student: RetrievalNet, teacher: RetrievalNet) -> tuple[dict[str, File], int8.Int8Result | None]:
        """All files of a release by name, the one to begin with first; and what became of int8, where it is asked for.

        Raises:
            ParityError: If a file does something else than its network.
        """
        probe, reference = self.probe, self.probe.reference(self.embed(student))
        model = to_onnx(student, self.image_size, self.settings.opset)
        core = self._exact(STUDENT, "the student", student, model, reference)
        resizing = all_in_one(model, self.image_size, probe.mean, probe.std)
        whole = self._exact(ALL_IN_ONE, "the student, with preprocessing inside", student, resizing, reference)
        verify_resizing(ALL_IN_ONE, whole.content, core.content, self.originals, probe)
        found, verdict = {STUDENT: core, ALL_IN_ONE: whole}, None
        if "int8" in self.settings.precisions:
            verdict, coarse = self._judged(student, model, core)
            found |= {INT8: coarse} if coarse else {}
        translated = to_onnx(teacher, self.image_size, self.settings.opset)
        what = "the network that it learnt from"
        reference = probe.reference(self.embed(teacher))
        return found | {TEACHER: self._exact(TEACHER, what, teacher, translated, reference)}, verdict

    def _exact(self, name: str, what: str, net: RetrievalNet, model: onnx.ModelProto, reference: Reference) -> File:
        """A file that must do what the network does."""
        parity = verify(name, serialise(model), reference, self.probe)
        metadata = self.describe(net.spec, parity.map)
        content = finish(model, metadata)
        verify_batches(name, content, reference, self.probe)
        return File(what, content, metadata, parity.embeddings, parity.min_cosine)

    def _judged(self, net: RetrievalNet, model: onnx.ModelProto, core: File) -> tuple[int8.Int8Result, File | None]:
        """Whether an int8 file is worth it, and it if it is."""
        tried: list[Embeddings] = []

        def speedups(files: Mapping[str, bytes]) -> Mapping[str, Gain]:
            return gains({STUDENT: core.content, **files}, STUDENT, self.image_size)

        def score(content: bytes) -> float:
            tried.append(self.probe.embed(open_session(content)))
            return self.probe.score(tried[-1])

        loss = self.settings.limits.int8_map_loss
        verdict = int8.choose(model, self.calibration, core.metadata.map, loss, score, speedups)
        file = None
        if verdict.model is not None and verdict.map is not None:
            metadata = self.describe(net.spec, verdict.map)  # the last that was tried is the one that was taken
            file = File("the student, 8 bits", finish(verdict.model, metadata), metadata, tried[-1], None)
            if fault := self._by_batch(file):
                verdict, file = replace(verdict, model=None, map=None, reason=f"{verdict.reason}, but {fault}"), None
        log.info("int8 is %s: %s", "published" if file else "not published", verdict.reason)
        return verdict, file

    def _by_batch(self, file: File) -> str:
        """How the finished file's embeddings depend on the batch; nothing if they don't."""
        session, some = open_session(file.content), probed(len(file.embeddings))
        for batch in BATCHES:
            close = cosines(self.probe.embed(session, some, batch), file.embeddings[some]).min()
            if not close >= BYTES:
                return f"in batches of {batch} an image's embedding has cosine {close:.4f} with the one that was scored"
        return ""
