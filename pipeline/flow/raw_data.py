"""Check `data.root` for what stops DVC before stage `prepare` can report it, and save new images in DVC."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

from pipeline.config import Params
from pipeline.data.folders import is_left_behind
from pipeline.data.manifest import DataError
from pipeline.files import Files, write_text
from pipeline.flow.dvc_cli import StageError, changed, commit


def check_root(files: Files, params: Params) -> None:
    """Check that `data.root` is a folder that DVC can read.

    DVC reports a missing folder without its key, and stops at the first file name that is not UTF-8 without the name.

    Raises:
        DataError: If it is missing or cannot be read; reason and remedy are separated by a semicolon.
    """
    name = params.data.root
    root = files.root / name
    if not root.is_dir():
        if root.exists():
            raise DataError(f"`data.root` {name} is a file; set it to the folder of the images")
        if file := tracking_file(files, params):
            raise DataError(f"`data.root` {name} is in DVC, but not in this checkout; run `dvc pull {quote(file)}`")
        raise DataError(f"`data.root` {name} does not exist in {files.root}; create the folder, or correct the key")
    in_checkout = root.resolve().is_relative_to(files.root.resolve())
    if names := undecodable(root, in_checkout):
        raise DataError(
            f"`data.root` {name} has file names that are not UTF-8, which DVC cannot store ({len(names)}, "
            f"such as {names[0]}); rename them, such as by `convmv -r -f cp1252 -t utf8 --notest {quote(name)}`"
        )


@contextmanager
def saved_in_dvc(files: Files, params: Params) -> Iterator[Callable[[], None]]:
    """Save what the block adds to `data.root` in DVC, if a .dvc file tracks it.

    Only a folder that is as the file lists it is saved; otherwise the list that Git brought in would be lost. A copy of
    the file marks a block that was interrupted, whose additions the next one saves. The block gets a function that
    checks the folder after a command that may have changed folder or file.

    Raises:
        DataError: If the folder is not as the .dvc file lists it, even after the command.
        StageError: If `dvc status` or `dvc commit` fails.
    """
    if not (file := tracking_file(files, params)):
        yield lambda: None
        return
    mark = files.tracking / "refreshing"

    def marked() -> str | None:
        return mark.read_text(encoding="utf-8") if mark.is_file() else None

    def listed() -> str:
        return (files.root / file).read_text(encoding="utf-8")

    def check() -> None:
        check_root(files, params)
        if marked() == listed():
            return
        if file in changed(file):
            raise DataError(
                f"`data.root` {params.data.root} is not as {file} lists it; get those images by "
                f"`dvc pull {quote(file)}`, or keep the present ones by `dvc commit {quote(file)}`"
            )
        write_text(mark, listed())

    with suppress(DataError):  # the command may mend it
        check()
    try:
        yield check
        if file in changed(file):
            commit(file)
    except Exception:
        with suppress(StageError):
            if file not in changed(file):  # nothing was added
                mark.unlink(missing_ok=True)
        raise
    mark.unlink(missing_ok=True)


def undecodable(root: Path, in_checkout: bool) -> list[str]:
    r"""Return the paths below a folder that are not UTF-8, with such bytes written as in `caf\xe9.png`; sorted.

    Args:
        in_checkout: Whether .dvcignore keeps DVC out of folders that systems leave behind, such as lost+found.

    Raises:
        DataError: If a folder of images cannot be read, which DVC takes for an empty one.
    """

    def fail(error: OSError) -> None:
        if not any(_holds_no_image(part) for part in Path(error.filename).relative_to(root).parts):
            raise DataError(f"{error.filename} cannot be read ({error.strerror}); make it readable for this user")

    found = []
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not (in_checkout and is_left_behind(name))]
        inside = os.path.relpath(folder, root)
        for name in names:
            path = os.path.normpath(os.path.join(inside, name))
            if not is_utf8(path):
                found.append(os.fsencode(path).decode(errors="backslashreplace"))
    return sorted(found)


def _holds_no_image(folder: str) -> bool:
    return folder.startswith(".") or is_left_behind(folder)


def is_utf8(path: str) -> bool:
    """Return whether a path that the system reported can be written as UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def tracking_file(files: Files, params: Params) -> str | None:
    """Return the .dvc file by which `dvc add` tracks `data.root` or a folder around it, relative to the checkout."""
    if Path(params.data.root).is_absolute():
        return None
    for folder in (Path(params.data.root), *Path(params.data.root).parents):
        file = folder.with_name(f"{folder.name}.dvc") if folder.name else None
        if file is not None and (files.root / file).is_file():
            return file.as_posix()
    return None
