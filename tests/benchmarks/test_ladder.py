"""Students of one teacher: what is written, what runs again, and what is refused."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ladder
from benchmarks.ladder import COLUMNS, LADDERS, Ladder, LadderError, setting, with_values
from benchmarks.ladder_chart import plot_rows
from benchmarks.ladder_scores import add_precisions, read, standard_error
from pipeline.data.splits import draw_test
from pipeline.files import Files, read_json
from pipeline.report.curves import read_curves
from pipeline.stage.presets import load_preset
from tests.imports import ROOT

TINY = Ladder("smoke", {"ours": {}, "none": {"student.method": "none", "student.epochs": 1}})
WEIGHTS = {"teacher.weights": "weights.safetensors"}
"""Of ladders `products` and `paper`, which have no default for them."""

Run = Callable[..., None]


@pytest.fixture
def run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return the command for a tiny ladder, in a checkout of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(ladder, "ROOT", checkout)
    monkeypatch.setitem(LADDERS, "tiny", TINY)

    def command(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["ladder", "tiny", "--seed", "3", *arguments])
        ladder.main()

    return command


def test_students_are_trained_once_and_compared_with_their_teacher(
    run: Run, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = checkout / ".ladder" / "tiny-3", checkout / "evidence" / "ladder" / "tiny-3.csv"
    run()
    ours, none = read(table)
    assert [ours["student"], none["student"]] == ["ours", "none"]
    assert 0.4 <= float(ours["macs_reduction"]) <= 0.41 and float(none["macs_reduction"]) == 0
    assert float(ours["core_minutes"]) > 0
    metrics = {stage: read_json(Files(folder, folder).metrics(stage)) for stage in ("teacher", "surgery")}
    assert float(none["map"]) == pytest.approx(metrics["surgery"]["map"], abs=1e-5)
    assert float(ours["teacher_map"]) == pytest.approx(metrics["teacher"]["map"], abs=1e-5)
    precisions = read(table.with_name("tiny-3-ap.csv"))
    assert list(precisions[0]) == ["identity", "queries", "teacher", "ours", "none"] and len(precisions) == 8
    assert f"none: {none['difference']} mAP, " in capsys.readouterr().out

    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))  # as if it had ended before the line
    run("--students", "none")
    repeated = read(table)[1]
    assert {**repeated, "core_minutes": ""} == {**none, "core_minutes": ""}
    monkeypatch.setattr(ladder, "run", None)
    run()

    with pytest.raises(SystemExit, match=r"the teacher in .*tiny-3 has other params"):
        run("--params", "runtime.workers=1")
    with pytest.raises(SystemExit, match=r"tiny-3\.csv has ours with other params; delete its line to train it again"):
        run("--params", "teacher.epochs=1")
    with pytest.raises(SystemExit, match=r"ladder: invalid `--params`: .*teacher\.epochs"):
        run("--params", "teacher.epochs=0")
    monkeypatch.setitem(LADDERS, "tiny", Ladder("smoke", {"ours": {"student.epochs": 1}}))
    with pytest.raises(SystemExit, match=r"tiny-3\.csv has ours with other params; delete its line to train it again"):
        run()
    table.write_text(table.read_text().replace(ours["teacher"], "0" * 12))
    monkeypatch.setitem(LADDERS, "tiny", Ladder("smoke", {**TINY.students, "other": {}}))
    with pytest.raises(SystemExit, match=r"tiny-3\.csv has students of another teacher"):
        run()
    with (checkout / "pipeline" / "files.py").open("a") as file:
        file.write("# another\n")
    with pytest.raises(SystemExit, match=r"code has changed since .*tiny-3 was cloned, such as pipeline/files\.py"):
        run()


def test_arguments_are_checked_before_anything_is_trained(
    run: Run, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, problem in (
        (("--students", "our"), "unknown students our; there are ours, none"),
        (("--params", "teacher.epochs"), "'teacher.epochs' is not KEY=VALUE"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert problem in capsys.readouterr().err
    assert not (checkout / ".ladder").exists()
    assert setting("student.sites=[conv1, conv2]") == ("student.sites", ["conv1", "conv2"])


@pytest.mark.parametrize("name", LADDERS)
def test_the_params_of_all_students_are_valid_and_differ(name: str) -> None:
    chosen = LADDERS[name]
    base = with_values(load_preset(ROOT, chosen.preset), {**chosen.settings, **(WEIGHTS if name != "vehicles" else {})})
    students = [with_values(base, dict(changes)).model_dump_json() for changes in chosen.students.values()]
    assert len(set(students)) == len(students)


def test_precisions_are_averaged_over_the_queries_of_an_identity(tmp_path: Path) -> None:
    path, identities = tmp_path / "ap.csv", np.array(["b", "a", "b", "c"])
    columns = {"teacher": np.array([0.2, 0.5, 0.4, np.nan]), "one": np.array([1.0, 0.0, 0.5, np.nan])}
    queries, (teacher, one) = add_precisions(path, identities, columns)
    assert queries.tolist() == [1, 2]
    np.testing.assert_allclose([*teacher, *one], [0.5, 0.3, 0.0, 0.75])
    add_precisions(path, identities, {"teacher": columns["teacher"], "two": columns["one"] / 2})
    assert read(path)[1] == {"identity": "b", "queries": "2", "teacher": "0.30000", "one": "0.75000", "two": "0.37500"}


def test_the_standard_error_is_that_of_the_mean_over_queries() -> None:
    """Compared with the deviation over many drawn test sets whose identities have unequal numbers of queries."""
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        queries = random.integers(1, 40, 60)
        differences = random.normal(queries / 100, 0.1)
        drawn.append((np.average(differences, weights=queries), standard_error(differences, queries)))
    means, errors = np.array(drawn).T
    assert errors.mean() == pytest.approx(means.std(), rel=0.05)
    equal = np.full(4, 3)
    assert standard_error(np.array([0.0, 0.1, 0.2, 0.3]), equal) == pytest.approx(
        np.std([0.0, 0.1, 0.2, 0.3], ddof=1) / 2
    )


def test_the_chart_has_the_rows_of_all_students_of_the_method_as_published(tmp_path: Path) -> None:
    columns = "epoch,macs_reduction,masked_rows,norm_of_masked_rows,norm_of_other_rows\n"
    (tmp_path / "paper-0-one.csv").write_text(f"{columns}1,0.0,0.0,,1.0\n2,0.1,0.5,0.7,0.9\n")
    (tmp_path / "paper-0-two.csv").write_text("epoch,macs_reduction,masked_rows,norm_of_other_rows\n1,0.0,0.0,1.0\n")
    ladder.draw(tmp_path / "paper-0.csv", ["one", "two"])
    assert (tmp_path / "paper-0.png").stat().st_size
    figure = plot_rows({name: read_curves(tmp_path / f"paper-0-{name}.csv") for name in ("one", "two")})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    norms = figure.axes[1].get_lines()
    assert [line.get_linestyle() for line in norms] == ["--", "-", "-"]


def test_a_ladder_without_the_labels_of_a_half_passes_their_folders_to_all_students(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LADDERS, "tiny", Ladder("smoke", TINY.students, half_unlabelled=True))
    with pytest.raises(SystemExit, match=r"ladder: data\.root must be the absolute path of a folder, got data; add "):
        run()
    for name in "abcdefghij":
        (tmp_path / name).mkdir()
    taught = []
    monkeypatch.setattr(ladder, "clone", lambda _folder: None)
    monkeypatch.setattr(ladder, "teach", lambda _folder, params: taught.append(params))
    monkeypatch.setattr(ladder, "train", lambda *arguments: taught.append(arguments[3]) or dict.fromkeys(COLUMNS))
    run("--params", "data.source=folder", f"data.root={tmp_path}")
    assert len(taught) == 3 and all(params.data.unlabelled == ladder.half_of_training(params) for params in taught)


def test_half_of_the_training_identities_lose_their_labels(tmp_path: Path) -> None:
    for name in "abcdefghij":
        (tmp_path / name).mkdir()
    params = with_values(load_preset(ROOT, "smoke"), {"data.root": str(tmp_path), "data.source": "folder", "seed": 1})
    trained = sorted(set("abcdefghij") - draw_test("abcdefghij", params.data.custom.test, 1))
    assert 2 < len(trained) < 10 and ladder.half_of_training(params) == trained[::2]
    with pytest.raises(LadderError, match=r"data\.root must be the absolute path of a folder, got data/own; add "):
        ladder.half_of_training(with_values(params, {"data.root": "data/own"}))
