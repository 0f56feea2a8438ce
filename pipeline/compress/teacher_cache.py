"""The outputs of the teacher for a fixed number of views of each image: computed once, then read from disk.

The teacher is frozen, and a view of an image is a function of (seed, view, image). So with `student.distill.views` the
teacher needs one pass over the images for each view, however long the student trains; further students of the same
teacher, with another method, budget or schedule, need none.

Outputs are computed in the order of the manifest and in batches of one size, since the other images of a batch may
change the last digits of an output.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from pipeline.data.loader import TrainBatch
from pipeline.files import write_atomically
from pipeline.progress import track

log = logging.getLogger(__name__)

GIB = 2**30
MEAN_ROWS = 1024
"""Images whose outputs are averaged at a time."""


class TeacherCache:
    """The outputs of one teacher; one file for each view holds those of all images, as float32.

    Args:
        folder: For this teacher, these images and these settings only.
        images: Indices in the manifest of the images.
        batches: Returns batches of all of them in one view: indices in the manifest (n,) and images (n, 3, H, W) uint8.
        compute: Returns the outputs (n, values) of such images, by name.
        average: Return, for each view of an image, the mean of the outputs for all of its views.
    """

    def __init__(
        self,
        folder: Path,
        images: npt.NDArray[np.int64],
        batches: Callable[[int], Iterable[tuple[npt.NDArray[np.int64], Tensor]]],
        compute: Callable[[Tensor], Mapping[str, Tensor]],
        average: bool = False,
    ) -> None:
        self._average = average
        self._folder, self._images, self._batches, self._compute = folder, np.sort(images), batches, compute
        _, first = next(iter(batches(0)))
        self._steps = -(-len(images) // len(first))
        self._sizes = {name: output.shape[1] for name, output in compute(first[:2]).items()}
        self._arrays: dict[int, npt.NDArray[np.float32]] = {}

    def fill(self, views: int) -> None:
        """Compute the views that are not stored yet, and open all of them.

        Another training that needs the same outputs waits, and then reads them.

        Raises:
            OSError: If the disk has no room for them.
        """
        with _held(self._folder):
            mean = self._folder / f"mean-{views:03d}.npy"
            averaging = self._average and not mean.is_file()
            missing = [view for view in range(views) if not self._path(view).is_file()]
            self._folder.mkdir(parents=True, exist_ok=True)
            needed = (len(missing) + averaging) * len(self._images) * 4 * sum(self._sizes.values())
            if needed > (free := shutil.disk_usage(self._folder).free):
                raise OSError(
                    f"the outputs of the teacher take {needed / GIB:.1f} GiB, and the disk of {self._folder} has "
                    f"{free / GIB:.1f} GiB; free some, or lower `student.distill.views`"
                )
            for view in missing:
                label = f"outputs of the teacher, view {view + 1} of {views}"
                write_atomically(self._path(view), partial(self._write, view, label))
            os.utime(self._folder)  # most recently used, so deleted last
            self._arrays = {view: self._read(self._path(view)) for view in range(views)}
            if averaging:
                write_atomically(mean, self._write_mean)
            if self._average:
                self._arrays = dict.fromkeys(range(views), self._read(mean))

    def __call__(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return the stored outputs for the images of a batch, by name, on the device of its images."""
        outputs = np.empty((len(batch.indices), sum(self._sizes.values())), np.float32)
        rows = np.searchsorted(self._images, batch.indices.numpy())
        for position, (view, row) in enumerate(zip(batch.views.tolist(), rows, strict=True)):
            outputs[position] = self._arrays[view][row]
        parts = torch.split(torch.from_numpy(outputs).to(batch.images.device), list(self._sizes.values()), dim=1)
        return dict(zip(self._sizes, parts, strict=True))

    def _path(self, view: int) -> Path:
        return self._folder / f"view-{view:03d}.npy"

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self._images), sum(self._sizes.values())

    def _read(self, path: Path) -> npt.NDArray[np.float32]:
        array: npt.NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.shape != self._shape:
            raise ValueError(f"{path} holds outputs {array.shape}, not {self._shape}; delete {path.parent}")
        return array

    def _write(self, view: int, label: str, path: Path) -> None:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=self._shape)
        for indices, images in track(self._batches(view), self._steps, label):
            outputs, rows = self._compute(images), np.searchsorted(self._images, indices)
            array[rows] = torch.cat([outputs[name].float() for name in self._sizes], dim=1).cpu()
        array.flush()

    def _write_mean(self, path: Path) -> None:
        views = list(self._arrays.values())
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=self._shape)
        for start in range(0, len(self._images), MEAN_ROWS):
            rows = slice(start, start + MEAN_ROWS)
            array[rows] = sum(view[rows] for view in views) / len(views)
        array.flush()


@contextmanager
def _held(cache: Path) -> Iterator[None]:
    """Hold the lock of a cache, and log it if another training holds it."""
    lock = _lock(cache)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("the stored outputs of the teacher are in use by another training; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def delete_outputs(folder: Path, limit: float) -> None:
    """Delete the least recently used outputs until those that are left take at most `limit` bytes.

    Outputs that another training is computing stay, and count. One that reads them has opened their files, which exist
    until it ends.

    Args:
        folder: Holds a folder for each cache.
    """
    caches = sorted((state.st_mtime, cache) for cache in folder.glob("*/") for state in _states([cache]))
    sizes = {cache: sum(state.st_size for state in _states(cache.glob("*"))) for _, cache in caches}
    for _, cache in caches:
        if sum(sizes.values()) <= limit:
            break
        with suppress(Timeout), _lock(cache, timeout=0):
            shutil.rmtree(cache, ignore_errors=True)
            del sizes[cache]


def _states(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    """Yield the states of files, except of those that another training has renamed or deleted meanwhile."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield path.stat()


def _lock(cache: Path, timeout: float = -1) -> FileLock:
    """Return the lock of a cache; its file is beside the folder and stays, since others may be waiting for it."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(cache.with_name(f"{cache.name}.lock"), timeout)
