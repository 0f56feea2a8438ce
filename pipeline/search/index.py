"""An index of a gallery: its embeddings, and the hash of the model that computed them.

Embeddings of different models are not comparable, so an index refuses queries of another model.
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.data.custom import walk
from pipeline.data.images import Pixels, decode
from pipeline.data.parallel import in_threads
from pipeline.export.embed import Embeddings
from pipeline.export.model import Model, open_model
from pipeline.export.release import SUMS, ReleaseError, read_release, read_sums, write_release
from pipeline.progress import track
from pipeline.runtime import available_threads

log = logging.getLogger(__name__)

VECTORS, INFO = "vectors.npy", "index.json"
BATCH, CHUNK = 32, 256
"""Images that are embedded, and images that are decoded at a time: the gallery need not fit into memory."""


class GalleryError(RuntimeError):
    """A gallery cannot be indexed, or an index cannot be used."""

    exit_code = 3


class IndexInfo(BaseModel):
    """Content of index.json.

    Attributes:
        model: Path of the model when the index was written.
        sha256: SHA-256 of the model.
        gallery: Folder of the images.
        paths: Paths of the images, relative to `gallery`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    sha256: str
    gallery: str
    paths: list[str] = Field(min_length=1)


@dataclass(frozen=True)
class Hit:
    """A search result.

    Attributes:
        place: Position in the index, from 0.
        path: Path of the image, relative to the gallery.
        similarity: Cosine, in [-1, 1].
    """

    place: int
    path: str
    similarity: float


class Index:
    """A gallery for exact nearest-neighbour search.

    Args:
        model: Embeds queries, and has embedded the gallery.
        gallery: Folder of the images.
        paths: Paths of the images, relative to `gallery`.
        vectors: (n, D) L2-normalised embeddings, in the order of `paths`.
    """

    def __init__(self, model: Model, gallery: Path, paths: Sequence[str], vectors: Embeddings) -> None:
        self.model, self.gallery, self.paths, self._vectors = model, gallery, list(paths), vectors
        faiss.omp_set_num_threads(available_threads())  # OpenMP does not know the quotas of control groups
        self._faiss = faiss.IndexFlatIP(vectors.shape[1])
        self._faiss.add(vectors)

    def __len__(self) -> int:
        return len(self.paths)

    def search(self, embedding: Embeddings, top: int) -> list[Hit]:
        """Return the `top` nearest images, best first, equally near ones in the order of the index.

        Args:
            embedding: (1, D), by this index's model.
        """
        similarities, places = self._faiss.search(embedding, min(top, len(self)))
        nearest = sorted(zip(-similarities[0], places[0], strict=True))
        return [Hit(int(place), self.paths[place], -float(negative)) for negative, place in nearest]

    def path(self, place: int) -> Path:
        """Return the path of an image, which must be in the gallery: an index from elsewhere may name any path.

        Raises:
            GalleryError: If the path, or a link in it, leads outside the gallery.
        """
        path = (self.gallery / self.paths[place]).resolve()
        if not path.is_relative_to(self.gallery.resolve()):
            raise GalleryError(f"{self.paths[place]} is outside the gallery {self.gallery}; index it again")
        return path

    def query(self, picture: Path) -> Pixels:
        """Decode a picture at the model's input size, (1, h, w, 3).

        Raises:
            DataError: If it is too large, or its mode is not supported.
            OSError: If it cannot be decoded.
        """
        return decode(picture, self.model.metadata.image_size)[None]

    def save(self, folder: Path, model: Path) -> None:
        """Write the index to a folder; it stores the path and the hash of its model.

        Raises:
            GalleryError: If the folder contains another release.
        """
        check_place(folder)
        info = IndexInfo(
            model=str(model.resolve()),
            sha256=self.model.sha256,
            gallery=str(self.gallery.resolve()),
            paths=self.paths,
        )
        vectors = io.BytesIO()
        np.save(vectors, self._vectors, allow_pickle=False)
        write_release(folder, {INFO: info.model_dump_json(indent=1).encode(), VECTORS: vectors.getvalue()})


def check_place(folder: Path) -> None:
    """Check that a folder contains no release other than an index, whose files would be deleted.

    Raises:
        GalleryError: If it does.
    """
    try:
        names = set(read_sums(folder))
    except ReleaseError:  # no release, or an incomplete one
        return
    if others := sorted(names - {INFO, VECTORS}):
        raise GalleryError(f"{folder} is a release with {', '.join(others)}; choose another folder with `--out`")


def build(model: Path, gallery: Path) -> Index:
    """Embed all images below a folder; unreadable images are skipped with a warning.

    Args:
        model: ONNX file of a release.
        gallery: Folder of the images, searched recursively.

    Raises:
        ReleaseError: If the SHA-256 of the model is not that of its release.
        GalleryError: If there is no readable image.
    """
    loaded = open_model(model)
    if not gallery.is_dir():
        raise GalleryError(f"{gallery} is not a folder; name one with `--gallery`")
    candidates = [path for path, reason in walk(gallery) if not reason]
    size = loaded.metadata.image_size

    def read(path: str) -> Pixels | str:
        try:
            return decode(gallery / path, size)
        except Exception as error:  # whatever a decoder raises
            return f"{type(error).__name__}: {error}"

    paths: list[str] = []
    embeddings: list[Embeddings] = []
    chunks = [candidates[start : start + CHUNK] for start in range(0, len(candidates), CHUNK)]
    for chunk in track(chunks, len(chunks), "embedding"):
        pictures = []
        for path, result in zip(chunk, in_threads(read, chunk), strict=True):
            if isinstance(result, str):
                log.warning("%s is skipped: %s", path, result)
            else:
                paths.append(path)
                pictures.append(result)
        for start in range(0, len(pictures), BATCH):
            embeddings.append(loaded.embed(np.stack(pictures[start : start + BATCH])))
    if not paths:
        raise GalleryError(f"{gallery} has no readable image ({len(candidates)} files were tried)")
    return Index(loaded, gallery, paths, np.concatenate(embeddings))


def open_index(folder: Path, model: Path | None = None) -> Index:
    """Read an index and load its model.

    Args:
        model: Path of the model; None for its path when the index was written.

    Raises:
        ReleaseError: If the SHA-256 of a file of the index or of the model is wrong.
        GalleryError: If the folder is not an index, or the gallery was embedded by another model.
    """
    content = read_release(folder)
    if set(content) != {INFO, VECTORS}:
        raise GalleryError(
            f"{folder} is not an index: {SUMS} names {', '.join(content)}; `smaller-student index` writes one"
        )
    try:
        info = IndexInfo.model_validate_json(content[INFO])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise GalleryError(f"{folder / INFO} is invalid: {key}: {first['msg']}; index the gallery again") from None
    path = model or Path(info.model)
    loaded = open_model(path)
    if loaded.sha256 != info.sha256:
        raise GalleryError(
            f"{folder} was embedded by a model with SHA-256 {info.sha256[:12]}..., but that of {path} is "
            f"{loaded.sha256[:12]}..., so its queries do not fit: index the gallery again, or choose the right model "
            "with `--model`"
        )
    vectors = _vectors(folder / VECTORS, content[VECTORS], (len(info.paths), loaded.metadata.embedding_dim))
    return Index(loaded, Path(info.gallery), info.paths, vectors)


def _vectors(path: Path, content: bytes, shape: tuple[int, int]) -> Embeddings:
    """Read embeddings from the content of a .npy file.

    Raises:
        GalleryError: If their shape or type is wrong, or they are not finite.
    """
    try:
        vectors = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise GalleryError(f"{path} is not a NumPy array ({error}); index the gallery again") from None
    if not isinstance(vectors, np.ndarray) or (vectors.shape, vectors.dtype) != (shape, np.float32):
        actual = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else "an archive"
        raise GalleryError(f"{path} holds {actual}, not float32 {shape}; index the gallery again")
    if not np.isfinite(vectors).all():
        raise GalleryError(f"{path} holds numbers that are not finite; index the gallery again")
    return np.ascontiguousarray(vectors)
