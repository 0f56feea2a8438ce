"""Presets: one complete, commented params.yaml, and files that hold only what differs from it.

presets/vehicles.yaml has every key; the other presets change some of its values. A params.yaml of one's own gets the
keys of a newer version from it, too.
"""

import difflib
import io
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, MutableMapping
from copy import deepcopy
from itertools import takewhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

from pipeline.config import Params
from pipeline.files import write_text
from pipeline.stage.params_file import Document, ParamsError, check, entries, parse, read

COMPLETE = "vehicles"
"""The preset that has every key."""


class UnknownPresetError(ValueError):
    """There is no preset of that name."""

    exit_code = 2


def names(root: Path) -> list[str]:
    """Return the names of all presets of a checkout."""
    return sorted(path.stem for path in (root / "presets").glob("*.yaml"))


def load_preset(root: Path, name: str) -> Params:
    """Read and validate a preset.

    Raises:
        UnknownPresetError: If there is none of that name.
        ParamsError: If it has unknown keys or impossible values.
    """
    changes = _read_preset(root, name)
    return check(changes._replace(content=_merge(_read_preset(root, COMPLETE).content, changes.content)))


def preset_text(root: Path, name: str) -> str:
    """Return a preset as a complete params.yaml: its head comment and values, all other comments of the complete one.

    Raises:
        UnknownPresetError: If there is none of that name.
        ParamsError: If it has unknown keys or impossible values.
    """
    load_preset(root, name)
    complete, changes = _read_preset(root, COMPLETE).text, _read_preset(root, name).text
    if name == COMPLETE:
        return complete
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000  # long values are not folded
    body = io.StringIO()
    yaml.dump(_merge(yaml.load(complete.removeprefix(_head(complete))), yaml.load(changes)), body)
    return f"{_head(changes)}\n{body.getvalue()}"


def is_preset(root: Path, path: Path) -> bool:
    """Tell whether a params.yaml has the values of some preset, whatever its comments are."""
    try:
        content = read(path).content
    except ParamsError:
        return False
    complete = _read_preset(root, COMPLETE).content
    return any(content == _merge(complete, _read_preset(root, name).content) for name in names(root))


def _read_preset(root: Path, name: str) -> Document:
    known = names(root)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; nearest: `{near[0]}`" if near else ""
        there = ", ".join(known) or f"none in {root / 'presets'}"
        raise UnknownPresetError(f"preset `{name}` is unknown{hint}; there are: {there}")
    return read(root / "presets" / f"{name}.yaml")


def _merge(base: MutableMapping[str, Any], changes: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """Return `base` with the values of `changes`, section by section; comments and order are those of `base`."""
    merged = deepcopy(base)
    for key, value in changes.items():
        sections = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if sections else value
    return merged


def _head(text: str) -> str:
    """The comment that a file begins with."""
    return "".join(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))


# --- upgrade ----------------------------------------------------------------------------------------------------------


def upgrade(root: Path, path: Path) -> list[str]:
    """Add the keys that a params.yaml lacks, with the complete preset's values, and rename those that have a new name.

    Lines are inserted into the text; everything else in it stays as it is, byte by byte.

    Returns:
        What was done, a phrase for each key; the file is not written if there was nothing to do.

    Raises:
        ParamsError: If the file cannot be read, or a section is written in a form that has no lines to insert into.
    """
    mine, complete = read(path), _read_preset(root, COMPLETE)
    added = list(_missing(mine.content, complete.content))
    renamed = [f"renamed `{old}` to `{new}`" for old, new, _ in mine.renamed]
    if not added and not renamed:
        return []
    line_end = "\r\n" if "\r\n" in mine.text else "\n"
    edits = [(key.start_mark.index, key.end_mark.index, new.rpartition(".")[2]) for _, new, key in mine.renamed]
    if not mine.text.endswith("\n"):
        edits.append((len(mine.text), len(mine.text), line_end))
    for index, lines in _insertions(mine.text, mine.root, complete.text, complete.root):
        edits.append((index, index, lines.replace("\n", line_end)))
    text = _edited(mine.text, edits)
    try:
        done = parse(path, text).content == _merge(complete.content, mine.content)
    except ParamsError:
        done = False
    if not done:  # braces, merge keys
        raise ParamsError(path, [f"add `{key}` by hand; its section is not written one key a line" for key in added])
    write_text(path, text)
    return [*renamed, *(f"added `{key}`" for key in added)]


def _missing(mine: Mapping[str, Any], complete: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted name and value of each key that `mine` lacks; values of another type are left to `load`."""
    for name, value in complete.items():
        if isinstance(value, Mapping) and value:  # an empty one is a value
            if isinstance(section := mine.get(name, {}), Mapping):
                yield from _missing(section, value, f"{prefix}{name}.")
        elif name not in mine:
            yield f"{prefix}{name}: {json.dumps(value)}"


def _insertions(text: str, section: MappingNode, other: str, complete: MappingNode) -> Iterator[tuple[int, str]]:
    """Index in `text`, and lines of `other` to insert there, for each key that is missing in a section."""
    if section.flow_style:
        return
    mine = entries(section)
    first = section.value[0][0].start_mark
    index = _start(text, first.index, first.column)
    for name, (key, value) in entries(complete).items():
        if name in mine:
            my_key, my_value = mine[name]
            if isinstance(my_value, MappingNode) and isinstance(value, MappingNode) and _follows(my_key, my_value):
                yield from _insertions(text, my_value, other, value)
            index = _end(text, my_key, my_value)
        else:
            lines = other[key.start_mark.index - key.start_mark.column : _end(other, key, value)]
            blank = "\n" if isinstance(value, MappingNode) and first.column == 0 else ""
            yield index, blank + textwrap.indent(textwrap.dedent(lines), " " * first.column)


def _start(text: str, index: int, column: int) -> int:
    """Index of the line of a key, or of the comment lines right above it."""
    above = text[: text.rfind("\n", 0, index) + 1]
    found = re.search(rf"(?:^ {{0,{column}}}#.*\n)*\Z", above, re.MULTILINE)
    return found.start() if found else len(above)


def _end(text: str, key: ScalarNode, value: Node) -> int:
    """Index behind the lines of an entry, and behind comment lines below it that are indented more than its key."""
    column = key.start_mark.column
    while isinstance(value, CollectionNode) and not value.flow_style and _follows(key, value):
        key, value = value.value[-1] if isinstance(value, MappingNode) else (key, value.value[-1])
    index = value.end_mark.index if _follows(key, value) else key.end_mark.index
    if isinstance(value, ScalarNode) and value.style in ("|", ">"):
        index -= 1  # its end is the beginning of the next line
    line = text.find("\n", index) + 1 or len(text)
    comments = re.compile(rf"(?: {{{column + 1},}}#.*(?:\n|\Z))*").match(text, line)
    return comments.end() if comments else line


def _follows(key: ScalarNode, value: Node) -> bool:
    """Whether a value is written behind its key: an alias is where its anchor is, and nothing is nowhere."""
    return bool(key.start_mark.index < value.start_mark.index < value.end_mark.index)


def _edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """Replace parts of a text, each given by start, end and new content."""
    parts, at = [], 0
    for start, end, new in sorted(edits, key=lambda edit: edit[:2]):
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])
