"""Presets hold only the values that differ, and `upgrade` adds missing keys to a user's params.yaml."""

import json
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.config import Params
from pipeline.stage import params_file
from pipeline.stage.params_file import ParamsError, load
from pipeline.stage.params_problems import keys
from pipeline.stage.presets import COMPLETE, is_preset, load_preset, names, preset_text, upgrade

ROOT = Path(__file__).parents[2]
TEXT = preset_text(ROOT, COMPLETE)
SCHEMA = Params.model_json_schema()
OTHERS = [name for name in names(ROOT) if name != COMPLETE]


def values(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in content.items():
        section = isinstance(value, Mapping) and value  # an empty one is a value
        found |= leaves(value, f"{prefix}{name}.") if section else {f"{prefix}{name}": value}
    return found


def comments(text: str) -> list[str]:
    """All comments except the head of the file, in whatever column."""
    return re.findall(r"(?:^| )(# .*)", text.partition("\n\n")[2], re.MULTILINE)


# --- presets ----------------------------------------------------------------------------------------------------------


def test_the_complete_preset_has_exactly_the_keys_of_the_schema() -> None:
    sections = {key.rpartition(".")[0] for key in keys()}
    assert set(leaves(values(TEXT))) == set(keys()) - sections


@pytest.mark.parametrize("name", OTHERS)
def test_a_preset_holds_only_what_differs(name: str) -> None:
    text = (ROOT / "presets" / f"{name}.yaml").read_text()
    assert 10 <= len(text.splitlines()) <= 40
    complete = leaves(values(TEXT))
    assert [key for key, value in leaves(values(text)).items() if complete[key] == value] == []


@pytest.mark.parametrize("name", OTHERS)
def test_a_preset_is_written_complete_with_its_own_head_and_all_comments(name: str, tmp_path: Path) -> None:
    overlay, text = (ROOT / "presets" / f"{name}.yaml").read_text(), preset_text(ROOT, name)
    assert text.startswith(overlay.split("\n\n")[0] + "\n\n# Every key of a run")
    assert comments(text) == comments(TEXT)
    assert max(map(len, text.splitlines())) <= 120
    assert leaves(values(text)) == leaves(values(TEXT)) | leaves(values(overlay))
    assert re.search(r"^  batches: \[1, \d", text, re.MULTILINE)  # lists stay in one line
    (tmp_path / "params.yaml").write_text(text)
    assert load(tmp_path / "params.yaml") == load_preset(ROOT, name)
    assert is_preset(ROOT, tmp_path / "params.yaml")


def test_params_with_a_changed_value_are_not_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for text in (TEXT.replace("seed: 0 ", "seed: 1 "), TEXT.replace("seed: 0 ", ""), TEXT + "custom: 1\n"):
        path.write_text(text)
        assert not is_preset(ROOT, path)


def test_comments_state_the_ranges_and_choices_of_the_schema() -> None:
    for key, comment in commented():
        field = schema(key)
        limits = [field.get(name) for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")]
        if sum(limit is not None for limit in limits) == 2:
            found = re.search(r"\bin ([\[(])(\S+), (\S+)([\])])", comment)
            assert found, f"{key} states no range"
            low, high = float(found[2]), float(found[3])
            included = [low if found[1] == "[" else None, high if found[4] == "]" else None]
            excluded = [low if found[1] == "(" else None, high if found[4] == ")" else None]
            assert [*included, *excluded] == limits, key
        for choice in field.get("enum", []):
            assert re.search(rf"(?<![\w-]){choice}(?![\w-])", comment), f"{key} does not name {choice}"


def commented() -> list[tuple[str, str]]:
    """Keys with a comment, and the comment; keys of `student` that refer to `teacher` have none."""
    found: list[list[str]] = []
    path: list[str] = []
    for line in TEXT.splitlines():
        if entry := re.match(r"( *)(\w+):[^#]*?(?: +# (.*))?$", line):
            path = [*path[: len(entry[1]) // 2], entry[2]]
            found.append([".".join(path), entry[3] or ""])
        elif found and (more := re.match(r" +# (.*)", line)):
            found[-1][1] += f" {more[1]}"
    bare = {key for key, comment in found if not comment}
    assert all(re.fullmatch(r"student\.(batch|augment|optimizer|losses)\.\w+", key) for key in bare)
    return [(key, comment) for key, comment in found if comment]


def schema(key: str) -> dict[str, Any]:
    """JSON schema of a key, or of the entries of a list."""
    found = SCHEMA
    for part in key.split("."):
        found = found["properties"][part]
        if "$ref" in found:
            found = SCHEMA["$defs"][found["$ref"].rpartition("/")[2]]
    items: dict[str, Any] = found.get("items", found)
    return items


# --- upgrade ----------------------------------------------------------------------------------------------------------


def upgraded(path: Path, text: str) -> tuple[str, list[str]]:
    """Upgrade a text, and return the result and the changes; a second upgrade must change nothing."""
    path.write_bytes(text.encode())
    changes = upgrade(ROOT, path)
    written = path.read_bytes()
    assert upgrade(ROOT, path) == []
    assert path.read_bytes() == written
    return written.decode(), changes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def without(text: str, key: str) -> str:
    """Remove a key with its comment and content from a text."""
    start = end = 0
    for depth, name in enumerate(key.split(".")):
        indent = "  " * depth
        found = re.compile(rf"^{indent}{name}:.*\n(?:{indent} +.*\n)*", re.MULTILINE).search(text, start)
        assert found
        start, end = found.span()
    section = "." not in key and text[start - 2 : start] == "\n\n"
    return text[: start - section] + text[end:]


@pytest.mark.parametrize(
    "key",
    ["data", "data.source", "data.protocol", "data.custom", "data.custom.test", "teacher", "teacher.losses",
     "student.budget.of", "student.distill.average_views", "student.paper.threshold", "export.licence",
     "runtime.teacher_cache_gib", "retrain", "retrain.branch"],
)  # fmt: skip
def test_upgrade_adds_a_missing_key_or_section_in_its_place_with_comments(path: Path, key: str) -> None:
    text, changes = upgraded(path, without(TEXT, key))
    assert text == TEXT
    assert changes == [
        f"added `{name}: {json.dumps(value)}`"
        for name, value in leaves(values(TEXT)).items()
        if name == key or name.startswith(f"{key}.")
    ]


def test_upgrade_of_a_file_with_one_key_adds_all_others(path: Path) -> None:
    text, changes = upgraded(path, "seed: 3")
    assert leaves(values(text)) == leaves(values(TEXT)) | {"seed": 3}
    assert len(changes) == len(leaves(values(TEXT))) - 1
    assert load(path).seed == 3


OWN = """\
# A run of my own
---
runtime: # of our machine
    # the other four cores are taken
    workers:    4

    accelerator:  "cpu"
    # devices: 8

data:
   root: pictures      # from the north gate
                       # and the south gate
   # for folders
   source: folder
   custom:
     pattern: '_(?P<camera>c[0-9]+)_' # ours

# the seed comes last
seed: 5   # tried: 3, 4
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["ends with a line end", "ends without"])
def test_upgrade_keeps_values_comments_and_order_of_the_user(path: Path, end: str, last: bool) -> None:
    own = OWN if last else OWN.removesuffix("\n")
    text, _ = upgraded(path, own.replace("\n", end))
    assert text.count("\n") == text.count(end)
    text = text.replace(end, "\n")
    assert leaves(values(text)) == leaves(values(TEXT)) | leaves(values(OWN))
    lines = iter(text.splitlines())
    assert all(line in lines for line in OWN.splitlines())  # all of them, in this order
    for together in (
        "# A run of my own\n---\nruntime: # of our machine\n",
        "    # the other four cores are taken\n    workers:    4\n",
        "   root: pictures      # from the north gate\n                       # and the south gate\n   protocol: ",
        "   # for folders\n   source: folder\n",
        "\n# the seed comes last\nseed: 5   # tried: 3, 4\n",
        "\n   image_size: [64, 64] ",
        "\n    devices: 1 ",
    ):
        assert together in text
    load(path)


def test_upgrade_keeps_values_of_a_wrong_type_and_load_reports_them(path: Path) -> None:
    text = TEXT.replace("  near_duplicate_bits: 4 ", "  near_duplicate_bits: many ").replace(
        "seed: 0 ", "seed: {a: 1} "
    )
    text = without(without(text, "data.vehicles"), "data.cache").replace("  custom: ", "  vehicles: 7\n  custom: ")
    text = text.replace("    test_identities: 800 ", "    # test_identities: 800 ")  # leaves `vehicleid:` empty
    found, changes = upgraded(path, text)
    assert changes == ["added `data.cache: true`"]
    content = values(found)
    assert (content["seed"], content["data"]["near_duplicate_bits"], content["data"]["vehicles"]) == (
        {"a": 1},
        "many",
        7,
    )
    with pytest.raises(ParamsError) as caught:
        load(path)
    assert [line.split(" (")[0] for line in caught.value.problems[1:]] == [
        "`data.near_duplicate_bits` must be a whole number, got the text 'many'",
        "`data.vehicles` must be a section with keys of its own, got 7",
        "`data.vehicleid` must be a section with keys of its own, got nothing",
    ]
    assert caught.value.problems[0].startswith("`seed` must be a whole number, got the section")


LICENCE, SITES, AUGMENT = "export.licence", "student.sites", "student.augment"


@pytest.mark.parametrize(
    ("key", "form", "missing"),
    [
        (SITES, "sites:\n  - conv1\n  - stream", "student.channel_multiple"),
        (SITES, "sites: [conv1,\n    stream]", "student.channel_multiple"),
        (LICENCE, "licence: |\n    Mine.\n    All of it.", "export.limits"),
        (LICENCE, "licence: >-\n    Mine.\n\n    All of it.\n", "export.limits"),
        (LICENCE, "licence: All of it\n    is mine.", "export.limits"),
        (LICENCE, '"licence": "All of it\\\n    is mine."', "export.limits"),
        (LICENCE, "licence:", "export.limits"),
        (AUGMENT, "augment: *augment", "student.optimizer"),
        (AUGMENT, "augment: {flip: 0.5, pad: 6, erase: 0.5, erase_area: 0.2}", "student.optimizer"),
    ],
)
def test_lines_are_inserted_after_values_of_any_form(path: Path, key: str, form: str, missing: str) -> None:
    text = TEXT.replace("  augment: ", "  augment: &augment ", 1)
    before = without(text, key)
    at = next(index for index, (old, new) in enumerate(zip(text, before, strict=False)) if old != new)
    at = before.rfind("\n", 0, at) + 1
    expected = f"{before[:at]}  {form} # as it is\n  # mine\n{before[at:]}".replace(" # as it is" * ("|" in form), "")
    own = without(expected, missing)
    found, _ = upgraded(path, own)
    assert values(found) == values(expected)
    assert found.index("  # mine") > found.index(f"  {missing.rpartition('.')[2]}:", at)


@pytest.mark.parametrize(
    ("section", "problems"),
    [
        ("custom: {table: mine.csv, pattern: ''}", ["data.custom.test: 0.5"]),
        ("custom: {}", ['data.custom.table: "images.csv"', 'data.custom.pattern: ""', "data.custom.test: 0.5"]),
        ("custom:\n    <<: {table: mine.csv}\n    pattern: ''", ["data.custom.test: 0.5"]),
    ],
)
def test_sections_without_one_key_per_line_stay_and_the_error_names_their_keys(
    path: Path, section: str, problems: list[str]
) -> None:
    text = without(TEXT, "data.custom").replace("  near_duplicate_bits: 4 ", f"  {section}\n  near_duplicate_bits: 4 ")
    path.write_text(text)
    with pytest.raises(ParamsError) as caught:
        upgrade(ROOT, path)
    assert caught.value.problems == tuple(
        f"add `{key}` by hand; its section does not have one key per line" for key in problems
    )
    assert path.read_text() == text


def test_upgrade_renames_old_keys_and_keeps_everything_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "data.closeness": "data.near_duplicate_bits",
        "export.bounds": "export.limits",
        "export.limits.cos": "export.limits.min_cosine",
    }
    monkeypatch.setattr(params_file, "RENAMED", table)
    own = (
        TEXT.replace("  near_duplicate_bits: 4", "  closeness:  7")
        .replace("  limits:", "  'bounds':", 1)
        .replace("min_cosine:", "cos :")
    )
    text, changes = upgraded(path, without(own, "data.cache"))
    assert changes == [*(f"renamed `{old}` to `{new}`" for old, new in table.items()), "added `data.cache: true`"]
    assert text == TEXT.replace("  near_duplicate_bits: 4", "  near_duplicate_bits:  7").replace(
        "min_cosine:", "min_cosine :"
    )


def test_a_key_that_two_sections_share_by_an_alias_is_added_once(path: Path) -> None:
    text = TEXT.replace("  augment: ", "  augment: &augment ", 1)
    for key in ("teacher.augment.pad", "student.augment"):
        text = without(text, key)
    text = text.replace("  channel_multiple: 8 ", "  augment: *augment\n  channel_multiple: 8 ", 1)
    found, changes = upgraded(path, text)
    assert changes == ["added `teacher.augment.pad: 6`", "added `student.augment.pad: 6`"]
    assert found.count("    pad: 6 ") == 1
    assert values(found) == values(TEXT)


def test_a_new_key_before_a_renamed_one_is_inserted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params_file, "RENAMED", {"pictures": "data"})
    own = without(TEXT, "seed").replace("data: ", "pictures: ", 1)
    text, changes = upgraded(path, own)
    assert changes == ["renamed `pictures` to `data`", "added `seed: 0`"]
    assert values(text) == values(TEXT)


def test_a_file_that_cannot_be_written_stays_unchanged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space")

    path.write_text("seed: 3\n")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        upgrade(ROOT, path)
    assert path.read_text() == "seed: 3\n"
    assert list(path.parent.iterdir()) == [path]


@settings(max_examples=10, deadline=None)
@given(st.sets(st.sampled_from(sorted(key for key in keys() if "." in key)), min_size=1, max_size=12))
def test_upgrade_adds_any_set_of_missing_keys_and_changes_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, missing: set[str]
) -> None:
    own = TEXT.replace("near_duplicate_bits: 4 ", "near_duplicate_bits: 7 ").replace("#", "# my notes:")
    for key in sorted(missing):
        *sections, name = key.split(".")
        section = reduce(lambda content, part: content.get(part, {}), sections, values(own))
        if name in section and len(section) > 1:  # a section with nothing in it is a value of another type
            own = without(own, key)
    text, _ = upgraded(tmp_path_factory.mktemp("any") / "params.yaml", own)
    lines = iter(text.splitlines())
    assert all(line in lines for line in own.splitlines())
    assert leaves(values(text)) == leaves(values(TEXT)) | leaves(values(own))
