"""Read params.yaml, and say everything that is wrong with it at once and in the user's words.

Imports nothing heavier than numpy: a mistyped key is refused in well under two seconds.
"""

import difflib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.compress.budget import BudgetError, cost_model, shrinking_sites
from pipeline.config import Params
from pipeline.data.sources import LAYOUTS
from pipeline.models.spec import ArchSpec
from pipeline.protocols import PROTOCOLS

REMEDY = "`smaller-student preset NAME` writes a complete one"
RENAMED: dict[str, str] = {
    "data.near": "data.near_duplicate_bits",
    "data.own": "data.custom",
    "student.settle": "student.freeze_norms_at",
    "student.settle_head": "student.freeze_head_norms_at",
    "student.distill.mirror": "student.distill.flip_average",
    "export.gates": "export.limits",
    "runtime.answers_gib": "runtime.teacher_cache_gib",
    "tracking.gate": "tracking.promotion",
    "tracking.promotion.larger": "tracking.promotion.max_size_ratio",
    "tracking.promotion.slower": "tracking.promotion.max_latency_ratio",
}
"""Old dotted name -> new dotted name in the same section, for keys that the latest version renamed.

Entries apply in order, so a key below a renamed section is listed with the section's new name. `load` reads old names
for one version; the version after that removes the entries.
"""

log = logging.getLogger(__name__)


class ParamsError(ValueError):
    """Everything that is wrong with params.yaml.

    Attributes:
        complaints: One sentence each, with the line where there is one.
    """

    exit_code = 2

    def __init__(self, path: Path, complaints: Sequence[str]) -> None:
        self.complaints = tuple(complaints)
        super().__init__("\n".join(f"{path.name}: {complaint}" for complaint in complaints))


class Renaming(NamedTuple):
    """A key that a file has under its old name.

    Attributes:
        old: Dotted name in the file.
        new: Dotted name in the schema.
        key: Where the old name stands in the text.
    """

    old: str
    new: str
    key: ScalarNode


class Document(NamedTuple):
    """A file with sections, not validated yet.

    Attributes:
        path: The file.
        text: Its content.
        root: Syntax tree of `text`, with lines and columns.
        content: Its values, under new names.
        renamed: Keys that `text` has under their old names.
    """

    path: Path
    text: str
    root: MappingNode
    content: MutableMapping[str, Any]
    renamed: tuple[Renaming, ...]


def load(path: Path) -> Params:
    """Read and validate params.yaml; warn about keys under old names.

    Raises:
        ParamsError: Listing all complaints.
    """
    document = read(path)
    for old, new, _ in document.renamed:
        log.warning("%s: `%s` is called `%s` now; `smaller-student preset --upgrade` renames it", path.name, old, new)
    return check(document)


def read(path: Path) -> Document:
    """Read a file with sections.

    Raises:
        ParamsError: If it cannot be read, is not YAML or has no sections.
    """
    return parse(path, _read(path))


def parse(path: Path, text: str) -> Document:
    """Parse the text of a file with sections.

    YAML 1.2 by ruamel.yaml, as DVC reads it: `1e-3` is a number and `no` a string.

    Raises:
        ParamsError: If it is not YAML or has no sections.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(text)
        renamed = tuple(_rename(root))
        content = None if root is None else yaml.constructor.construct_document(root)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark else ""
        raise ParamsError(path, [f"{_sentence(error)}{where}"]) from error
    except (YAMLError, RecursionError, ValueError) as error:
        raise ParamsError(path, [f"is not YAML: {str(error).splitlines()[0]}"]) from error
    if content is None:
        raise ParamsError(path, [f"is empty; {REMEDY}"])
    if not isinstance(content, dict):
        raise ParamsError(path, [f"must hold sections, got a {_kind(content)}; {REMEDY}"])
    return Document(path, text, root, content, renamed)


def check(document: Document) -> Params:
    """Validate a file's values.

    Raises:
        ParamsError: Listing all complaints.
    """
    complaints = [*_data_complaints(document), *_loss_complaints(document)]
    try:
        params = Params.model_validate(document.content)
        if not complaints:
            _refuse_unreachable(params)  # once everything else is sound
            return params
    except ValidationError as error:
        complaints += [line for detail in error.errors() for line in _complaints(detail, document.root)]
    except BudgetError as error:
        complaints.append(str(error))
    raise ParamsError(document.path, list(dict.fromkeys(complaints))) from None


def _data_complaints(document: Document) -> Iterator[str]:
    """Compare source and protocol with the registered ones."""
    data = document.content.get("data")
    if not isinstance(data, dict):
        return
    source, protocol = (data.get(name) for name in ("source", "protocol"))
    for name, value, known in (("source", source, LAYOUTS), ("protocol", protocol, PROTOCOLS)):
        if isinstance(value, str) and value and value not in known:
            where = f" (line {_line(document.root, ('data', name))})"
            yield f"`data.{name}` must be {_either(known)}, got {_shown(value)}{where}"
    possible = LAYOUTS[source].protocols if source in LAYOUTS else ()
    if possible and protocol in PROTOCOLS and protocol not in possible:
        yield f"`data.protocol` is {protocol}, but source {source} can be scored by {' or '.join(possible)} only"


def _loss_complaints(document: Document) -> Iterator[str]:
    """Compare extra losses and their settings with the registered ones."""
    section: Any = document.content
    for name in ("student", "distill", "extra_losses"):
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or not section:
        return
    from pipeline.losses.registry import extra_losses  # imports torch

    known = extra_losses()
    for name, settings in section.items():
        location = ("student", "distill", "extra_losses", name)
        if name not in known:
            where = f" (line {_line(document.root, location)})"
            yield f"`{dotted(location)}` is unknown; there are {', '.join(known)}{where}"
            continue
        try:
            known[name].settings.model_validate(settings)
        except ValidationError as error:
            for detail in error.errors():
                yield from _complaints({**detail, "loc": (*location, *detail["loc"])}, document.root)


def _either(names: Iterable[str]) -> str:
    *others, last = (f"'{name}'" for name in names)
    return f"{', '.join(others)} or {last}"


def _rename(root: Node | None) -> Iterator[Renaming]:
    """Give keys with old names their new ones in the syntax tree, unless the new one is there too."""
    for old, new in RENAMED.items():
        *sections, last = old.split(".")
        node = root
        for section in sections:
            node = entries(node).get(section, (None, None))[1]
        name = new.rpartition(".")[2]
        if last in entries(node) and name not in entries(node):
            key = entries(node)[last][0]
            key.value = name
            yield Renaming(old, new, key)


def entries(node: Node | None) -> dict[str, tuple[ScalarNode, Node]]:
    """Key and value of each entry of a section by its name; none if the node is no section."""
    pairs = node.value if isinstance(node, MappingNode) else []
    return {key.value: (key, value) for key, value in pairs if isinstance(key, ScalarNode)}


def _refuse_unreachable(params: Params) -> None:
    """Tell before anything is trained that the budget lies below the structure's floor."""
    teacher, student, (height, width) = params.teacher, params.student, params.data.image_size
    spec = ArchSpec.full(teacher.depth, teacher.width, teacher.embedding_dim, teacher.last_stride)
    if student.budgeted and student.budget.of == "latency":  # stage student measures it
        shrinking_sites(spec, student)
    else:
        cost_model(spec, student, (height, width))


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode()  # with the line ends that it has
    except FileNotFoundError as error:
        raise ParamsError(path, [f"is missing in {path.parent.resolve()}; {REMEDY}"]) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ParamsError(path, [f"is not UTF-8 (line {line}); save it as UTF-8"]) from error
    except OSError as error:
        raise ParamsError(path, [f"cannot be read: {error.strerror}"]) from error
    if text.startswith("\ufeff"):
        # DVC and this parser would differ about it, and editors hide it.
        raise ParamsError(path, ["begins with a byte order mark (line 1); save it as UTF-8 without BOM"])
    return text


def _sentence(error: MarkedYAMLError) -> str:
    problem = (error.problem or error.context or "is not YAML").strip()
    if "\\t" in problem:
        return "a tab stands where only spaces may; indent with spaces"
    return problem.splitlines()[0]


# --- complaints -------------------------------------------------------------------------------------------------------

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


def _complaints(detail: Mapping[str, Any], root: Node) -> Iterator[str]:
    """Turn one of pydantic's errors into sentences."""
    location, error, value = detail["loc"], detail["type"], detail["input"]
    context = detail.get("ctx", {})
    name = f"`{dotted(location)}`"
    line = _line(root, location)
    where = f" (line {line})" if line else ""
    if error == "missing":
        yield f"{name} is missing; `smaller-student preset --upgrade` adds it"
    elif error == "extra_forbidden":
        nearest = _nearest(dotted(location))
        yield f"{name} is unknown{f'; nearest: `{nearest}`' if nearest else ''}{where}"
    elif error == "value_error":  # one of config's own checks, which names its keys itself
        for part in str(context["error"]).split("; "):
            yield f"{name}: {part}{where}" if location else part
    elif error in LIMITS:
        words, key = LIMITS[error]
        limit = context[key]
        if isinstance(limit, float) and limit.is_integer():
            limit = int(limit)
        unit = "" if not key.endswith("length") else " entry" if limit == 1 else " entries"
        yield f"{name} {words} {limit}{unit}, got {_shown(value)}{where}"
    elif error == "finite_number":
        yield f"{name} must be finite, got {_shown(value)}{where}"
    elif error == "string_too_short":
        yield f"{name} must not be empty{where}"
    elif error in ("model_type", "dict_type"):
        yield f"{name} must be a section with keys of its own, got {_shown(value)}{where}"
    elif (kind := error.partition("_")[0]) in KINDS:
        yield f"{name} must be {KINDS[kind]}, got {_shown(value)}{where}"
    else:
        yield f"{name}: {detail['msg']}{where}"


def dotted(location: Sequence[str | int]) -> str:
    """Write `("data", "image_size", 0)` as `data.image_size[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    return f"the {_kind(value)} {value!r:.40}" if isinstance(value, str | dict | list) else str(value)


def _kind(value: object) -> str:
    names: dict[type, str] = {str: "text", dict: "section", list: "list"}
    return names.get(type(value), type(value).__name__)


def keys(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and keys of the schema."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if inspect.isclass(section := field.annotation) and issubclass(section, BaseModel):
            yield from keys(section, f"{prefix}{name}.")


def _nearest(name: str) -> str | None:
    """The known key that looks most like `name`, in its own section or else anywhere by its last part."""
    known = list(keys())
    section, _, last = name.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    for candidates, cutoff in ((siblings, 0.7), (known, 0.8)):
        if near := difflib.get_close_matches(last, [key.rpartition(".")[2] for key in candidates], 1, cutoff):
            same = [key for key in candidates if key.rpartition(".")[2] == near[0]]
            return difflib.get_close_matches(name, same, 1, 0)[0]
    return None


def _line(root: Node, location: Sequence[str | int]) -> int | None:
    """Line of the key (or list entry) that `location` leads to, counted from 1."""
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
