"""What the teacher says about a batch, kept on disk for other students that see the same one.

A frozen teacher is a function of its images, and images derive from (seed, epoch, sample): students that differ in
budget, method or schedule need the same outputs. They are found by the images' bytes, so nothing else has to agree.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.files import write_atomically
from pipeline.models.resnet import RetrievalNet

log = logging.getLogger(__name__)

GIB = 2**30


class TeacherCache:
    """A teacher's answers on disk.

    Args:
        folder: Where the answers of all teachers are.
        limit: Bytes they may take together, as far as one process can tell; what does not fit is not kept, those of
            other teachers go first.
        teacher: Whose answers; it must not change.
        asked: What is asked for, such as the names of its features: what else an answer depends on.
    """

    def __init__(self, folder: Path, limit: float, teacher: RetrievalNet, asked: str) -> None:
        spec = teacher.spec.model_dump_json()
        self._folder, self._limit = folder / _digest(teacher.state_dict(), f"{spec} {asked}"), limit
        self._folder.mkdir(parents=True, exist_ok=True)
        os.utime(self._folder)  # the youngest: it goes last
        self._bytes = _size(folder)

    def __call__(self, images: Tensor, ask: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The answer to a batch, by name.

        Args:
            images: Normalised images (B, 3, H, W).
            ask: Asks the teacher itself, in case it has not been asked before.
        """
        path = self._folder / f"{_digest({'images': images})}.safetensors"
        with suppress(OSError, SafetensorError):  # never asked, thrown away meanwhile, or damaged
            return {name: tensor.to(images.device) for name, tensor in load_file(path).items()}
        answer = ask()
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in answer.items()}
        size = sum(tensor.nbytes for tensor in plain.values())
        try:
            if self._room(size):
                write_atomically(path, lambda temporary: save_file(plain, temporary))
                self._bytes += size
        except (OSError, SafetensorError) as error:  # a full disk costs time, not the training
            log.warning("the teacher's answers are not kept any more: %s", error)
            self._limit = 0
        return answer

    def _room(self, size: int) -> bool:
        """Whether there is room for so many bytes, once other teachers have gone, the oldest first."""
        others = [path for path in self._folder.parent.iterdir() if path.is_dir() and path != self._folder]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        while self._bytes + size > self._limit and size <= self._limit and others:
            shutil.rmtree(others.pop(), ignore_errors=True)
            self._bytes = _size(self._folder.parent)
        return self._bytes + size <= self._limit


def _digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Hexadecimal digest of names, shapes and values."""
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu()
        ordered = plain.permute(0, 2, 3, 1) if plain.dim() == 4 else plain  # as images lie in memory: no copy
        found.update(f"{name} {tuple(plain.shape)} {plain.dtype}".encode())
        found.update(ordered.contiguous().numpy().data)
    return found.hexdigest()


def _size(folder: Path) -> int:
    found = 0
    with suppress(OSError):  # another training makes room
        for path in folder.rglob("*.safetensors"):
            found += path.stat().st_size
    return found
