"""Sentences for the errors in params.yaml, with key, line and remedy."""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.config import Params

LIMITS = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
    "multiple_of": ("must be a multiple of", "multiple_of"),
    "too_short": ("must have at least", "min_length"),
    "too_long": ("must have at most", "max_length"),
    "literal_error": ("must be", "expected"),
}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text", "list": "a list"}


def problems_of(detail: Mapping[str, Any], root: Node) -> Iterator[str]:
    """Format one of pydantic's errors as sentences."""
    location, error, value = detail["loc"], detail["type"], detail["input"]
    context = detail.get("ctx", {})
    name = f"`{dotted(location)}`"
    line = line_of(root, location)
    where = f" (line {line})" if line else ""
    if error == "missing":
        yield f"{name} is missing; `smaller-student preset --upgrade` adds it"
    elif error == "extra_forbidden":
        nearest = _nearest(dotted(location))
        yield f"{name} is unknown{f'; nearest: `{nearest}`' if nearest else ''}{where}"
    elif error == "value_error":  # raised by a validator in pipeline.config, whose message names the keys
        for part in str(context["error"]).split("; "):
            yield f"{name}: {part}{where}" if location else part
    elif error in LIMITS:
        words, key = LIMITS[error]
        limit = context[key]
        if isinstance(limit, float) and limit.is_integer():
            limit = int(limit)
        unit = "" if not key.endswith("length") else " entry" if limit == 1 else " entries"
        yield f"{name} {words} {limit}{unit}, got {format_value(value)}{where}"
    elif error == "finite_number":
        yield f"{name} must be finite, got {format_value(value)}{where}"
    elif error == "string_too_short":
        yield f"{name} must not be empty{where}"
    elif error in ("model_type", "dict_type"):
        yield f"{name} must be a section with keys of its own, got {format_value(value)}{where}"
    elif (kind := error.partition("_")[0]) in KINDS:
        yield f"{name} must be {KINDS[kind]}, got {format_value(value)}{where}"
    else:
        yield f"{name}: {detail['msg']}{where}"


def dotted(location: Sequence[str | int]) -> str:
    """Format a location as a dotted name: `("data", "image_size", 0)` becomes `data.image_size[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def format_value(value: object) -> str:
    """Format a value as params.yaml has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    return f"the {kind_of(value)} {value!r:.40}" if isinstance(value, str | dict | list) else str(value)


def kind_of(value: object) -> str:
    """Name the kind of a value."""
    names: dict[type, str] = {str: "text", dict: "section", list: "list"}
    return names.get(type(value), type(value).__name__)


def keys(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all sections and keys of the schema."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if inspect.isclass(section := field.annotation) and issubclass(section, BaseModel):
            yield from keys(section, f"{prefix}{name}.")


def _nearest(name: str) -> str | None:
    """Return the known key most similar to `name`: in the same section, else in any section by its last part."""
    known = list(keys())
    section, _, last = name.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    for candidates, cutoff in ((siblings, 0.7), (known, 0.8)):
        if matches := difflib.get_close_matches(last, [key.rpartition(".")[2] for key in candidates], 1, cutoff):
            same = [key for key in candidates if key.rpartition(".")[2] == matches[0]]
            return difflib.get_close_matches(name, same, 1, 0)[0]
    return None


def line_of(root: Node, location: Sequence[str | int]) -> int | None:
    """Return the line of the key or list entry at `location`, counted from 1."""
    node, line = root, None
    for part in location:
        if isinstance(node, MappingNode):
            if part not in entries(node):
                return line
            key, node = entries(node)[str(part)]
            line = key.start_mark.line + 1
        elif isinstance(node, SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def alternatives(names: Iterable[str]) -> str:
    """Format names as `'a', 'b' or 'c'`."""
    *others, last = (f"'{name}'" for name in names)
    return f"{', '.join(others)} or {last}"


def entries(node: Node | None) -> dict[str, tuple[ScalarNode, Node]]:
    """Return key and value node of each entry of a section by name; empty if the node is not a section."""
    pairs = node.value if isinstance(node, MappingNode) else []
    return {key.value: (key, value) for key, value in pairs if isinstance(key, ScalarNode)}
