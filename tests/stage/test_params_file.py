import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.config import Params
from pipeline.stage import params_file
from pipeline.stage.params_file import ParamsError, load
from pipeline.stage.params_problems import keys
from pipeline.stage.presets import load_preset, preset_text

ROOT = Path(__file__).parents[2]
SMOKE = preset_text(ROOT, "smoke")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def problems(path: Path, content: str | bytes) -> tuple[str, ...]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ParamsError) as caught:
        load(path)
    assert str(caught.value).splitlines() == [f"params.yaml: {line}" for line in caught.value.problems]
    return caught.value.problems


def line_of(text: str, part: str) -> int:
    return text[: text.index(part)].count("\n") + 1


def test_a_preset_is_loaded(path: Path) -> None:
    path.write_text(SMOKE)
    assert load(path).data.source == "vehicles"


def test_all_problems_are_reported_at_once_by_key_and_line(path: Path) -> None:
    text = (
        SMOKE.replace("seed: 0 ", "")
        .replace("  cache: true", "  cahce: true")
        .replace("reduction: 0.4", "reduction: 1.5")
        .replace("opset:", "opset: no #")
    )
    text += "nonsense: 1\n"
    assert set(problems(path, text)) == {
        "`seed` is missing; `smaller-student preset --upgrade` adds it",
        "`data.cache` is missing; `smaller-student preset --upgrade` adds it",
        f"`data.cahce` is unknown; nearest: `data.cache` (line {line_of(text, 'cahce')})",
        f"`student.budget.reduction` must be less than 1, got 1.5 (line {line_of(text, 'reduction: 1.5')})",
        f"`export.opset` must be a whole number, got the text 'no' (line {line_of(text, 'opset:')})",
        f"`nonsense` is unknown (line {line_of(text, 'nonsense')})",
    }


@pytest.mark.parametrize("batch", ["0", "1025", "2.0", "true", "all", "[4]", "null", "'4'"])
def test_the_batch_of_files_is_dynamic_or_a_number(path: Path, batch: str) -> None:
    (problem,) = problems(path, SMOKE.replace("  batch: dynamic", f"  batch: {batch}"))
    assert problem.startswith("`export.batch`: must be dynamic or a whole number in [1, 1024], got ")


def test_the_timed_batches_are_those_that_the_files_take(path: Path) -> None:
    fixed = SMOKE.replace("  batch: dynamic", "  batch: 8")
    (problem,) = problems(path, fixed)
    assert problem == (
        "`benchmark.batches` must be [8], got [1, 4], because files with `export.batch` 8 take no other batch"
    )
    path.write_text(fixed.replace("batches: [1, 4]", "batches: [8]"))
    assert load(path).export.batch == 8
    (problem,) = problems(path, SMOKE.replace("batches: [1, 4]", "batches: [2, 4]"))
    assert problem == "`benchmark.batches` must contain 1, got [2, 4]"


def test_contradicting_values_are_both_named(path: Path) -> None:
    text = SMOKE.replace("recipe: scratch", "recipe: paper", 1)
    (line,) = problems(path, text)
    assert line.startswith("`student.recipe` (scratch) must equal `teacher.recipe` (paper)")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("weights: none", "weights: imagenet", "`teacher.weights` is imagenet, but torchvision publishes no ResNet-14"),
        ("init: teacher", "init: imagenet", "`student.init` is imagenet, but torchvision publishes no ResNet-14"),
        ("reduction: 0.4", "reduction: 0.9", "`student.budget.reduction` 0.9 cannot be reached"),
        ("depth: 14", "depth: 18", "`student.sites` ['conv2'] names no site of a ResNet-18"),
    ],
)
def test_params_that_no_network_can_satisfy_are_rejected(path: Path, old: str, new: str, problem: str) -> None:
    text = SMOKE.replace(old, new)
    if "depth" in new:
        text = text.replace("sites: [conv1, conv2, stream]", "sites: [conv2]")
    (line,) = problems(path, text)
    assert line.startswith(problem)


GIVEN = {
    "source": "onnx", "weights": "weights/teacher/a.onnx", "depth": 18, "width": 8, "stem": 64, "embedding_dim": 8192,
    "batch": {"identities": 4000, "instances": 4},
}  # fmt: skip
"""Keys that count for teachers that are trained here, with values that would not do for one."""


def with_given_teacher(student: Mapping[str, object], teacher: Mapping[str, object]) -> str:
    """Return params.yaml with a teacher from elsewhere."""
    content = YAML(typ="safe").load(SMOKE)
    content["teacher"] |= GIVEN | teacher
    content["student"] |= {"init": "random", "sites": ["conv2"]} | student
    content["student"]["distill"]["feature"] = 0.0
    stream = io.StringIO()
    YAML().dump(content, stream)
    return stream.getvalue()


def test_the_budget_of_a_given_teacher_is_that_of_the_students_architecture(path: Path) -> None:
    own = {"depth": 50, "width": 64, "stem": 0, "last_stride": 1}
    path.write_text(with_given_teacher({"architecture": own}, {}))
    load(path)
    path.write_text(with_given_teacher({}, {"source": "checkpoint", "weights": "weights/teacher/a.pth"}))
    load(path)
    (line,) = problems(path, with_given_teacher({"architecture": own | {"depth": 18}}, {}))
    assert line.startswith("`student.sites` ['conv2'] names no site of a ResNet-18")


@pytest.mark.parametrize(
    ("source", "changes", "problem"),
    [
        ("train", {"pool": "gem", "weights": "none"}, "`teacher.pool` is for `teacher.source` checkpoint: set it to"),
        ("onnx", {"max_pool": "padded"}, "`teacher.max_pool` is for `teacher.source` checkpoint: set it to"),
        ("train", {"weights": "none", "input": {"bgr": True}}, "`teacher.input.bgr` is for `teacher.source` checkpo"),
        ("checkpoint", {"weights": "a.pth", "input": {"size": [64, 64]}}, "`teacher.input.size` is for `teacher.sourc"),
        ("checkpoint", {}, "`teacher.source` checkpoint does not read weights/teacher/a.onnx: set it to onnx"),
        ("onnx", {"weights": "a.pth"}, "`teacher.source` onnx does not read a.pth: set it to checkpoint"),
        ("onnx", {"input": {"mean": [123.7, 116.3, 103.5]}}, "`teacher.input.mean`"),
    ],
)  # fmt: skip
def test_what_a_source_does_not_use_is_refused(path: Path, source: str, changes: dict[str, Any], problem: str) -> None:
    neutral = {"mean": [], "std": [], "bgr": False, "size": [], "layout": "auto"}
    sound = {"depth": 26, "stem": 0, "embedding_dim": 64, "batch": {"identities": 4, "instances": 4}}
    changed = sound | changes | {"source": source, "input": neutral | changes.get("input", {})}
    own = {"depth": 26, "width": 32, "stem": 0, "last_stride": 1}
    lines = problems(path, with_given_teacher({"architecture": own}, changed))
    assert any(line.startswith(problem) for line in lines), lines


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("student.lr", "student.optimizer.lr"),  # right name, wrong section
        ("student.budget.redution", "student.budget.reduction"),
        ("data.vehicles.train_identites", "data.vehicles.train_identities"),
    ],
)
def test_the_nearest_name_is_searched_in_the_section_and_then_everywhere(path: Path, wrong: str, nearest: str) -> None:
    content: object = 1
    for part in reversed(wrong.split(".")):
        content = f"{{{part}: {content}}}"
    found = problems(path, str(content)[1:-1])
    assert f"`{wrong}` is unknown; nearest: `{nearest}` (line 1)" in found


def test_values_are_read_as_yaml_1_2_like_in_dvc(path: Path) -> None:
    path.write_text(SMOKE.replace("experiment: ", "experiment: no #"))
    assert load(path).tracking.experiment == "no"
    (line,) = problems(path, SMOKE.replace("seed: 0", "seed: yes"))
    assert line == f"`seed` must be a whole number, got the text 'yes' (line {line_of(SMOKE, 'seed: 0')})"
    path.write_text(SMOKE.replace("max_quarantined: 0.001", "max_quarantined: 1e-3"))
    assert load(path).data.max_quarantined == 0.001


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty; `smaller-student preset NAME` writes a complete one"),
        ("# only words\n", "is empty; `smaller-student preset NAME` writes a complete one"),
        ("- 1\n", "must hold sections, got a list; `smaller-student preset NAME` writes a complete one"),
        ("seed: 0\nseed: 1\n", 'found duplicate key "seed" with value "1" (original value: "0") (line 2)'),
        ("data:\n\troot: x\n", "is indented with a tab; indent with spaces (line 2)"),
        (b"\xef\xbb\xbfseed: 0\n", "begins with a byte order mark (line 1); save it as UTF-8 without BOM"),
        (b"seed: 0\n# caf\xe9\n", "is not UTF-8 (line 2); save it as UTF-8"),
        ("seed: [\n", "expected the node content, but found '<stream end>' (line 2)"),
        ("seed: 0\n---\nseed: 0\n", "but found another document (line 2)"),
    ],
)
def test_an_invalid_file_is_rejected_with_the_line(path: Path, content: str | bytes, problem: str) -> None:
    assert problems(path, content) == (problem,)


def test_python_objects_are_not_constructed(path: Path) -> None:
    (line,) = problems(path, "seed: !!python/object/apply:os.system [exit]\n")
    assert "could not determine a constructor" in line


def test_a_missing_file_names_the_remedy(path: Path) -> None:
    with pytest.raises(ParamsError, match=r"is missing in .*smaller-student preset NAME"):
        load(path)


def with_old_names(text: str) -> str:
    return (
        text.replace("  near_duplicate_bits: ", "  closeness: ")
        .replace("  limits:", "  bounds:")
        .replace("min_cosine:", "cos:")
    )


OLD_NAMES = {
    "data.closeness": "data.near_duplicate_bits",
    "export.bounds": "export.limits",
    "export.limits.cos": "export.limits.min_cosine",
}


def test_old_names_are_read_with_a_warning_that_has_the_new_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(params_file, "RENAMED", OLD_NAMES)
    path.write_text(with_old_names(SMOKE))
    assert load(path) == load_preset(ROOT, "smoke")
    assert [record.getMessage() for record in caplog.records] == [
        f"params.yaml: `{old}` is called `{new}` now; `smaller-student preset --upgrade` renames it"
        for old, new in OLD_NAMES.items()
    ]


def test_a_file_of_the_previous_version_is_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = SMOKE
    for old, new in params_file.RENAMED.items():
        text = re.sub(rf"^(\s+){new.rpartition('.')[2]}:", rf"\1{old.rpartition('.')[2]}:", text, flags=re.MULTILINE)
    path.write_text(text)
    assert load(path) == load_preset(ROOT, "smoke")
    assert len(caplog.records) == len(params_file.RENAMED)


def test_an_invalid_value_under_an_old_name_is_reported_with_its_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params_file, "RENAMED", OLD_NAMES)
    text = with_old_names(SMOKE).replace("closeness: 4", "closeness: 40")
    (line,) = problems(path, text)
    assert line == f"`data.near_duplicate_bits` must be at most 16, got 40 (line {line_of(text, 'closeness')})"


def test_an_old_name_beside_the_new_one_is_unknown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params_file, "RENAMED", {"data.near_duplicates": "data.near_duplicate_bits"})
    text = SMOKE.replace("  near_duplicate_bits: 4", "  near_duplicates: 3\n  near_duplicate_bits: 4")
    (line,) = problems(path, text)
    where = line_of(text, "near_duplicates")
    assert line == f"`data.near_duplicates` is unknown; nearest: `data.near_duplicate_bits` (line {where})"


def test_renamed_keys_stay_in_their_section_and_exist() -> None:
    for old, new in params_file.RENAMED.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0]
        assert new in keys() and old not in keys()


def test_nested_yaml_aliases_do_not_exhaust_memory(path: Path) -> None:
    levels = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    found = problems(path, "a: &a [x, x]\n" + "".join(levels))
    assert "`i` is unknown (line 9)" in found


def test_keys_yields_exactly_the_keys_of_the_schema() -> None:
    def walk(content: dict[str, object], prefix: str = "") -> set[str]:
        found = set()
        for key, value in content.items():
            found.add(f"{prefix}{key}")
            if isinstance(value, dict):
                found |= walk(value, f"{prefix}{key}.")
        return found

    assert set(keys()) == walk(YAML(typ="safe", pure=True).load(SMOKE))
    assert set(Params.model_fields) <= set(keys())


@pytest.mark.parametrize(
    "table", [{}, {"data.closeness": "data.near_duplicate_bits"}], ids=["no old names", "old names"]
)
@pytest.mark.parametrize("content", ["? [a, b]\n: 1\n", "data:\n  ? [a]\n  : 1\n", "data: [1]\n", "1: 2\n", "data:\n"])
def test_keys_that_are_not_strings_are_rejected(
    path: Path, monkeypatch: pytest.MonkeyPatch, content: str, table: dict[str, str]
) -> None:
    monkeypatch.setattr(params_file, "RENAMED", table)
    assert "`seed` is missing; `smaller-student preset --upgrade` adds it" in problems(path, content)


@given(st.text(max_size=60))
def test_any_text_is_rejected_without_a_crash(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load(path)
    assert caught.value.problems


@pytest.mark.parametrize("line", ["  source: [vehicles]", "  protocol: [market]", "  source: 3"])
def test_names_of_another_type_are_refused_with_a_sentence(path: Path, line: str) -> None:
    key = line.split(":")[0]
    (problem,) = problems(path, re.sub(rf"^{key}: \w+", line, SMOKE, count=1, flags=re.MULTILINE))
    assert f"`data.{key.strip()}` must be a text" in problem
