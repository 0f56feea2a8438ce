"""One picture that goes with the files, and what each makes of it: whoever downloads them can see that they work.

It is drawn, not taken from the data: those may be of persons, or not ours to give away.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.export.embed import Embeddings, Pixels
from pipeline.export.model import Model, load_model
from pipeline.export.parity import cosines
from pipeline.export.release import ReleaseError, read_release

PICTURE, EXPECTED = "sample.png", "sample.json"
FLOATS, BYTES = 0.99999, 0.99
"""Least cosine with what was written: processors round differently, and eight bits more so."""


def picture(image_size: tuple[int, int]) -> Pixels:
    """A drawn picture (h, w, 3), half as large again as the input: gradients, stripes and a disc."""
    height, width = (3 * side // 2 for side in image_size)
    down, across = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    disc = (down - 0.4) ** 2 + (across - 0.55) ** 2 < 0.06
    stripes = np.sin(40 * (down + 2 * across)) > 0.5
    colours = np.stack([across, down, 1 - across], axis=-1) * np.where(stripes, 0.6, 1.0)[..., None]
    colours[disc] = (0.9, 0.3, 0.1)
    found: Pixels = (255 * colours).round().astype(np.uint8)
    return found


def as_png(pixels: Pixels) -> bytes:
    """Content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def embedding_of(model: Model, pixels: Pixels) -> Embeddings:
    """What a file makes of a picture of any size, (1, D); one that does not resize gets it resized."""
    if not model.resizes:
        height, width = model.metadata.image_size
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return model.embed(pixels[None])


def expected(files: Mapping[str, bytes], image_size: tuple[int, int]) -> bytes:
    """Content of sample.json: by file name, the embedding of the picture and how near another one must come (`bound`).

    Args:
        files: ONNX files by name.
        image_size: Height and width of their input, pixels.
    """
    found = {}
    for name, content in files.items():
        embedding = embedding_of(load_model(name, content), picture(image_size))[0]
        found[name] = {"min_cosine": bound(name), "embedding": [round(float(value), 7) for value in embedding]}
    return (json.dumps(found) + "\n").encode()


def bound(name: str) -> float:
    """How near a file must come to what was written. What a download says about itself does not count."""
    return BYTES if "int8" in name else FLOATS


def check_release(folder: Path) -> dict[str, float]:
    """Hash all files of a release, then run each model on the picture.

    Returns:
        By model, the cosine between what it makes of the picture and what it made when it was written.

    Raises:
        ReleaseError: If a hash or an embedding is another than was written, or a model there has none.
    """
    files = read_release(folder)
    if missing := {PICTURE, EXPECTED} - set(files):
        raise ReleaseError(f"{folder} has no {' and no '.join(sorted(missing))}; it is no release of this package")
    listed = {name for name in files if _is_model(name)}
    if strangers := sorted(path.name for path in folder.iterdir() if _is_model(path.name) and path.name not in listed):
        raise ReleaseError(f"{folder} holds {', '.join(strangers)}, which is not part of the release; take it away")
    written = _parse(files[EXPECTED])
    if set(written) != listed:
        raise ReleaseError(
            f"{folder / EXPECTED} tells of {', '.join(sorted(written)) or 'no model'}, the release has "
            f"{', '.join(sorted(listed)) or 'none'}; get the folder again from where it came"
        )
    found = {}
    for name, embedding in written.items():
        model = load_model(name, files[name])
        made = embedding_of(model, _decode(files[PICTURE], model.metadata.image_size))
        if made.shape != (1, len(embedding)):
            raise ReleaseError(f"{name} gives an embedding of {made.shape[1]} numbers, {EXPECTED} has {len(embedding)}")
        found[name] = float(cosines(made, np.array([embedding], np.float32))[0])
        if not found[name] >= bound(name):
            raise ReleaseError(
                f"{name} works otherwise here: its embedding of {PICTURE} has cosine {found[name]:.6f} with the one "
                f"that it had when it was written; {bound(name)} is asked for"
            )
    return found


def _is_model(name: str) -> bool:
    return name.lower().endswith(".onnx")


def _parse(content: bytes) -> dict[str, list[float]]:
    """Embeddings by file name.

    Raises:
        ReleaseError: If it says anything else.
    """
    try:
        return {name: [float(value) for value in entry["embedding"]] for name, entry in json.loads(content).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(f"{EXPECTED} is not what this package writes ({type(error).__name__}: {error})") from None


def _decode(content: bytes, image_size: tuple[int, int]) -> Pixels:
    """The picture, whose size is known from the models: a small file can unpack to gigabytes.

    Raises:
        ReleaseError: If it is another.
    """
    height, width = (3 * side // 2 for side in image_size)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if (image.mode, image.size) == ("RGB", (width, height)):
                return np.asarray(image)
            raise ReleaseError(
                f"{PICTURE} has {image.size} pixels in {image.mode}; {(width, height)} in RGB were drawn"
            )
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's own for what is damaged
        raise ReleaseError(f"{PICTURE} cannot be decoded ({error})") from None
