"""An index of a gallery: its embeddings, and the hashes of its images and of the model that computed them.

Embeddings of different models are not comparable, so an index refuses queries of another model. Images that were
deleted or replaced since are recognised by their hashes.
"""

import hashlib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from errno import EFBIG, EINVAL
from pathlib import Path
from stat import S_ISREG
from typing import Self

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.data.folders import walk
from pipeline.data.images import MAX_BYTES, Pixels, decode
from pipeline.data.parallel import in_threads
from pipeline.export.embed import Embeddings, fixed_batch
from pipeline.export.model import Model, open_model
from pipeline.export.release import SUMS, ReleaseError, read_release, read_sums, write_release
from pipeline.progress import track
from pipeline.runtime import available_threads

log = logging.getLogger(__name__)

VECTORS, INFO = "vectors.npy", "index.json"
BATCH, CHUNK = 32, 256
"""Images that are embedded, and images that are decoded at a time: the gallery need not fit into memory."""
SAMPLE = 100
"""Images that must not all be missing from a gallery, evenly spread over the index."""


class GalleryError(RuntimeError):
    """A gallery cannot be indexed, or an index cannot be used."""

    exit_code = 3


class IndexInfo(BaseModel):
    """Content of index.json.

    Attributes:
        model: Absolute path of the model when the index was written.
        model_from_here: The same, relative to the folder of the index, for a checkout that was moved or copied.
        sha256: SHA-256 of the model.
        gallery: Absolute path of the folder of the images.
        gallery_from_here: The same, relative to the folder of the index.
        paths: Paths of the images, relative to `gallery`.
        digests: SHA-256 of the images.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    model_from_here: str
    sha256: str
    gallery: str
    gallery_from_here: str
    paths: list[str] = Field(min_length=1)
    digests: list[str]

    @model_validator(mode="after")
    def _has_a_digest_of_each_image(self) -> Self:
        if len(self.digests) != len(self.paths):
            raise ValueError(f"{len(self.digests)} digests of {len(self.paths)} images")
        return self


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
        paths: Paths of the images, relative to the gallery.
        digests: SHA-256 of the images, in the order of `paths`.
        vectors: (n, D) L2-normalised embeddings, in the order of `paths`.
    """

    def __init__(
        self, model: Model, gallery: Path, paths: Sequence[str], digests: Sequence[str], vectors: Embeddings
    ) -> None:
        self.model, self.gallery, self.paths = model, gallery, list(paths)
        self._digests, self._vectors = list(digests), vectors
        faiss.omp_set_num_threads(available_threads())  # OpenMP ignores the quotas of control groups
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
        """Return the path of an image, if the file there is the one that was indexed.

        An index from elsewhere may name any path, and a link may lead anywhere: only what its author knew is shown.

        Raises:
            GalleryError: If the path leads outside the gallery, or the file was deleted or replaced.
        """
        name = Path(self.paths[place])
        if name.is_absolute() or ".." in name.parts:
            raise GalleryError(f"{name} is outside the gallery {self.gallery}; index it again")
        try:
            digest = _digest(self.gallery / name)
        except (OSError, ValueError) as error:  # a null character in a path is a ValueError
            reason = getattr(error, "strerror", None) or error
            raise GalleryError(
                f"{name} is not in {self.gallery} ({reason}); index the gallery again, or name its new folder "
                "with `--gallery`"
            ) from None
        if digest != self._digests[place]:
            raise GalleryError(f"{name} in {self.gallery} is not the file that was indexed; index the gallery again")
        return self.gallery / name

    def intact(self, hits: Sequence[Hit]) -> tuple[list[Path], list[str]]:
        """Return the paths of the hits that are still what was indexed, and what is wrong with the others."""
        paths, problems = [], []
        for hit in hits:
            try:
                paths.append(self.path(hit.place))
            except GalleryError as error:
                problems.append(str(error))
        return paths, problems

    def check_gallery(self) -> None:
        """Check that the gallery is where it should be.

        Raises:
            GalleryError: If it is no folder, or has none of the images (`SAMPLE` of them are tried).
        """
        if not self.gallery.is_dir():
            raise GalleryError(f"the gallery {self.gallery} is gone; name its new folder with `--gallery`")
        if not any((self.gallery / name).exists() for name in self.paths[:: -(-len(self) // SAMPLE)]):
            raise GalleryError(
                f"{self.gallery} has none of the images of the index, such as {self.paths[0]}; name their folder with "
                "`--gallery`"
            )

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
            model=os.path.abspath(model),  # not resolved: DVC may link to a file of its cache, which is no release
            model_from_here=os.path.relpath(model, folder),
            sha256=self.model.sha256,
            gallery=os.path.abspath(self.gallery),
            gallery_from_here=os.path.relpath(self.gallery, folder),
            paths=self.paths,
            digests=self._digests,
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
    by_reason: dict[str, list[str]] = {"": []}
    for path, reason in walk(gallery):
        by_reason.setdefault(reason, []).append(path)
    candidates = by_reason.pop("")
    for reason, skipped in by_reason.items():
        log.warning("%d files of the gallery, such as %s, are %s", len(skipped), skipped[0], reason)
    size, batch = loaded.metadata.image_size, fixed_batch(loaded.session) or BATCH
    decoded = max(CHUNK, batch)

    def read(path: str) -> tuple[str, Pixels] | str:
        try:
            return _digest(gallery / path), decode(gallery / path, size)
        except Exception as error:  # whatever a decoder raises
            return f"{type(error).__name__}: {error}"

    paths: list[str] = []
    digests: list[str] = []
    embeddings: list[Embeddings] = []
    chunks = [candidates[start : start + decoded] for start in range(0, len(candidates), decoded)]
    for chunk in track(chunks, len(chunks), "embedding"):
        pictures = []
        for path, result in zip(chunk, in_threads(read, chunk), strict=True):
            if isinstance(result, str):
                log.warning("%s is skipped: %s", path, result)
            else:
                paths.append(path)
                digests.append(result[0])
                pictures.append(result[1])
        for start in range(0, len(pictures), batch):
            embeddings.append(loaded.embed(np.stack(pictures[start : start + batch])))
    if not paths:
        raise GalleryError(f"{gallery} has no readable image ({len(candidates)} files were tried)")
    return Index(loaded, gallery, paths, digests, np.concatenate(embeddings))


def _digest(path: Path) -> str:
    """Return the SHA-256 of an image.

    Raises:
        OSError: If it cannot be read, or is not a regular file: reading a device or a pipe may never end.
    """
    state = path.stat()
    if not S_ISREG(state.st_mode):
        raise OSError(EINVAL, "not a regular file")
    if state.st_size > MAX_BYTES:
        raise OSError(EFBIG, f"larger than {MAX_BYTES} bytes")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_index(folder: Path, model: Path | None = None, gallery: Path | None = None) -> Index:
    """Read an index and load its model.

    Model and gallery are looked for relative to the index, as in a checkout that was moved or copied, then where they
    were when it was written.

    Args:
        model: Path of the model, if it was moved.
        gallery: Folder of the images, if it was moved.

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
    path = model or _find(folder, info.model_from_here, info.model)
    if not path.is_file():
        remedy = "a link to nothing: run `dvc checkout`" if path.is_symlink() else "gone: name its path with `--model`"
        raise GalleryError(f"the model {path} of {folder} is {remedy}")
    loaded = open_model(path)
    if loaded.sha256 != info.sha256:
        raise GalleryError(
            f"{folder} was embedded by a model with SHA-256 {info.sha256[:12]}..., but that of {path} is "
            f"{loaded.sha256[:12]}..., so its queries do not fit: index the gallery again, or choose the right model "
            "with `--model`"
        )
    vectors = _vectors(folder / VECTORS, content[VECTORS], (len(info.paths), loaded.metadata.embedding_dim))
    where = gallery or _find(folder, info.gallery_from_here, info.gallery)
    return Index(loaded, where, info.paths, info.digests, vectors)


def _find(folder: Path, from_here: str, absolute: str) -> Path:
    near = Path(os.path.abspath(folder / from_here))
    return near if os.path.lexists(near) else Path(absolute)


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
