"""Read labelled embeddings from .npz files, for `smaller-student evaluate`."""

import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from pipeline.labels import LOOK_ALIKE, clean_label, look_alikes
from pipeline.protocols import PROTOCOLS
from pipeline.retrieval.scoring import Side

log = logging.getLogger(__name__)


class ArchiveError(ValueError):
    """A file does not contain embeddings that can be scored."""

    exit_code = 2


@dataclass(frozen=True)
class Archive:
    """Labelled embeddings from a .npz file.

    Attributes:
        query: Arrays ``query`` (n, D), ``query_ids`` (n,) and, if the protocol needs it, ``query_cameras`` (n,).
        gallery: The same arrays with ``gallery`` in their names; None if the protocol takes no gallery.
    """

    query: Side
    gallery: Side | None


def read_archive(path: Path, protocol: str) -> Archive:
    """Read the arrays that a protocol needs from a .npz file.

    Raises:
        ArchiveError: If it is not a .npz file, or arrays are missing or have the wrong shape or type.
        FileNotFoundError: If the file does not exist.
    """
    if protocol not in PROTOCOLS:
        raise ArchiveError(f"there is no protocol {protocol!r}; use one of {', '.join(PROTOCOLS)}")
    rules = PROTOCOLS[protocol]
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, NpzFile):
            raise ArchiveError(f"{path} is a single array, not an archive; write the file with numpy.savez")
        with file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except (BadZipFile, ValueError, OSError, EOFError, zlib.error) as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"{path} is not an archive of plain arrays ({error}); write it with numpy.savez") from error
    names = ["query", *(["gallery"] if rules.gallery == "given" else [])]
    needed = [*names, *(f"{name}_ids" for name in names)]
    if rules.cameras:
        needed += [f"{name}_cameras" for name in names]
    if missing := [name for name in needed if name not in arrays]:
        raise ArchiveError(f"{path} lacks {', '.join(missing)}, which protocol {protocol} needs")
    sides = [_side(path, name, arrays, rules.cameras) for name in names]
    for group in look_alikes(label for side in sides for label in set(side.identities.tolist())):
        log.warning("%s: identities %s: %s", path, LOOK_ALIKE, ", ".join(map(repr, group)))
    return Archive(sides[0], sides[1] if len(sides) > 1 else None)


def _side(path: Path, name: str, arrays: dict[str, npt.NDArray[np.generic]], needs_cameras: bool) -> Side:
    vectors = arrays[name]
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise ArchiveError(f"{path}: `{name}` must hold numbers (n, D), got {vectors.dtype} {vectors.shape}")
    cameras = arrays[f"{name}_cameras"] if needs_cameras else None
    return Side(
        vectors.astype(vectors.dtype if vectors.dtype.kind == "f" else np.float32, copy=False),
        _labels(path, f"{name}_ids", arrays[f"{name}_ids"]),
        None if cameras is None else _labels(path, f"{name}_cameras", cameras),
    )


def _labels(path: Path, name: str, labels: npt.NDArray[np.generic]) -> npt.NDArray[np.str_]:
    """Convert integers or text to clean text; floats are refused, since 1.0 and 1 would be two identities."""
    if labels.ndim != 1 or labels.dtype.kind not in "iuUS":
        raise ArchiveError(f"{path}: `{name}` must hold integers or text (n,), got {labels.dtype} {labels.shape}")
    texts = np.char.decode(labels.astype(np.bytes_), "utf-8") if labels.dtype.kind == "S" else labels.astype(np.str_)
    cleaned = {text: clean_label(text) for text in np.unique(texts).tolist()}
    if changed := [text for text in cleaned if cleaned[text] != text]:
        log.warning("%s: %d labels in `%s` are trimmed or Unicode-normalised, such as %r", path, len(changed), name,
                    changed[0])  # fmt: skip
    return np.array([cleaned[text] for text in texts.tolist()], np.str_)
