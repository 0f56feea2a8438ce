"""The card that goes with the files: what they are, and how to run them without this repository."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.export.onnx import Metadata
from pipeline.inference.session import INPUT, OUTPUT


@dataclass(frozen=True)
class Entry:
    """One file on the card.

    Attributes:
        what: What it is, in a few words.
        metadata: What it says about itself.
        bytes: Its size.
        sha256: Of its content, hexadecimal.
    """

    what: str
    metadata: Metadata
    bytes: int
    sha256: str


def card(files: Mapping[str, Entry]) -> str:
    """The card as Markdown.

    Args:
        files: Entries by file name, the one to use first; all take the same input.
    """
    name, first = next(iter(files.items()))
    about = first.metadata
    height, width = about.image_size
    rows = "\n".join(
        f"| `{file}` | {entry.what} | {entry.metadata.map:.4f} | {entry.metadata.params:,} | {entry.metadata.macs:,} "
        f"| {entry.bytes:,} |"
        for file, entry in files.items()
    )
    sums = "\n".join(f"{entry.sha256}  {file}" for file, entry in files.items())
    return f"""\
# Image retrieval: an image in, an embedding out

Images of one identity get embeddings that point the same way; rank a gallery by the dot product with the query's.

| file | what | mAP | params | MACs | bytes |
|---|---|---|---|---|---|
{rows}

mAP: protocol `{about.protocol}`, data `{about.data}`, identities that were not trained on, measured on these files in
ONNX Runtime. MACs: multiply-accumulates for one image.

## Input and output

- `{INPUT}`: float32 (batch, 3, {height}, {width}), RGB, any batch size.
- `{OUTPUT}`: float32 (batch, {about.embedding_dim}), of length 1. Embeddings of different files do not compare.

Preprocessing: EXIF orientation, RGB, antialiased bilinear resize to {height} x {width} (height x width), divide by
255, subtract the mean {list(about.mean)}, divide by the standard deviation {list(about.std)}.

## Run it

```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{name}", providers=["CPUExecutionProvider"])
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)
pixels = (np.asarray(image) / 255 - {list(about.mean)}) / {list(about.std)}
batch = pixels.transpose(2, 0, 1)[None].astype(np.float32)
embedding = session.run(["{OUTPUT}"], {{"{INPUT}": batch}})[0]
```

## Check it

`sha256sum -c SHA256SUMS`, or compare:

```text
{sums}
```

The files' own metadata hold the digests of data and params that they come from (data `{about.data_digest[:12]}`,
params `{about.params_digest[:12]}`).
"""
