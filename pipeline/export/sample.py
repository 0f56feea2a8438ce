"""A sample image and its expected embeddings, so that whoever downloads a release can test its models.

The image is drawn, not taken from the data set, which may show persons or be under a restrictive licence.
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
MIN_COSINE_FLOAT, MIN_COSINE_INT8 = 0.99999, 0.99
"""Smallest allowed cosine with the expected embedding: processors round differently, int8 kernels more so."""


def picture(image_size: tuple[int, int]) -> Pixels:
    """Draw the sample image: gradients, stripes and a disc, (3h/2, 3w/2, 3) for an input size of (h, w)."""
    height, width = (3 * side // 2 for side in image_size)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    disc = (y - 0.4) ** 2 + (x - 0.55) ** 2 < 0.06
    stripes = np.sin(40 * (y + 2 * x)) > 0.5
    colours = np.stack([x, y, 1 - x], axis=-1) * np.where(stripes, 0.6, 1.0)[..., None]
    colours[disc] = (0.9, 0.3, 0.1)
    pixels: Pixels = (255 * colours).round().astype(np.uint8)
    return pixels


def as_png(pixels: Pixels) -> bytes:
    """Encode an image as PNG."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def _embed(model: Model, pixels: Pixels) -> Embeddings:
    """Embed one image of any size, (h, w, 3) -> (1, D), resizing it if the model does not."""
    if not model.resizes:
        height, width = model.metadata.image_size
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return model.embed(pixels[None])


def expected(files: Mapping[str, bytes], image_size: tuple[int, int]) -> bytes:
    """Return the content of sample.json: per model, the embedding of the sample image and the smallest allowed cosine.

    Args:
        files: Content of the ONNX files by name.
        image_size: (height, width) of their input, pixels.
    """
    entries = {}
    for name, content in files.items():
        embedding = _embed(load_model(name, content), picture(image_size))[0]
        entries[name] = {"min_cosine": _min_cosine(name), "embedding": [round(float(value), 7) for value in embedding]}
    return (json.dumps(entries) + "\n").encode()


def _min_cosine(name: str) -> float:
    """Return the limit by file name; the one in a downloaded sample.json is not trusted."""
    return MIN_COSINE_INT8 if "int8" in name else MIN_COSINE_FLOAT


def check_release(folder: Path) -> dict[str, float]:
    """Check the hashes of a release, then run each model on the sample image.

    Returns:
        For each model, the cosine between its embedding and the expected one.

    Raises:
        ReleaseError: If a hash or an embedding differs, or the models and sample.json do not match.
    """
    files = read_release(folder)
    if missing := {PICTURE, EXPECTED} - set(files):
        raise ReleaseError(f"{folder} is not a release of this package: {' and '.join(sorted(missing))} missing")
    models = {name for name in files if _is_model(name)}
    if unlisted := sorted(path.name for path in folder.iterdir() if _is_model(path.name) and path.name not in models):
        raise ReleaseError(f"{', '.join(unlisted)} in {folder} is not part of the release; remove it")
    embeddings = _parse(files[EXPECTED])
    if set(embeddings) != models:
        raise ReleaseError(
            f"{folder / EXPECTED} has embeddings of {', '.join(sorted(embeddings)) or 'no model'}, but the release has "
            f"{', '.join(sorted(models)) or 'no model'}; download the folder again"
        )
    result = {}
    for name, embedding in embeddings.items():
        model = load_model(name, files[name])
        output = _embed(model, _decode(files[PICTURE], model.metadata.image_size))
        if output.shape != (1, len(embedding)):
            raise ReleaseError(
                f"{name} returns an embedding of length {output.shape[1]}; {EXPECTED} expects {len(embedding)}"
            )
        result[name] = float(cosines(output, np.array([embedding], np.float32))[0])
        if not result[name] >= _min_cosine(name):
            raise ReleaseError(
                f"{name} gives another embedding of {PICTURE} on this machine than when it was exported: cosine "
                f"{result[name]:.6f}, at least {_min_cosine(name)} is required"
            )
    return result


def _is_model(name: str) -> bool:
    return name.lower().endswith(".onnx")


def _parse(content: bytes) -> dict[str, list[float]]:
    """Return the expected embeddings by file name.

    Raises:
        ReleaseError: If the content has another structure.
    """
    try:
        return {name: [float(value) for value in entry["embedding"]] for name, entry in json.loads(content).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(
            f"{EXPECTED} is not in the format of this package ({type(error).__name__}: {error})"
        ) from None


def _decode(content: bytes, image_size: tuple[int, int]) -> Pixels:
    """Decode the sample image, whose size follows from the models'.

    The size is checked before decoding: a small PNG can unpack to gigabytes.

    Raises:
        ReleaseError: If it is not a PNG of that size.
    """
    height, width = (3 * side // 2 for side in image_size)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if (image.mode, image.size) == ("RGB", (width, height)):
                return np.asarray(image)
            raise ReleaseError(f"{PICTURE} has size {image.size} and mode {image.mode}, not {(width, height)} and RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises these for damaged files
        raise ReleaseError(f"{PICTURE} cannot be decoded ({error})") from None
