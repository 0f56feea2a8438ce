"""The report of a run: its files and its numbers."""

import re

import pytest
from PIL import Image

from pipeline.report.build import write_report
from pipeline.report.formatting import compact, percent
from pipeline.report.latency import benchmark_record
from tests.report.sample import results, timed


def plain(text):
    """Replace typographic signs by ASCII and collapse whitespace, as a browser does."""
    signs = {ord("\N{MINUS SIGN}"): "-", ord("\N{MULTIPLICATION SIGN}"): "x"}
    return " ".join(text.translate(signs).split())  # NO-BREAK SPACE too


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, results())
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return plain((folder / "index.html").read_text(encoding="utf-8"))


def test_the_report_consists_of_the_page_and_its_charts(folder, html):
    charts = {"capacity.png", "panel-01.png", "panel-02.png", "pareto.png", "training.png", "widths.png"}
    assert {path.name for path in folder.iterdir()} == {"index.html", *charts}
    assert set(re.findall(r'src="([^"]+)"', html)) == charts
    for name in charts:
        with Image.open(folder / name) as image:
            image.load()
            assert image.width > 800


def test_the_headline_shows_quality_cost_and_speed_beside_the_ratio_of_macs(html):
    header = html[: html.index("</header>")]
    for number in (
        "0.668 → 0.672",
        "+0.004",
        "-75.0 %",
        "-62.5 %",
        "4 M → 1.5 M",
        "80 M → 20 M",
        "2.00x",
        "ratio of MACs 4.00x",
    ):
        assert number in header
    assert "inconclusive" not in header


def test_every_stage_has_a_row_with_its_numbers(html):
    rows = dict(re.findall(r'<th scope="row">([^<]+)</th>(.*?)</tr>', html))
    cells = {name: re.findall(r"<td>([^<]*)</td>", row) for name, row in rows.items()}
    assert cells["Teacher"] == ["0.6680", "0.7900", "4 M", "80 M", "0.0 %", "0.0 %"]
    assert cells["Student, trained"] == cells["Student, after surgery"]
    assert cells["Student, trained"] == ["0.6721", "0.7900", "1.5 M", "20 M", "62.5 %", "75.0 %"]
    # rank-1 of teacher.onnx is measured, not copied: embeddings without noise rank every identity first
    assert cells["teacher.onnx"] == ["0.6680", "1.0000", "4 M", "80 M", "0.0 %", "0.0 %"]
    assert cells["model.onnx (student)"][0] == "0.6721"
    assert cells["batch 1, all threads"] == ["2.00x", "2.00 to 2.00", "4.00x", "50.0 %"]
    assert cells["teacher, batch 1, all threads"] == ["4.00", "5.00", "6.00", "20.0 %", "250"]
    assert cells["student"] == ["6.00 MiB", "unknown", "conv1"]
    assert cells["teacher"] == ["16.00 MiB", "80 MiB", "none"]


def test_headline_and_table_show_an_inconclusive_speed_up(tmp_path):
    timings = [timed("teacher", *[4.0] * 4, *[8.0] * 4), timed("student", *[2.0] * 8)]
    write_report(tmp_path, results(timings=timings, panels=1))
    text = plain((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "<strong>inconclusive</strong> 95 % interval 2.00 to 4.00, ratio of MACs 4.00x</dd>" in text
    assert "<td>inconclusive</td><td>2.00 to 4.00</td><td>4.00x</td><td></td>" in text
    assert (
        "On one image it is between 2.00x and 4.00x as fast (inconclusive: too few or too noisy measurements)" in text
    )


def test_a_student_of_another_architecture_is_compared_with_its_own_network_too(tmp_path):
    given = results()
    timings = [timed("teacher", *[3.0] * 8), timed("student", *[2.0] * 8), timed("uncompressed", *[5.0] * 8)]
    export = given.export.model_copy(update={"params_reduction_to_teacher": -0.25, "macs_reduction_to_teacher": None})
    benchmark = benchmark_record(timings, given.footprints, None, export.macs)
    teacher = given.teacher.model_copy(update={"macs": None})
    changes = {"timings": timings, "export": export, "benchmark": benchmark, "teacher": teacher}
    write_report(tmp_path, results(**changes, panels=1))
    header = plain((tmp_path / "index.html").read_text(encoding="utf-8").partition("</header>")[0])
    assert (
        "needs 20 M multiply-accumulates (MACs) and has 25.0 % more parameters. On one image it is 1.50x as" in header
    )
    assert "it needs 75.0 % fewer MACs and has 62.5 % fewer parameters; on one image it is 2.50x as fast." in header


def test_panels_have_a_text_alternative(html):
    alts = re.findall(r'src="panel-\d+.png" alt="([^"]+)"', html)
    assert len(alts) == 2
    for alt in alts:
        assert ", camera c0." in alt
        assert "teacher: correct at rank 1, 2 of the first 10, AP 1.00; student: correct at rank" in alt


def test_the_report_names_protocol_data_and_seed(html):
    assert "protocol market" in html
    assert "vehicles, 8 x 6 pixels" in html
    assert "a machine of four threads" in html
    assert "seed 3" in html


def test_equal_results_give_equal_bytes(folder, tmp_path):
    write_report(tmp_path, results())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_a_student_that_was_not_compressed_gets_no_chart_of_widths(tmp_path):
    (tmp_path / "widths.png").write_bytes(b"of an earlier run")
    write_report(tmp_path, results(sites=(), panels=1))
    assert not (tmp_path / "widths.png").exists()
    assert "widths.png" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_large_numbers_are_rounded_to_three_digits():
    texts = {
        3_760_000: "3.76 M",
        80_314_368: "80.3 M",
        7_800_000_000: "7.8 G",
        23_500: "23.5 k",
        999: "999",
        999_999: "1 M",
    }
    assert {number: plain(compact(number)) for number in texts} == texts
    assert plain(percent(0.6526)) == "65.3 %"
