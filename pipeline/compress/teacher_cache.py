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
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.loader import TrainBatch
from pipeline.files import write_atomically

log = logging.getLogger(__name__)

GIB = 2**30
MEAN_ROWS = 1024
"""Images whose outputs are averaged at a time."""


class TeacherCache:
    """The outputs of one teacher; one file for each view holds those of all images, as float32.

    Args:
        folder: For this teacher, these images and these settings only.
        images: Images of the manifest.
        batches: Returns batches of all images in one view: indices in the manifest (n,) and images (n, 3, H, W) uint8.
        compute: Returns the outputs (n, values) of such images, by name.
        average: Return, for each view of an image, the mean of the outputs for all of its views.
    """

    def __init__(
        self,
        folder: Path,
        images: int,
        batches: Callable[[int], Iterable[tuple[npt.NDArray[np.int64], Tensor]]],
        compute: Callable[[Tensor], Mapping[str, Tensor]],
        average: bool = False,
    ) -> None:
        self._average = average
        self._folder, self._images, self._batches, self._compute = folder, images, batches, compute
        _, first_images = next(iter(batches(0)))
        first = compute(first_images[:2])
        self._sizes = {name: output.shape[1] for name, output in first.items()}
        self._arrays: dict[int, npt.NDArray[np.float32]] = {}

    def fill(self, views: int) -> None:
        """Compute the views that are not stored yet, and open all of them.

        Raises:
            OSError: If the disk has no room for them.
        """
        missing = [view for view in range(views) if not self._path(view).is_file()]
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = (len(missing) + self._average) * self._images * 4 * sum(self._sizes.values())
        if needed > (free := shutil.disk_usage(self._folder).free):
            raise OSError(
                f"the outputs of the teacher take {needed / GIB:.1f} GiB, and the disk has {free / GIB:.1f} GiB; lower "
                "`student.distill.views`, or set it to 0"
            )
        for view in missing:
            log.info("computing the outputs of the teacher, view %d of %d", view + 1, views)
            write_atomically(self._path(view), partial(self._write, view))
        os.utime(self._folder)  # most recently used, so deleted last
        self._arrays = {view: np.load(self._path(view), mmap_mode="r", allow_pickle=False) for view in range(views)}
        if self._average:
            mean = self._folder / f"mean-{views:03d}.npy"
            if not mean.is_file():
                write_atomically(mean, self._write_mean)
            self._arrays = dict.fromkeys(range(views), np.load(mean, mmap_mode="r", allow_pickle=False))

    def __call__(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return the stored outputs for the images of a batch, by name, on the device of its images."""
        rows = np.empty((len(batch.indices), sum(self._sizes.values())), np.float32)
        for position, (view, index) in enumerate(zip(batch.views.tolist(), batch.indices.tolist(), strict=True)):
            rows[position] = self._arrays[view][index]
        parts = torch.split(torch.from_numpy(rows).to(batch.images.device), list(self._sizes.values()), dim=1)
        return dict(zip(self._sizes, parts, strict=True))

    def _path(self, view: int) -> Path:
        return self._folder / f"view-{view:03d}.npy"

    def _write(self, view: int, path: Path) -> None:
        shape = (self._images, sum(self._sizes.values()))
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for indices, images in self._batches(view):
            outputs = self._compute(images)
            array[indices] = torch.cat([outputs[name].float() for name in self._sizes], dim=1).cpu()
        array.flush()

    def _write_mean(self, path: Path) -> None:
        views = list(self._arrays.values())
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=views[0].shape)
        for start in range(0, self._images, MEAN_ROWS):
            rows = slice(start, start + MEAN_ROWS)
            array[rows] = sum(view[rows] for view in views) / len(views)
        array.flush()


def delete_outputs(folder: Path, limit: float) -> None:
    """Delete the least recently used outputs until those that are left take at most `limit` bytes.

    Args:
        folder: Holds a folder for each teacher, which holds one for each cache.
    """
    caches = sorted(folder.glob("*/*/"), key=lambda path: path.stat().st_mtime)
    sizes = {cache: sum(path.stat().st_size for path in cache.iterdir()) for cache in caches}
    for cache in caches:
        if sum(sizes.values()) <= limit:
            break
        shutil.rmtree(cache, ignore_errors=True)
        with suppress(OSError):  # others of the same teacher are left
            cache.parent.rmdir()
        del sizes[cache]
