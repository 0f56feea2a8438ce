import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.files import Files, write_json, write_text
from pipeline.stage.params_file import load
from pipeline.stage.presets import preset_text
from tests import layouts
from tests.fake_stages import NUMBERS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A checkout with three presets, as the current directory."""
    for name in ("vehicles", "smoke"):
        write_text(tmp_path / "presets" / f"{name}.yaml", (ROOT / "presets" / f"{name}.yaml").read_text())
    write_text(tmp_path / "presets" / "larger.yaml", "# Larger\n\nseed: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return Files(tmp_path, tmp_path)


def smaller_student(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["smaller-student", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_preset_writes_params_yaml(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smaller_student(monkeypatch, "preset", "smoke") == 0
    assert smaller_student(monkeypatch, "preset", "larger") == 0  # a preset may be replaced
    assert files.params.read_text() == preset_text(files.root, "larger")
    assert load(files.params).seed == 1
    assert smaller_student(monkeypatch, "preset", "vehicles") == 0
    assert files.params.read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_the_error_of_an_unknown_preset_lists_the_available_ones(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smaller_student(monkeypatch, "preset", "smok") == 2
    assert capsys.readouterr().err == (
        "smaller-student: preset `smok` is unknown; nearest: `smoke`; available: larger, smoke, vehicles\n"
    )
    assert not files.params.exists()


def test_an_edited_params_yaml_is_overwritten_only_by_force(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for own in ("seed: 7\n", "seed: [\n", preset_text(ROOT, "smoke").replace("seed: 0", "seed: 7")):
        write_text(files.params, own)
        assert files.params.read_text() == own
        assert smaller_student(monkeypatch, "preset", "smoke", "--force") == 0
        assert load(files.params).seed == 0


def test_changes_of_comments_and_order_do_not_need_force(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = preset_text(ROOT, "smoke").replace("seed: 0 ", "").splitlines()
    write_text(files.params, "\r\n".join([*lines, "# mine", "seed: 0"]))
    assert smaller_student(monkeypatch, "preset", "larger") == 0
    assert load(files.params).seed == 1


def test_an_invalid_preset_is_not_written(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(files.root / "presets" / "broken.yaml", "# Broken\n\nteacher:\n  epocs: 3\n  depth: 27\ndata: 1\n")
    assert smaller_student(monkeypatch, "preset", "broken") == 2
    assert set(capsys.readouterr().err.splitlines()) == {
        "smaller-student: broken.yaml: `data` must be a section with keys of its own, got 1 (line 6)",
        "broken.yaml: `teacher.depth` must be 14, 18, 26, 34, 50, 101 or 152, got 27 (line 5)",
        "broken.yaml: `teacher.epocs` is unknown; nearest: `teacher.epochs` (line 4)",
    }
    assert not files.params.exists()


def test_upgrade_adds_missing_keys_once(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = preset_text(ROOT, "smoke").replace("seed: 0 ", "seed: 7 ")
    write_text(files.params, text.replace("  near_duplicate_bits: 4 ", "  # near_duplicate_bits: 4 "))
    assert smaller_student(monkeypatch, "preset", "--upgrade") == 0
    assert capsys.readouterr().out == "params.yaml: added `data.near_duplicate_bits: 4`\n"
    assert load(files.params).seed == 7
    before = files.params.stat()
    assert smaller_student(monkeypatch, "preset", "--upgrade") == 0
    assert capsys.readouterr().out == "params.yaml: no key is missing\n"
    assert files.params.stat() == before


def test_upgrade_reports_remaining_errors(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = preset_text(ROOT, "smoke").replace("near_duplicate_bits: 4 ", "near_duplicate_bit: 3 ")
    write_text(files.params, own)
    for out in ("params.yaml: added `data.near_duplicate_bits: 4`\n", "params.yaml: no key is missing\n"):
        assert smaller_student(monkeypatch, "preset", "--upgrade") == 2
        output = capsys.readouterr()
        assert output.out == out
        unknown = "`data.near_duplicate_bit` is unknown; nearest: `data.near_duplicate_bits` (line "
        assert output.err.startswith(f"smaller-student: params.yaml: {unknown}")


@pytest.mark.parametrize("words", [[], ["smoke", "--upgrade"]])
def test_preset_needs_either_a_name_or_upgrade(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert smaller_student(monkeypatch, "preset", *words) == 2
    assert "name a preset (larger, smoke, vehicles), or use `--upgrade`" in capsys.readouterr().err
    assert not files.params.exists()


def test_compare_shows_each_network_and_the_paths_of_the_results(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    for stage, numbers in NUMBERS.items():
        write_json(files.metrics(stage), numbers)
    write_text(files.report / "index.html", "")
    write_text(files.artifacts("export") / "model.onnx", "")
    lock = {"stages": {"teacher": {"params": {"params.yaml": {"data.protocol": "loo"}}}}}
    write_json(files.root / "dvc.lock", lock)  # JSON is YAML
    assert smaller_student(monkeypatch, "compare") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Protocol loo, batch 1, all threads" in lines[0]
    row = {line.split()[0]: line for line in lines if "%" in line}
    assert list(row) == ["teacher", "student", "surgery", "export"]
    assert all(figure in row["export"] for figure in ("0.5900", "0.50 M", "9.0 M", "50.0%", "55.0%", "2.00 ms"))
    assert lines[-2:] == ["report: artifacts/benchmark/report/index.html", "ONNX: artifacts/export/model.onnx"]


def test_compare_before_the_first_run_names_the_remedy(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smaller_student(monkeypatch, "compare") == 2
    assert capsys.readouterr().err == "smaller-student: no stage has run yet; run `dvc repro` first\n"


@pytest.mark.parametrize("uri", ["./mlruns", "file:./mlruns", "http//host", "http://host:5000/#/models", "mlruns:5000"])
def test_retrain_rejects_an_invalid_tracking_uri_at_once(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uri: str
) -> None:
    write_text(files.params, preset_text(ROOT, "smoke"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    began = time.monotonic()
    assert smaller_student(monkeypatch, "retrain") == 2
    assert time.monotonic() - began < 2
    error = capsys.readouterr().err
    assert error.startswith(f"smaller-student: MLFLOW_TRACKING_URI {uri} ") and "; set it to http://HOST:PORT" in error


def test_preview_shows_the_data_and_writes_the_picture_only(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smaller_student(monkeypatch, "preset", "smoke") == 0
    before = set(files.root.rglob("*"))
    assert smaller_student(monkeypatch, "preview", "--no-time", "--out", "sheets/sheet.png") == 0
    assert set(files.root.rglob("*")) - before == {files.root / "sheets", files.root / "sheets/sheet.png"}
    shown = capsys.readouterr().out
    assert "24 images with their labels: sheets/sheet.png" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if len(line.split()) == 4}
    assert rows["train"] == ["96", "16", "6"] and rows["all"] == ["192", "28", "6"]  # 24 of them without labels


def test_preview_estimates_the_cost_of_a_closed_set(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = preset_text(ROOT, "smoke").replace("source: vehicles ", "source: csv ")
    rows = []
    for identity, camera, view in layouts.views(1, 6, 2, 3):
        path = f"{identity}-{camera}-{view}.png"
        layouts.picture(files.root / "data" / path, identity, camera, view)
        rows.append(f"{path},{identity},{camera},{('train', 'query', 'gallery')[view]}")
    write_text(files.root / "data" / "images.csv", "\n".join(["path,identity,camera,split", *rows]))
    write_text(files.params, own)
    assert smaller_student(monkeypatch, "preview", "--no-time") == 3
    assert "in training and in test" in capsys.readouterr().err
    write_text(files.params, own.replace("closed_set: false", "closed_set: true"))
    assert smaller_student(monkeypatch, "preview") == 0
    shown = capsys.readouterr().out
    assert "Expected on this machine" in shown and "Not measured" not in shown
    assert "all training identities are in the test set too (closed set)" in shown


def test_preview_ends_with_what_a_later_stage_would_refuse(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = preset_text(ROOT, "smoke").replace("source: vehicles ", "source: folder ")
    write_text(files.params, own)
    layouts.folder(files.root / "data", 3, 0)
    assert smaller_student(monkeypatch, "preview") == 3
    captured = capsys.readouterr()
    assert "Expected on this machine" not in captured.out and (files.root / "artifacts/preview.png").is_file()
    assert "smaller-student: `teacher.batch.identities` (4) must not exceed the 2 identities left" in captured.err
    assert captured.err.splitlines()[-1].startswith("the test set needs two identities, and it has 1")
    assert smaller_student(monkeypatch, "preview", "--out", "data") == 2
    assert "data cannot be written (Is a directory); choose another file with `--out`" in capsys.readouterr().err


def test_retrain_rejects_invalid_params_at_once(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(files.params, "seed: x\n")
    began = time.monotonic()
    assert smaller_student(monkeypatch, "retrain") == 2
    assert time.monotonic() - began < 2
    assert "`seed` must be a whole number, got the text 'x' (line 1)" in capsys.readouterr().err
