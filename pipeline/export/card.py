"""The model card of a release: what the files are, and how to run them without this repository."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.export.metadata import Metadata
from pipeline.export.release import TEACHER
from pipeline.export.runtimes import RUNTIMES, Requirements
from pipeline.inference.session import INPUT, OUTPUT


@dataclass(frozen=True)
class CardEntry:
    """A file on the card.

    Attributes:
        description: A few words.
        maps: mAP by protocol as shown, in [0, 1]; the protocol of the run comes first.
        bytes: Size of the file.
        sha256: Hexadecimal.
        requirements: What the file needs to run.
        resizes: Whether the model accepts images of any size.
        untried: Whether the network has layers that were tried in ONNX Runtime only.
    """

    description: str
    metadata: Metadata
    maps: Mapping[str, float]
    bytes: int
    sha256: str
    requirements: Requirements
    resizes: bool
    untried: bool = False


def gallery_note(teacher_map: float, student_on_teacher_map: float | None) -> str:
    """Say whether a gallery that the teacher embedded can be searched with queries embedded by the student.

    Args:
        teacher_map: mAP of queries and gallery by the teacher.
        student_on_teacher_map: mAP of queries by the student in that gallery; None if embedding lengths differ.
    """
    if student_on_teacher_map is None:
        return "No: the embeddings have different lengths. Embed the gallery again with the student."
    compatible = student_on_teacher_map >= teacher_map
    return (
        f"{'Yes' if compatible else 'No: embed the gallery again with the student'}. On the test set embedded by the "
        f"teacher, queries of the student reach mAP {student_on_teacher_map:.4f} and queries of the teacher "
        f"{teacher_map:.4f}."
    )


def teacher_note(source: str, reductions: Mapping[str, Mapping[str, float | None]], inherited: bool = False) -> str:
    """Describe a teacher from elsewhere, and what the student saves.

    Args:
        source: Name of the teacher's file.
        reductions: Of the student compared with each network, by the name of what is counted; None if it cannot be
            counted.
        inherited: Whether the student began with the weights of the teacher.
    """
    savings = "; ".join(
        f"compared with {network}, it has {' and '.join(_fewer(counted, saved) for counted, saved in counts.items())}"
        for network, counts in reductions.items()
    )
    return (
        f"`{source}`, which was trained elsewhere. The student learned from its outputs; {savings}. Its authors "
        f"decide about the use of `{TEACHER}`{' and of all other files, which began with its weights' * inherited}."
    )


def _fewer(counted: str, saved: float | None) -> str:
    if saved is None:
        return f"an unknown share of the {counted}"
    return f"{100 * abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} {counted}"


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def render_card(files: Mapping[str, CardEntry], notes: Mapping[str, str]) -> str:
    """Render card.md, in Markdown.

    Args:
        files: Entries by file name; at least one resizes and at least one does not. The metadata of the first one that
            does not are those of the card.
        notes: Paragraphs by heading.
    """
    core = next(name for name, entry in files.items() if not entry.resizes)
    whole = next(name for name, entry in files.items() if entry.resizes)
    metadata = files[core].metadata
    height, width = metadata.image_size
    protocols = list(files[core].maps)
    needs = files[core].requirements
    images, repeat, fill = needs.batch or "batch", "[None]", ""
    batch = f"The number of images in a call is {needs.batch} (`export.batch`)."
    if needs.batch is None:
        batch = "For a runtime that needs a fixed number of images in a call, set `export.batch` and export again."
    if needs.batch is not None and needs.batch > 1:
        repeat = f"[None].repeat({needs.batch}, axis=0)"
        fill = (
            f"\nEach call takes exactly {needs.batch} images: fill the last batch up, and drop the embeddings of the "
            "filling.\n"
        )
    scores = " | ".join(f"mAP, `{protocol}`" for protocol in protocols)
    rows = "\n".join(
        f"| `{file}` | {entry.description} | {' | '.join(f'{entry.maps[protocol]:.4f}' for protocol in protocols)} "
        f"| {entry.metadata.params:,} | {_count(entry.metadata.macs)} | {entry.bytes:,} |"
        for file, entry in files.items()
    )
    tried = [name for name, entry in files.items() if not entry.untried]
    untried = ", ".join(f"`{name}`" for name in files if name not in tried)
    only = f"Of {untried}, with layers of other toolkits, no other runtime was tried. " if untried else ""
    suited = {runtime: [f"`{name}`" for name in runtime.files if name in tried] for runtime in RUNTIMES}
    runtimes = "\n".join(
        f"| {runtime.name} | {', '.join(names) or 'not tried'} | {runtime.note} |" for runtime, names in suited.items()
    )
    others = ", ".join(f"`{name}`" for name, entry in files.items() if entry.requirements.opset != needs.opset)
    newest = max((entry.requirements for entry in files.values()), key=lambda needs: needs.opset)
    subject = f"All files but {others}" if others else "The files"
    sums = "\n".join(f"{entry.sha256}  {file}" for file, entry in files.items())
    seen = metadata.protocol.partition(", ")[2]
    identities = (
        f"the test set of `{metadata.data}` ({seen})"
        if seen
        else (f"identities of data set `{metadata.data}` that were not used for training")
    )
    changes = " with uncommitted changes" if metadata.git_commit.endswith("+") else ""
    sections = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in notes.items())
    return f"""\
# Image retrieval model: image in, embedding out

Images of the same identity get similar embeddings. To search a gallery, rank its images by the dot product of their
embeddings with the query's.

Licence: {metadata.licence}

## Which file do I need?

Use `{whole}` unless you resize and normalise images yourself; then use `{core}`.

| file | content | {scores} | params | MACs | bytes |
|---|---|{"---|" * len(protocols)}---|---|---|
{rows}

- mAP was measured on these files with ONNX Runtime, on {identities}.
  Its value depends on the evaluation protocol named in the column.
- MACs are multiply-accumulates per image.
- Embeddings of the teacher and of the student are not interchangeable; see the section on galleries below.

## How do I run it?

`{whole}` takes uint8 images, ({images}, height, width, 3) RGB of any size, and resizes and normalises them.
The output `{OUTPUT}` is float32, ({images}, {metadata.embedding_dim}), L2-normalised.
{fill}
```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{whole}", providers=["CPUExecutionProvider"])
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
embedding = session.run(["{OUTPUT}"], {{"{INPUT}": np.asarray(image){repeat}}})[0]
```

The other files take float32, ({images}, 3, {height}, {width}), preprocessed in these steps: rotate upright by the EXIF
tag, convert to RGB, resize to height {height} and width {width} (bilinear, antialiased), divide by 255, subtract the
mean, divide by the standard deviation.

```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{core}", providers=["CPUExecutionProvider"])
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)
pixels = (np.asarray(image) / 255 - {list(metadata.mean)}) / {list(metadata.std)}
batch = pixels.transpose(2, 0, 1){repeat}.astype(np.float32)
embedding = session.run(["{OUTPUT}"], {{"{INPUT}": batch}})[0]
```

## Which file for which runtime?

{subject} have ONNX operator set {needs.opset} and IR version {needs.ir_version}, the lowest that goes with it. All of
them run in ONNX Runtime {newest.onnxruntime} and later on the CPU.

| other runtime | files | notes |
|---|---|---|
{runtimes}

{only}`{whole}` suits few of them, because it takes uint8 images and resizes with antialiasing. {batch}

{sections}

## Is my download intact?

`sha256sum -c SHA256SUMS` checks the files. `smaller-student verify FOLDER` also runs each model on `sample.png`, a
drawn image, and compares the result with the expected embedding in `sample.json`.

```text
{sums}
```

## Where does it come from?

Git commit `{metadata.git_commit[:12]}`{changes}; SHA-256 of the data manifest `{metadata.data_digest[:12]}`; SHA-256 of
the parameters `{metadata.params_digest[:12]}`. The metadata of each ONNX file hold the full digests, the
preprocessing, the licence and the mAP.
"""
