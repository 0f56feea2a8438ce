"""Files in folders: which are images, and which to skip with what reason."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

_LEFT_BEHIND = {
    *(".ds_store", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "#recycle", "lost+found", ".trashes", ".spotlight-v100", ".fseventsd"),
}
KEEPS_FOLDER = ".gitkeep"
"""File that keeps an empty folder in Git; it is no image and no warning."""

LEFT_BEHIND = "skipped: left behind by an operating system"
HIDDEN = "skipped: hidden"
NOT_UTF8 = "skipped: the name is not UTF-8 (rename it, for example with convmv)"
DANGLING = "skipped: a link to nothing"
LINK_LOOP = "skipped: a link that leads to itself"
LINK_TO_FOLDER = "skipped: a link to a folder (DVC does not track what is in it; link or copy its files)"
SPECIAL = "skipped: not a regular file"
NO_IMAGE = "skipped: the suffix is not one of an image"
HEIC = "skipped: HEIC is not supported (convert it to JPEG)"


def is_left_behind(name: str) -> bool:
    """Return whether an operating system or a file server creates files or folders of this name by itself."""
    return name.startswith(("._", ".Trash-")) or name.lower() in _LEFT_BEHIND


def walk(root: Path, inside: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path relative to `root`, reason to skip it or "") of all files below `root / inside`, sorted.

    Links to regular files are followed: DVC's caches of type symlink consist of them.
    """
    with os.scandir(root / inside) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        path = f"{inside}/{entry.name}" if inside else entry.name
        if path != (escaped := path.encode(errors="backslashreplace").decode()):
            yield escaped, NOT_UTF8
        elif entry.name == KEEPS_FOLDER:
            continue
        elif is_left_behind(entry.name):
            yield path, LEFT_BEHIND
        elif entry.name.startswith("."):
            yield path, HIDDEN
        elif entry.is_dir(follow_symlinks=False):
            yield from walk(root, path)
        else:
            yield path, _reason_to_skip(entry)


def _reason_to_skip(entry: "os.DirEntry[str]") -> str:
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return LINK_LOOP if error.errno == errno.ELOOP else DANGLING
    if stat.S_ISDIR(mode):
        return LINK_TO_FOLDER
    if not stat.S_ISREG(mode):
        return SPECIAL
    suffix = Path(entry.name).suffix.lower()
    if suffix in (".heic", ".heif"):
        return HEIC
    return "" if not suffix or suffix in Image.registered_extensions() else NO_IMAGE


def files_left_behind(root: Path) -> Iterator[str]:
    """Yield the paths of what `is_left_behind` below `root`, relative to it; folders are not entered."""
    for folder, subfolders, files in os.walk(root):
        found = [name for name in (*subfolders, *files) if is_left_behind(name)]
        subfolders[:] = [name for name in subfolders if name not in found]
        for name in sorted(found):
            yield (Path(folder) / name).relative_to(root).as_posix()
