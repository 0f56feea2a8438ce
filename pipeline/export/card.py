"""The card that goes with the files: what they are, and how to run them without this repository."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.export.metadata import Metadata
from pipeline.inference.session import INPUT, OUTPUT


@dataclass(frozen=True)
class Entry:
    """One file on the card.

    Attributes:
        what: What it is, in a few words.
        metadata: What it says about itself.
        maps: mAP by protocol, the run's own first.
        bytes: Its size.
        sha256: Of its content, hexadecimal.
        resizes: Whether it takes pictures of any size.
    """

    what: str
    metadata: Metadata
    maps: Mapping[str, float]
    bytes: int
    sha256: str
    resizes: bool


def card(files: Mapping[str, Entry], remarks: Mapping[str, str]) -> str:
    """The card as Markdown.

    Args:
        files: Entries by file name; one resizes, the first does not.
        remarks: Paragraphs by their heading: whether there is an int8 file, and why.
    """
    core = next(name for name, entry in files.items() if not entry.resizes)
    whole = next(name for name, entry in files.items() if entry.resizes)
    about = files[core].metadata
    height, width = about.image_size
    protocols = list(files[core].maps)
    scores = " | ".join(f"mAP, `{protocol}`" for protocol in protocols)
    rows = "\n".join(
        f"| `{file}` | {entry.what} | {' | '.join(f'{entry.maps[protocol]:.4f}' for protocol in protocols)} "
        f"| {entry.metadata.params:,} | {entry.metadata.macs:,} | {entry.bytes:,} |"
        for file, entry in files.items()
    )
    sums = "\n".join(f"{entry.sha256}  {file}" for file, entry in files.items())
    changes = ", with changes" if about.git_commit.endswith("+") else ""
    said = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in remarks.items())
    return f"""\
# Image retrieval: an image in, an embedding out

Images of one identity get embeddings that point the same way; rank a gallery by the dot product with the query's.

| file | what | {scores} | params | MACs | bytes |
|---|---|{"---|" * len(protocols)}---|---|---|
{rows}

mAP by protocol: data `{about.data}`, identities that were not trained on, measured on these files in ONNX Runtime.
MACs: multiply-accumulates for one image. Embeddings of different networks do not compare.

Licence: {about.licence}

## Run it

`{whole}` takes pictures as they are, uint8 (batch, height, width, 3) RGB of any size, and resizes them itself.
`{OUTPUT}` is float32 (batch, {about.embedding_dim}), of length 1.

```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{whole}", providers=["CPUExecutionProvider"])
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
embedding = session.run(["{OUTPUT}"], {{"{INPUT}": np.asarray(image)[None]}})[0]
```

The others take float32 (batch, 3, {height}, {width}): upright, RGB, resized bilinearly with antialiasing to {height} x
{width} (height x width), divided by 255, less the mean, divided by the standard deviation.

```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{core}", providers=["CPUExecutionProvider"])
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)
pixels = (np.asarray(image) / 255 - {list(about.mean)}) / {list(about.std)}
batch = pixels.transpose(2, 0, 1)[None].astype(np.float32)
embedding = session.run(["{OUTPUT}"], {{"{INPUT}": batch}})[0]
```

{said}

## Check it

`sha256sum -c SHA256SUMS` compares the files with what was written. `sample.png` is a drawn picture, and `sample.json`
holds the embedding that each file gave it; `smaller-student verify FOLDER` does both. The digests:

```text
{sums}
```

Each file's metadata hold all of the above, and where it comes from: commit `{about.git_commit[:12]}`{changes}, data
`{about.data_digest[:12]}`, params `{about.params_digest[:12]}`.
"""
