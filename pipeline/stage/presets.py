"""Presets: presets/vehicles.yaml has every key; the other presets hold only the values that differ from it.

`upgrade` adds keys of a newer version to a user's params.yaml, with the values and comments of presets/vehicles.yaml.
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
from pipeline.stage.params_file import Document, ParamsError, check, parse, read
from pipeline.stage.params_problems import entries

COMPLETE = "vehicles"
"""The preset that has every key."""


class UnknownPresetError(ValueError):
    """There is no preset with this name."""

    exit_code = 2


def names(root: Path) -> list[str]:
    """Return the names of all presets of a checkout, sorted."""
    return sorted(path.stem for path in (root / "presets").glob("*.yaml"))


def load_preset(root: Path, name: str) -> Params:
    """Load and validate a preset.

    Raises:
        UnknownPresetError: If there is no such preset.
        ParamsError: If it has unknown keys or invalid values.
    """
    changes = _read_preset(root, name)
    return check(changes._replace(content=_merge(_read_preset(root, COMPLETE).content, changes.content)))


def preset_text(root: Path, name: str) -> str:
    """Return a preset as a complete params.yaml: its own head comment and values, the other comments of `COMPLETE`.

    Raises:
        UnknownPresetError: If there is no such preset.
        ParamsError: If it has unknown keys or invalid values.
    """
    load_preset(root, name)
    complete, changes = _read_preset(root, COMPLETE).text, _read_preset(root, name).text
    if name == COMPLETE:
        return complete
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000  # do not wrap long values
    body = io.StringIO()
    yaml.dump(_merge(yaml.load(complete.removeprefix(_head(complete))), yaml.load(changes)), body)
    return f"{_head(changes)}\n{body.getvalue()}"


def is_preset(root: Path, path: Path) -> bool:
    """Return whether a params.yaml has the values of any preset; comments do not matter."""
    try:
        content = read(path).content
    except ParamsError:
        return False
    complete = _read_preset(root, COMPLETE).content
    return any(content == _merge(complete, _read_preset(root, name).content) for name in names(root))


def _read_preset(root: Path, name: str) -> Document:
    known = names(root)
    if name not in known:
        matches = difflib.get_close_matches(name, known, n=1)
        hint = f"; nearest: `{matches[0]}`" if matches else ""
        available = ", ".join(known) or f"none in {root / 'presets'}"
        raise UnknownPresetError(f"preset `{name}` is unknown{hint}; available: {available}")
    return read(root / "presets" / f"{name}.yaml")


def _merge(base: MutableMapping[str, Any], changes: Mapping[str, Any]) -> MutableMapping[str, Any]:
    """Return `base` with the values of `changes`, section by section; comments and order are those of `base`."""
    merged = deepcopy(base)
    for key, value in changes.items():
        sections = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if sections else value
    return merged


def _head(text: str) -> str:
    """Return the comment at the beginning of a file."""
    return "".join(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))


# --- upgrade ----------------------------------------------------------------------------------------------------------


def upgrade(root: Path, path: Path) -> list[str]:
    """Add missing keys to a params.yaml with the values of the complete preset, and rename keys with old names.

    Lines are inserted into the text; every other byte stays.

    Returns:
        The changes, one phrase for each key; without changes the file is not written.

    Raises:
        ParamsError: If the file cannot be read, or a section has no lines to insert keys into, such as `{a: 1}`.
    """
    current, complete = read(path), _read_preset(root, COMPLETE)
    added = list(_missing(current.content, complete.content))
    renamed = [f"renamed `{old}` to `{new}`" for old, new, _ in current.renamed]
    if not added and not renamed:
        return []
    newline = "\r\n" if "\r\n" in current.text else "\n"
    edits = [(key.start_mark.index, key.end_mark.index, new.rpartition(".")[2]) for _, new, key in current.renamed]
    if not current.text.endswith("\n"):
        edits.append((len(current.text), len(current.text), newline))
    for index, lines in _insertions(current.text, current.root, complete.text, complete.root):
        edits.append((index, index, lines.replace("\n", newline)))
    text = _edited(current.text, edits)
    try:
        done = parse(path, text).content == _merge(complete.content, current.content)
    except ParamsError:
        done = False
    if not done:  # sections in braces, merge keys
        raise ParamsError(path, [f"add `{key}` by hand; its section does not have one key per line" for key in added])
    write_text(path, text)
    return [*renamed, *(f"added `{key}`" for key in added)]


def _missing(current: Mapping[str, Any], complete: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `name: value` of each key that `current` lacks; `load` reports values of a wrong type."""
    for name, value in complete.items():
        if isinstance(value, Mapping) and value:  # an empty mapping is a value
            if isinstance(section := current.get(name, {}), Mapping):
                yield from _missing(section, value, f"{prefix}{name}.")
        elif name not in current:
            yield f"{prefix}{name}: {json.dumps(value)}"


def _insertions(
    text: str, section: MappingNode, complete_text: str, complete: MappingNode
) -> Iterator[tuple[int, str]]:
    """Yield an index in `text` and the lines of `complete_text` to insert there, for each key missing in a section."""
    if section.flow_style:
        return
    current = entries(section)
    first = section.value[0][0].start_mark
    index = _start(text, first.index, first.column)
    for name, (key, value) in entries(complete).items():
        if name in current:
            old_key, old_value = current[name]
            if isinstance(old_value, MappingNode) and isinstance(value, MappingNode) and _follows(old_key, old_value):
                yield from _insertions(text, old_value, complete_text, value)
            index = _end(text, old_key, old_value)
        else:
            start = key.start_mark.index - key.start_mark.column
            lines = complete_text[start : _end(complete_text, key, value)]
            blank = "\n" if isinstance(value, MappingNode) and first.column == 0 else ""
            yield index, blank + textwrap.indent(textwrap.dedent(lines), " " * first.column)


def _start(text: str, index: int, column: int) -> int:
    """Return the index of the line of a key, or of the comment lines directly above it."""
    above = text[: text.rfind("\n", 0, index) + 1]
    comments = re.search(rf"(?:^ {{0,{column}}}#.*\n)*\Z", above, re.MULTILINE)
    return comments.start() if comments else len(above)


def _end(text: str, key: ScalarNode, value: Node) -> int:
    """Return the index after the lines of an entry and after comments below it with deeper indentation."""
    column = key.start_mark.column
    while isinstance(value, CollectionNode) and not value.flow_style and _follows(key, value):
        key, value = value.value[-1] if isinstance(value, MappingNode) else (key, value.value[-1])
    index = value.end_mark.index if _follows(key, value) else key.end_mark.index
    if isinstance(value, ScalarNode) and value.style in ("|", ">"):
        index -= 1  # a block scalar ends at the start of the next line
    line = text.find("\n", index) + 1 or len(text)
    comments = re.compile(rf"(?: {{{column + 1},}}#.*(?:\n|\Z))*").match(text, line)
    return comments.end() if comments else line


def _follows(key: ScalarNode, value: Node) -> bool:
    """Return whether a value stands after its key; an alias has the position of its anchor, an empty value has none."""
    return bool(key.start_mark.index < value.start_mark.index < value.end_mark.index)


def _edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """Replace parts of a text; each edit is (start, end, new content)."""
    parts, at = [], 0
    for start, end, new in sorted(edits, key=lambda edit: edit[:2]):
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])
