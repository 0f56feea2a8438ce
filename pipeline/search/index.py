"""A gallery's embeddings, and which model made them: queries of another would find nothing, and not say so."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from pipeline.data.images import Pixels, decode
from pipeline.data.own import walk
from pipeline.data.parallel import in_threads
from pipeline.export.embed import Embeddings
from pipeline.export.model import Model, open_model
from pipeline.export.release import read_release, write_release
from pipeline.progress import track

log = logging.getLogger(__name__)

VECTORS, ABOUT = "vectors.faiss", "index.json"
BATCH, CHUNK = 32, 256
"""Images that are embedded at a time, and that are decoded at a time: a gallery need not fit into memory."""


class GalleryError(RuntimeError):
    """A gallery cannot be indexed, or an index not be asked."""

    exit_code = 3


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
        vectors: Of them, in this order.

    Attributes:
        model: See above.
        gallery: See above.
        paths: See above.
    """

    def __init__(self, model: Model, gallery: Path, paths: Sequence[str], vectors: faiss.Index) -> None:
        self.model, self.gallery, self.paths, self._vectors = model, gallery, list(paths), vectors

    def __len__(self) -> int:
        return len(self.paths)

    def search(self, embedding: Embeddings, top: int) -> list[Hit]:
        """Nearest images, best first; of equally near ones that with the smaller place.

        Args:
            embedding: (1, D), by this index's model.
            top: How many; all there are if they are fewer.
        """
        similarities, places = self._vectors.search(embedding, min(top, len(self)))
        found = sorted(zip(-similarities[0], places[0], strict=True))
        return [Hit(int(place), self.paths[place], -float(similarity)) for similarity, place in found]

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
        """
        about = {
            "model": str(model.resolve()),
            "sha256": self.model.sha256,
            "gallery": str(self.gallery.resolve()),
            "paths": self.paths,
        }
        content = json.dumps(about, ensure_ascii=False, indent=1).encode()
        write_release(folder, {ABOUT: content, VECTORS: bytes(faiss.serialize_index(self._vectors))})


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
    vectors = faiss.IndexFlatIP(loaded.metadata.embedding_dim)
    vectors.add(np.concatenate(embeddings))
    return Index(loaded, gallery, paths, vectors)


def open_index(folder: Path, model: Path | None = None) -> Index:
    """Read an index, and the model that made it.

    Args:
        folder: Where it was written.
        model: Where the model lies now; None for where it lay.

    Raises:
        ReleaseError: If index or model are not what was written.
        GalleryError: If the model is another than that which embedded the gallery.
    """
    content = read_release(folder)
    about = json.loads(content[ABOUT])
    path = model or Path(about["model"])
    loaded = open_model(path)
    if loaded.sha256 != about["sha256"]:
        raise GalleryError(
            f"{folder} was embedded by a model with SHA-256 {about['sha256'][:12]}..., {path} has "
            f"{loaded.sha256[:12]}...; its queries would find nothing there: index the gallery anew, or name the model "
            "by `--model`"
        )
    vectors: npt.NDArray[np.uint8] = np.frombuffer(content[VECTORS], np.uint8)
    return Index(loaded, Path(about["gallery"]), about["paths"], faiss.deserialize_index(vectors))
