"""Read tables of images, as spreadsheets and pandas write them."""

import codecs
import csv
import io
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.data.layout import SPLIT_WORDS, UNASSIGNED, UNASSIGNED_TEST
from pipeline.data.manifest import UNLABELLED, Box, DataError, first_few
from pipeline.labels import clean_label

Row = dict[str, str]
"""One row of a table, by column; known columns have the names below, whatever their case in the file."""

COLUMNS = ("path", "identity", "camera", "split")
CORNER_BOX = ("x1", "y1", "x2", "y2")
SIZE_BOX = ("x", "y", "width", "height")
_ALIASES = {
    **dict.fromkeys(("xmin", "left"), "x1"),
    **dict.fromkeys(("ymin", "top"), "y1"),
    **dict.fromkeys(("xmax", "right"), "x2"),
    **dict.fromkeys(("ymax", "bottom"), "y2"),
    **{"w": "width", "h": "height"},
}
"""Names that tools give to the columns of a box, in lower case and without `_`, `-` and the prefix `bbox_` or `bb_`."""
_OTHER_BOXES = {"box", "bbox", "boundingbox", "roi", "xcenter", "xcentre", "centerx", "cx"}
DELIMITERS = ",;\t|"
BOM = "\ufeff"


@dataclass(frozen=True)
class Table:
    """The content of a table.

    Attributes:
        columns: In the order of the file; known ones have the names of this module.
        text: The whole file, with a byte order mark if it had one.
    """

    path: Path
    text: str
    columns: tuple[str, ...]
    delimiter: str
    rows: list[Row]

    @property
    def box(self) -> tuple[str, ...]:
        """Columns of the box of each row: `CORNER_BOX`, `SIZE_BOX`, or empty."""
        return next((names for names in (CORNER_BOX, SIZE_BOX) if set(names) <= set(self.columns)), ())

    @property
    def known(self) -> list[str]:
        """Columns that mean something here."""
        return [name for name in self.columns if name in COLUMNS or name in self.box]

    @property
    def ignored(self) -> list[str]:
        """Other columns, such as the index that pandas writes."""
        return [name for name in self.columns if name not in self.known]

    def empty(self) -> "Table":
        """Return a table with the same columns and no rows."""
        header = io.StringIO(newline="")
        csv.writer(header, delimiter=self.delimiter, lineterminator="\n").writerow(self.columns)
        return replace(self, text=header.getvalue(), rows=[])

    def with_rows(self, rows: Iterable[Row]) -> str:
        """Return the text of the table with further rows, which get its columns and delimiter."""
        added = io.StringIO(newline="")
        writer = csv.writer(added, delimiter=self.delimiter, lineterminator="\n")
        writer.writerows([row.get(column, "") for column in self.columns] for row in rows)
        return self.text + ("" if self.text.endswith("\n") else "\n") + added.getvalue()


def read_table(path: Path) -> Table:
    """Read a table with the columns path, identity and, if known, camera, split and a box in pixels.

    The delimiter is a comma, a semicolon, a tab or a vertical bar. Column names may have any case; further columns are
    kept in the rows. Splits are those of `SPLIT_WORDS`.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If columns are missing or doubled, or a row has too few or too many fields, or an unknown split.
    """
    whole = _text(path)
    text = re.sub(r"\A(sep=.)?[\r\n]+", "", whole.removeprefix(BOM))  # a line for Excel, empty lines
    columns, delimiter = _header(path, text)
    table = Table(path, whole, columns, delimiter, [])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    next(reader)
    for fields in reader:
        if not any(field.strip() for field in fields):  # spreadsheets leave rows of empty fields behind
            continue
        where = f"{path}, line {reader.line_num}"
        if len(fields) != len(columns):
            raise DataError(f"{where}: expected {len(columns)} fields, got {len(fields)}")
        row = dict(zip(columns, fields, strict=True))
        if not (row["path"].strip() and (clean_label(row["identity"]) or split_of(row) == UNLABELLED)):
            raise DataError(f"{where}: path or identity is empty")
        if (split := clean_label(row.get("split", ""))) and split.lower() not in SPLIT_WORDS:
            words = "train, validation, test, query, gallery or unlabelled"
            raise DataError(f"{where}: split must be {words}, got {split!r}")
        table.rows.append(row)
    check_splits(path, map(split_of, table.rows))
    return table


def split_of(row: Row) -> str:
    """Return the split of a row, `UNASSIGNED` if it has none."""
    return SPLIT_WORDS.get(clean_label(row.get("split", "")).lower(), UNASSIGNED)


def boxes_of(table: Table) -> list[Box | None]:
    """Return the box of each row in whole pixels; None if the row has no box.

    Raises:
        DataError: If one is incomplete or not numbers, or all are fractions of the images' sizes.
    """
    sides = [_sides(table, row) for row in table.rows]
    boxes = [box for box in sides if box]
    small = [max(box) for box in boxes if max(box) <= 1.5]
    if 2 * len(small) > len(boxes):
        largest = max(small)
        raise DataError(f"{table.path}: no side of most boxes exceeds {largest:g}; boxes are in pixels, not fractions")
    return [None if box is None else _corners(table, box) for box in sides]


def _sides(table: Table, row: Row) -> list[float] | None:
    values = [row[name].strip() for name in table.box]
    if not any(values):
        return None
    try:
        sides = [float(value.replace(",", ".")) for value in values]
    except ValueError:
        sides = [math.nan]
    if not all(map(math.isfinite, sides)):
        box = ", ".join(f"{name} {value!r}" for name, value in zip(table.box, values, strict=True))
        raise DataError(f"{table.path}: the box of {row['path']} must be four numbers of pixels, got {box}")
    return sides


def _corners(table: Table, sides: Sequence[float]) -> Box:
    a, b, c, d = map(round, sides)
    return (a, b, c, d) if table.box == CORNER_BOX else (a, b, a + c, b + d)


def path_of(root: Path, written: str) -> str:
    """Return the path of a file below `root`, relative to it, for a path as it stands in a table.

    Backslashes of Windows, absolute paths below `root`, and the other Unicode normal form of a name are understood. If
    no such file exists, the path is returned as it stands in the table.
    """
    plain = written.strip()
    for candidate in (written, plain, plain.replace("\\", "/")):
        for form in (candidate, unicodedata.normalize("NFC", candidate), unicodedata.normalize("NFD", candidate)):
            path = os.path.normpath(form)
            if os.path.isabs(path):
                absolute = Path(path)
                base = next((base for base in (root.absolute(), root.resolve()) if absolute.is_relative_to(base)), None)
                path = str(absolute.relative_to(base)) if base else path
            if os.path.exists(root / path):
                return path
    return written


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; `data.custom.table` must name the table of source csv") from error
    if content.startswith(b"PK"):
        raise DataError(f"{path} is a spreadsheet, not CSV; save it as `CSV UTF-8`")
    try:
        if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return BOM + content.decode("utf-16")
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text, perhaps Windows' cp1252; save it as `CSV UTF-8`, or convert it with "
            "`iconv -f cp1252 -t utf-8`"
        ) from error


def _header(path: Path, text: str) -> tuple[tuple[str, ...], str]:
    """Return column names and delimiter: the one that separates `path` from `identity`."""
    for delimiter in DELIMITERS:
        fields = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        columns = tuple(_column(field) for field in fields)
        if {"path", "identity"} <= set(columns):
            return _checked(path, fields, columns), delimiter
    header = next(csv.reader(io.StringIO(text, newline="")), [])
    raise DataError(
        f"{path}: the first line must name the columns path, identity and, if known, camera, split and x, y, width, "
        f"height; got {first_few(header, 8) or 'an empty file'}"
    )


def _column(name: str) -> str:
    """Return the known name that a column's name stands for, else the name itself."""
    plain = clean_label(name).lower()
    if plain in COLUMNS:
        return plain
    side = _simplified(plain)
    side = _ALIASES.get(side, side)
    return side if side in {*CORNER_BOX, *SIZE_BOX} else name.strip()


def _simplified(name: str) -> str:
    return re.sub(r"[\s_-]", "", re.sub(r"^(bbox|bb|box)[\s_-]", "", name))


def _checked(path: Path, fields: Sequence[str], columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns, those of half a box under their own names.

    Raises:
        DataError: If a known column occurs twice, or there is a box of another form.
    """
    present = set(columns)
    if {"x1", "y1", "width", "height"} <= present and not {"x2", "y2", "x", "y"} & present:  # left, top, width, height
        return _checked(path, fields, tuple({"x1": "x", "y1": "y"}.get(name, name) for name in columns))
    box = next((names for names in (CORNER_BOX, SIZE_BOX) if set(names) <= present), ())
    if twice := [name for name in (*COLUMNS, *box) if columns.count(name) > 1]:
        raise DataError(f"{path} has two columns {twice[0]}; delete or rename one")
    sides = [field for field, name in zip(fields, columns, strict=True) if name in {*CORNER_BOX, *SIZE_BOX}]
    others = [field for field in fields if _simplified(field.strip().lower()) in _OTHER_BOXES]
    half = len(present & {*CORNER_BOX}) > 1 or len(present & {*SIZE_BOX}) > 2
    if not box and (others or half):
        raise DataError(
            f"{path} has the columns {', '.join(others or sides)}: a box is x, y, width, height or x1, y1, x2, y2, in "
            "pixels; rename or delete them"
        )
    known = {*COLUMNS, *box}
    return tuple(name if name in known else field.strip() for field, name in zip(fields, columns, strict=True))


def check_splits(path: Path, splits: Iterable[str]) -> None:
    """Check that all labelled images have a split or none has, and that `test` does not occur beside `gallery`.

    Raises:
        DataError: Naming the table.
    """
    present = set(splits) - {UNLABELLED}
    if UNASSIGNED in present and len(present) > 1:
        raise DataError(f"{path}: some images have a split and others have none; give all one, or none")
    if {UNASSIGNED_TEST, "gallery"} <= present:
        raise DataError(f"{path}: splits test and gallery are both given; call the images query and gallery, or test")
