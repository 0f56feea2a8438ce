"""Load and validate params.yaml, and report all its errors at once, by key and line.

Imports nothing heavier than numpy, so a mistyped key is reported in well under two seconds.
"""

import logging
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from pipeline.compress.budget import BudgetError, cost_model, shrinking_sites
from pipeline.config import Params
from pipeline.data.sources import LAYOUTS
from pipeline.models.spec import ArchSpec
from pipeline.protocols import PROTOCOLS
from pipeline.stage.params_problems import alternatives, dotted, entries, format_value, kind_of, line_of, problems_of

REMEDY = "`smaller-student preset NAME` writes a complete one"
RENAMED: dict[str, str] = {
    "data.near": "data.near_duplicate_bits",
    "data.own": "data.custom",
    "student.settle": "student.freeze_norms_at",
    "student.settle_head": "student.freeze_head_norms_at",
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
    """params.yaml is invalid.

    Attributes:
        problems: One sentence for each error, with its line number if it has one.
    """

    exit_code = 2

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{path.name}: {problem}" for problem in problems))


class Renaming(NamedTuple):
    """A key that a file has under its old name.

    Attributes:
        old: Dotted name in the file.
        new: Dotted name in the schema.
        key: Node of the old name in the syntax tree.
    """

    old: str
    new: str
    key: ScalarNode


class Document(NamedTuple):
    """A parsed YAML file of sections, not validated yet.

    Attributes:
        root: Syntax tree of `text`, with lines and columns.
        content: Values of the file; old keys have their new names.
        renamed: Keys that `text` has under their old names.
    """

    path: Path
    text: str
    root: MappingNode
    content: MutableMapping[str, Any]
    renamed: tuple[Renaming, ...]


def load(path: Path) -> Params:
    """Load and validate params.yaml; log a warning for each key under an old name.

    Raises:
        ParamsError: If it is invalid; lists all problems.
    """
    document = read(path)
    for old, new, _ in document.renamed:
        log.warning("%s: `%s` is called `%s` now; `smaller-student preset --upgrade` renames it", path.name, old, new)
    return check(document)


def read(path: Path) -> Document:
    """Read and parse a YAML file of sections.

    Raises:
        ParamsError: If it cannot be read, is not YAML or has no sections.
    """
    return parse(path, _read(path))


def parse(path: Path, text: str) -> Document:
    """Parse the text of a YAML file of sections.

    ruamel.yaml reads YAML 1.2, as DVC does: `1e-3` is a number and `no` a string.

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
        raise ParamsError(path, [f"must hold sections, got a {kind_of(content)}; {REMEDY}"])
    return Document(path, text, root, content, renamed)


def check(document: Document) -> Params:
    """Validate the values of a parsed file.

    Raises:
        ParamsError: If any is invalid; lists all problems.
    """
    problems = [*_data_problems(document), *_loss_problems(document)]
    try:
        params = Params.model_validate(document.content)
        if not problems:
            _check_budget(params)  # needs otherwise valid params
            return params
    except ValidationError as error:
        problems += [line for detail in error.errors() for line in problems_of(detail, document.root)]
    except BudgetError as error:
        problems.append(str(error))
    raise ParamsError(document.path, list(dict.fromkeys(problems))) from None


def _data_problems(document: Document) -> Iterator[str]:
    """Check that source and protocol are registered and fit together."""
    data = document.content.get("data")
    if not isinstance(data, dict):
        return
    source, protocol = (data.get(name) for name in ("source", "protocol"))
    for name, value, known in (("source", source, LAYOUTS), ("protocol", protocol, PROTOCOLS)):
        if isinstance(value, str) and value and value not in known:
            where = f" (line {line_of(document.root, ('data', name))})"
            yield f"`data.{name}` must be {alternatives(known)}, got {format_value(value)}{where}"
    if not (isinstance(source, str) and isinstance(protocol, str)):
        return
    supported = LAYOUTS[source].protocols if source in LAYOUTS else ()
    if supported and protocol in PROTOCOLS and protocol not in supported:
        yield f"`data.protocol` is {protocol}, but source {source} supports only {' or '.join(supported)}"


def _loss_problems(document: Document) -> Iterator[str]:
    """Check that extra losses are registered and their settings valid."""
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
            where = f" (line {line_of(document.root, location)})"
            yield f"`{dotted(location)}` is unknown; available: {', '.join(known)}{where}"
            continue
        try:
            known[name].settings.model_validate(settings)
        except ValidationError as error:
            wanted = ", ".join(known[name].settings.model_fields)
            for detail in error.errors():
                place = (*location, *detail["loc"])
                if detail["type"] in ("missing", "extra_forbidden"):
                    what = "missing" if detail["type"] == "missing" else "unknown"
                    where = f" (line {line_of(document.root, place)})"
                    yield f"`{dotted(place)}` is {what}; the settings of {name} are {wanted}{where}"
                else:
                    yield from problems_of({**detail, "loc": place}, document.root)


def _rename(root: Node | None) -> Iterator[Renaming]:
    """Rename keys with old names in the syntax tree, unless the new name is present too."""
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


SHORTEST = 8
"""Length of an embedding that a file decides: with the shortest, a budget that can be reached is never rejected."""


def _check_budget(params: Params) -> None:
    """Reject a budget that no choice of channels can reach, before anything is trained."""
    student, (height, width) = params.student, params.data.image_size
    own, trained = student.architecture, params.teacher.source == "train"
    if not (own.depth or trained):  # the file decides; stage student checks it before it trains
        return
    dim = params.teacher.embedding_dim if trained else SHORTEST
    spec = ArchSpec.of_student(own, dim) if own.depth else ArchSpec.of(params.teacher)
    if student.budgeted and student.budget.of == "latency":  # measured by stage student
        shrinking_sites(spec, student)
    else:
        cost_model(spec, student, (height, width))


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode()  # keeps the line endings
    except FileNotFoundError as error:
        raise ParamsError(path, [f"is missing in {path.parent.resolve()}; {REMEDY}"]) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ParamsError(path, [f"is not UTF-8 (line {line}); save it as UTF-8"]) from error
    except OSError as error:
        raise ParamsError(path, [f"cannot be read: {error.strerror}"]) from error
    if text.startswith("\ufeff"):
        # DVC and this parser treat the mark differently, and editors hide it.
        raise ParamsError(path, ["begins with a byte order mark (line 1); save it as UTF-8 without BOM"])
    return text


def _sentence(error: MarkedYAMLError) -> str:
    problem = (error.problem or error.context or "is not YAML").strip()
    if "\\t" in problem:
        return "is indented with a tab; indent with spaces"
    return problem.splitlines()[0]
