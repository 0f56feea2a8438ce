"""A cache on disk for the outputs of the teacher, shared by students that see the same batches.

The teacher is frozen and every image is a function of (seed, epoch, sample), so students that differ only in budget,
method or schedule need the same outputs. The key of a batch is a digest of its pixels, so nothing else must agree.
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
    """The outputs of one teacher, one safetensors file per batch.

    Args:
        folder: Holds a folder for each teacher.
        limit: Bytes for all teachers together, as far as this process can measure. If the space is used up, the outputs
            of other teachers are deleted, oldest first; after that, further outputs are not stored.
        teacher: A frozen network.
        settings: What else the outputs depend on, such as the names of the features and the precision.
    """

    def __init__(self, folder: Path, limit: float, teacher: RetrievalNet, settings: str) -> None:
        spec = teacher.spec.model_dump_json()
        self._folder, self._limit = folder / _digest(teacher.state_dict(), f"{spec} {settings}"), limit
        self._folder.mkdir(parents=True, exist_ok=True)
        os.utime(self._folder)  # most recently used, so deleted last
        self._bytes = _size(folder)

    def __call__(self, images: Tensor, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the outputs for normalised images (B, 3, H, W) by name; run `compute` only if they are not stored."""
        path = self._folder / f"{_digest({'images': images})}.safetensors"
        with suppress(OSError, SafetensorError):  # not stored, deleted by another training, or damaged
            return {name: tensor.to(images.device) for name, tensor in load_file(path).items()}
        outputs = compute()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in outputs.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            if self._make_room(size):
                write_atomically(path, lambda temporary: save_file(tensors, temporary))
                self._bytes += size
        except (OSError, SafetensorError) as error:  # a full disk must not end the training
            log.warning("the outputs of the teacher are no longer cached: %s", error)
            self._limit = 0
        return outputs

    def _make_room(self, size: int) -> bool:
        """Delete outputs of other teachers, oldest first, and return whether `size` bytes fit."""
        others = [path for path in self._folder.parent.iterdir() if path.is_dir() and path != self._folder]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        while self._bytes + size > self._limit and size <= self._limit and others:
            shutil.rmtree(others.pop(), ignore_errors=True)
            self._bytes = _size(self._folder.parent)
        return self._bytes + size <= self._limit


def _digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return a hexadecimal digest of names, shapes and values."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        in_memory = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor  # channels_last: avoids a copy
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(in_memory.contiguous().numpy().data)
    return digest.hexdigest()


def _size(folder: Path) -> int:
    size = 0
    with suppress(OSError):  # another training may delete files at the same time
        for path in folder.rglob("*.safetensors"):
            size += path.stat().st_size
    return size
