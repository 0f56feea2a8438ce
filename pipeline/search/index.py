"""A gallery's embeddings, and which model made them: queries of another would find nothing, and not say so."""

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

log = logging.getLogger(__name__)

VECTORS, ABOUT = "vectors.npy", "index.json"
BATCH, CHUNK = 32, 256
"""Images that are embedded at a time, and that are decoded at a time: a gallery need not fit into memory."""


class GalleryError(RuntimeError):
    """A gallery cannot be indexed, or an index not be asked."""

    exit_code = 3


class IndexInfo(BaseModel):
    """What index.json says.

    Attributes:
        model: Where the model lay.
        sha256: Of the model.
        gallery: Folder of the images.
        paths: Of the images, relative to it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    sha256: str
    gallery: str
    paths: list[str] = Field(min_length=1)


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        place: In the index.
        path: Relative to the gallery.
        similarity: Cosine.
    """

    place: int
    path: str
    similarity: float


class Index:
    """A gallery that can be searched, exactly.

    Args:
        model: That embeds queries, and has embedded the gallery.
        gallery: Folder of the images.
        paths: Of the images, relative to it.
        vectors: (n, D) of them, in this order.

    Attributes:
        model: See above.
        gallery: See above.
        paths: See above.
    """

    def __init__(self, model: Model, gallery: Path, paths: Sequence[str], vectors: Embeddings) -> None:
        self.model, self.gallery, self.paths, self._vectors = model, gallery, list(paths), vectors
        self._found = faiss.IndexFlatIP(vectors.shape[1])
        self._found.add(vectors)

    def __len__(self) -> int:
        return len(self.paths)

    def search(self, embedding: Embeddings, top: int) -> list[Hit]:
        """Nearest images, best first; of equally near ones that with the smaller place.

        Args:
            embedding: (1, D), by this index's model.
            top: How many; all there are if they are fewer.
        """
        similarities, places = self._found.search(embedding, min(top, len(self)))
        found = sorted(zip(-similarities[0], places[0], strict=True))
        return [Hit(int(place), self.paths[place], -float(similarity)) for similarity, place in found]

    def path(self, place: int) -> Path:
        """An image of the gallery; an index that came from elsewhere reaches nothing outside of it.

        Raises:
            GalleryError: If it lies elsewhere, be it by a link.
        """
        path = (self.gallery / self.paths[place]).resolve()
        if not path.is_relative_to(self.gallery.resolve()):
            raise GalleryError(f"{self.paths[place]} lies outside of {self.gallery}")
        return path

    def query(self, picture: Path) -> Pixels:
        """A picture as the model wants it, (1, h, w, 3).

        Raises:
            DataError: If it is too large, or of a kind that is not read.
            OSError: If it cannot be decoded.
        """
        return decode(picture, self.model.metadata.image_size)[None]

    def save(self, folder: Path, model: Path) -> None:
        """Write the index.

        Args:
            folder: Where it goes.
            model: Where the model lies; the index names it, and its hash.

        Raises:
            GalleryError: If the folder holds something else that was written by this package.
        """
        check_place(folder)
        about = IndexInfo(
            model=str(model.resolve()),
            sha256=self.model.sha256,
            gallery=str(self.gallery.resolve()),
            paths=self.paths,
        )
        vectors = io.BytesIO()
        np.save(vectors, self._vectors, allow_pickle=False)
        write_release(folder, {ABOUT: about.model_dump_json(indent=1).encode(), VECTORS: vectors.getvalue()})


def check_place(folder: Path) -> None:
    """Refuse to write an index where another release is: its files would go.

    Raises:
        GalleryError: If there is one.
    """
    try:
        names = set(read_sums(folder))
    except ReleaseError:  # none, or no finished one
        return
    if others := sorted(names - {ABOUT, VECTORS}):
        raise GalleryError(f"{folder} is a release with {', '.join(others)}; name another folder by `--out`")


def build(model: Path, gallery: Path) -> Index:
    """Embed all images below a folder; those that cannot be read are left out and named.

    Args:
        model: ONNX file of a release.
        gallery: Folder.

    Raises:
        ReleaseError: If the model is not what was written.
        GalleryError: If there is no image.
    """
    loaded = open_model(model)
    if not gallery.is_dir():
        raise GalleryError(f"{gallery} is no folder")
    candidates = [path for path, reason in walk(gallery, "") if not reason]
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
        read_ones = dict(zip(chunk, in_threads(read, chunk), strict=True))
        for path, picture in read_ones.items():
            if isinstance(picture, str):
                log.warning("%s is left out: %s", path, picture)
        good = {path: picture for path, picture in read_ones.items() if not isinstance(picture, str)}
        paths += good
        pictures = list(good.values())
        for start in range(0, len(pictures), BATCH):
            embeddings.append(loaded.embed(np.stack(pictures[start : start + BATCH])))
    if not paths:
        raise GalleryError(f"{gallery} holds no image that can be read ({len(candidates)} files were looked at)")
    return Index(loaded, gallery, paths, np.concatenate(embeddings))


def open_index(folder: Path, model: Path | None = None) -> Index:
    """Read an index, and the model that made it.

    Args:
        folder: Where it was written.
        model: Where the model lies now; None for where it lay.

    Raises:
        ReleaseError: If index or model are not what was written.
        GalleryError: If it is no index, or the model another than that which embedded the gallery.
    """
    content = read_release(folder)
    if set(content) != {ABOUT, VECTORS}:
        raise GalleryError(
            f"{folder} is no index: {SUMS} names {', '.join(content)}; `smaller-student index` makes one"
        )
    try:
        about = IndexInfo.model_validate_json(content[ABOUT])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise GalleryError(f"{folder / ABOUT} is not what this package writes: {where} {first['msg']}") from None
    path = model or Path(about.model)
    loaded = open_model(path)
    if loaded.sha256 != about.sha256:
        raise GalleryError(
            f"{folder} was embedded by a model with SHA-256 {about.sha256[:12]}..., {path} has "
            f"{loaded.sha256[:12]}...; its queries would find nothing there: index the gallery anew, or name the model "
            "by `--model`"
        )
    vectors = _vectors(folder / VECTORS, content[VECTORS], (len(about.paths), loaded.metadata.embedding_dim))
    return Index(loaded, Path(about.gallery), about.paths, vectors)


def _vectors(path: Path, content: bytes, shape: tuple[int, int]) -> Embeddings:
    """Embeddings as NumPy wrote them.

    Raises:
        GalleryError: If they are of another shape or kind, or not finite.
    """
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise GalleryError(f"{path} is no array of NumPy's ({error})") from None
    if not isinstance(found, np.ndarray) or (found.shape, found.dtype) != (shape, np.float32):
        what = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "an archive"
        raise GalleryError(f"{path} holds {what}; float32 {shape} belong to the images")
    if not np.isfinite(found).all():
        raise GalleryError(f"{path} holds numbers that are not finite; index the gallery anew")
    return np.ascontiguousarray(found)
