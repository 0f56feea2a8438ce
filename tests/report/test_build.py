"""The report of a run."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmark.footprint import Footprint
from pipeline.benchmark.table import benchmark_record
from pipeline.inference.timing import Timing
from pipeline.records import ExportRecord, PrepareRecord, StudentRecord, SurgeryRecord, TeacherRecord
from pipeline.report.build import Evidence, write_report
from pipeline.report.numbers import count, percent

IDENTITIES, CAMERAS = 6, 3
LABELS = [(f"{identity:03d}", f"c{camera}") for identity in range(IDENTITIES) for camera in range(CAMERAS)]
SPLITS = ["query" if camera == "c0" else "gallery" for _, camera in LABELS]
WIDTHS = {"layer1.0.conv1": 32, "layer1.0.conv2": 32}


class Manifest:
    """Six identities in three cameras; the first camera's images are the queries."""

    items = tuple(SimpleNamespace(path=f"{identity}_{camera}.jpg") for identity, camera in LABELS)

    def rows(self, *splits):
        return np.array([row for row, split in enumerate(SPLITS) if split in splits])

    def identities(self, rows):
        return np.array([LABELS[row][0] for row in rows])

    def cameras(self, rows):
        return np.array([LABELS[row][1] for row in rows])


class Pictures:
    """A grey of its own for each image."""

    def batch(self, rows):
        return np.broadcast_to(np.uint8(10 * rows)[:, None, None, None], (len(rows), 8, 6, 3))


def embeddings(noise):
    """Rows: queries, then gallery; without noise every query finds its identity first."""
    rows = np.concatenate([Manifest().rows("query"), Manifest().rows("gallery")])
    identity = np.eye(IDENTITIES)[rows // CAMERAS]
    found = identity + noise * np.random.default_rng(0).normal(size=identity.shape)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def timed(file, *turns):
    return Timing(file, 1, 0, turns[0], 1.25 * turns[0], 1.5 * turns[0], 0.2, turns)


def evidence(**changes):
    scores = {"rank1": 0.79, "rank5": 0.9, "rank10": 0.95, "minp": 0.3, "queries": 6, "dropped": 0}
    cut = {"params_reduction": 0.625, "macs_reduction": 0.75}
    small = {"map": 0.6721, "params": 1_500_000, "macs": 20_000_000, **cut}
    teacher = TeacherRecord(map=0.668, params=4_000_000, macs=80_000_000, **scores)
    timings = [timed("teacher", *[4.0] * 8), timed("student", *[2.0] * 8)]
    footprints = {"teacher": Footprint(16 * 2**20, 80 * 2**20, ()), "student": Footprint(6 * 2**20, None, ("conv1",))}
    epochs = {"epoch": np.array([1.0, 2.0]), "validation_map": np.array([np.nan, 0.5]), "loss": np.array([2.0, 1.0])}
    reductions = {f"{what}_reduction": np.array([0.0, 0.75]) for what in ("macs", "params", "target")}
    values = {
        "data": "vehicles, 8 x 6 pixels",
        "machine": "a machine of four threads",
        "seed": 3,
        "protocol": "market",
        "prepare": PrepareRecord(
            images=18,
            identities=6,
            cameras=3,
            train=0,
            validation=0,
            query=6,
            gallery=12,
            quarantined=0,
            leaked=0,
            near_duplicates=0,
        ),
        "teacher": teacher,
        "student": StudentRecord(target=0.75, **small, **scores),
        "surgery": SurgeryRecord(max_abs_diff=0.0, widths={}, **small, **scores),
        "export": ExportRecord(
            map_allinone=0.679,
            map_teacher=0.668,
            min_cosine=1.0,
            bytes=6,
            bytes_allinone=7,
            bytes_teacher=16,
            int8_published=0,
            **small,
        ),
        "benchmark": benchmark_record(timings, footprints, teacher.macs, small["macs"]),
        "timings": timings,
        "footprints": footprints,
        "curves": {"teacher": epochs, "student": epochs | reductions},
        "widths": {"teacher": WIDTHS, "student": dict.fromkeys(WIDTHS, 8)},
        "sites": tuple(WIDTHS),
        "embeddings": {"teacher": embeddings(0.0), "student": embeddings(2.0)},
        "manifest": Manifest(),
        "images": Pictures(),
        "panels": 2,
    }
    return Evidence(**values | changes)


def plain(text):
    """Text with ASCII for signs that look like it."""
    return text.translate({0xA0: " ", ord("\N{MINUS SIGN}"): "-", ord("\N{MULTIPLICATION SIGN}"): "x"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, evidence())
    return folder


@pytest.fixture(scope="module")
def html(folder):
    return plain((folder / "index.html").read_text(encoding="utf-8"))


def test_the_page_and_its_pictures_are_all_there_is(folder, html):
    pictures = {"capacity.png", "panel-01.png", "panel-02.png", "pareto.png", "training.png", "widths.png"}
    assert {path.name for path in folder.iterdir()} == {"index.html", *pictures}
    assert set(re.findall(r'src="([^"]+)"', html)) == pictures
    for name in pictures:
        with Image.open(folder / name) as image:
            image.load()
            assert image.width > 800


def test_the_headline_tells_quality_cost_and_speed_beside_the_ideal(html):
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


def test_every_stage_has_a_row_with_its_own_numbers(html):
    rows = dict(re.findall(r'<th scope="row">([^<]+)</th>(.*?)</tr>', html))
    cells = {name: re.findall(r"<td>([^<]*)</td>", row) for name, row in rows.items()}
    assert cells["Teacher"] == ["0.6680", "0.7900", "4 M", "80 M", "0.0 %", "0.0 %"]
    assert cells["Student, trained"] == cells["Student, after surgery"]
    assert cells["Student, trained"] == ["0.6721", "0.7900", "1.5 M", "20 M", "62.5 %", "75.0 %"]
    # the noiseless embeddings find every identity first, so rank-1 of teacher.onnx was measured, not copied
    assert cells["teacher.onnx"] == ["0.6680", "1.0000", "4 M", "80 M", "0.0 %", "0.0 %"]
    assert cells["model.onnx (student)"][0] == "0.6721"
    assert cells["batch 1, all threads"] == ["2.00x", "2.00 to 2.00", "4.00x", "50.0 %"]
    assert cells["teacher, batch 1, all threads"] == ["4.00", "5.00", "6.00", "20.0 %", "250"]
    assert cells["student"] == ["6.00 MiB", "unknown", "conv1"]
    assert cells["teacher"] == ["16.00 MiB", "80 MiB", "none"]


def test_a_busy_machine_is_said_in_headline_and_row(tmp_path):
    timings = [timed("teacher", *[4.0] * 4, *[8.0] * 4), timed("student", *[2.0] * 8)]
    write_report(tmp_path, evidence(timings=timings, panels=1))
    text = plain((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "<strong>inconclusive</strong> 2.00 to 4.00, ratio of MACs 4.00x</dd>" in text
    assert "<td>inconclusive</td><td>2.00 to 4.00</td><td>4.00x</td><td></td>" in text
    assert "On one image it is between 2.00x and 4.00x as fast (the machine was too busy to tell)" in text


def test_panels_say_in_words_what_they_show(html):
    alts = re.findall(r'src="panel-\d+.png" alt="([^"]+)"', html)
    assert len(alts) == 2
    for alt in alts:
        assert ", camera c0." in alt
        assert "teacher: right at 1, 2 of the first 10, AP 1.00; student: right at" in alt


def test_the_report_names_protocol_data_and_seed(html):
    assert "protocol market" in html
    assert "vehicles, 8 x 6 pixels" in html
    assert "a machine of four threads" in html
    assert "seed 3" in html


def test_same_evidence_gives_the_same_bytes(folder, tmp_path):
    write_report(tmp_path, evidence())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_a_student_that_was_not_compressed_has_no_widths_to_show(tmp_path):
    (tmp_path / "widths.png").write_bytes(b"of an earlier run")
    write_report(tmp_path, evidence(sites=(), panels=1))
    assert not (tmp_path / "widths.png").exists()
    assert "widths.png" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_large_numbers_keep_three_digits():
    texts = {
        3_760_000: "3.76 M",
        80_314_368: "80.3 M",
        7_800_000_000: "7.8 G",
        23_500: "23.5 k",
        999: "999",
        999_999: "1 M",
    }
    assert {number: plain(count(number)) for number in texts} == texts
    assert plain(percent(0.6526)) == "65.3 %"
