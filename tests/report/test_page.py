"""The HTML of the report as a browser parses it."""

from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from pipeline.inference.footprint import Footprint
from pipeline.report.build import write_report
from pipeline.report.render import render
from tests.report.sample import Manifest, results

VOID = {"meta", "link", "img"}
MARKUP = "<script>alert(1)</script>\"' & {{ title }}"


class Reader(HTMLParser):
    """Collects elements and text, and asserts that every element is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(folder):
    reader = Reader()
    reader.feed((folder / "index.html").read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_report(folder, results())
    return folder


@pytest.fixture(scope="module")
def reader(folder):
    return read(folder)


def test_elements_are_closed_and_the_outline_is_complete(reader):
    for tag, count in {"html": 1, "title": 1, "h1": 1, "main": 1, "section": 7, "h2": 8, "table": 4, "img": 6}.items():
        assert len(reader.all(tag)) == count
    assert reader.all("html")[0]["lang"] == "en"
    rows = {"col": 0, "row": 0}
    for th in reader.all("th"):
        rows[th["scope"]] += 1
    assert rows["row"] == len(reader.all("tr")) - len(reader.all("thead")) == 5 + 1 + 2 + 2
    assert rows["col"] == 7 + 5 + 6 + 4


def test_every_chart_has_a_text_alternative(reader):
    alts = {image["src"]: image["alt"] for image in reader.all("img")}
    assert alts["pareto.png"].replace("\N{NO-BREAK SPACE}", " ").startswith("teacher: mAP 0.668 at 80 M MACs; student")
    assert alts["widths.png"] == "Channels kept: layer1.0.conv1 8 of 32, layer1.0.conv2 8 of 32"
    assert all(alt.strip() for alt in alts.values())


def test_scrolling_boxes_have_a_label_and_can_be_reached_by_keyboard(reader):
    boxes = [box for box in reader.all("div") if box.get("class") == "scroll"]
    assert len(boxes) == 4 + 2  # the tables and the panels
    text = " ".join(reader.text)
    assert all(
        (box["role"], box["tabindex"]) == ("region", "0") and f"{box['aria-label']}" in text and box["aria-label"]
        for box in boxes
    )


def test_markup_in_labels_is_escaped(tmp_path):
    names = {
        "data": MARKUP,
        "machine": MARKUP,
        "manifest": Manifest(suffix=MARKUP),
        "widths": {"uncompressed": {MARKUP: 32}, "student": {MARKUP: 8}},
        "sites": (MARKUP,),
        "footprints": {MARKUP: Footprint(1, None, (MARKUP, MARKUP))},
    }
    write_report(tmp_path, results(**names))
    reader = read(tmp_path)
    assert not reader.all("script")
    alts = {image["src"]: image["alt"] for image in reader.all("img")}
    assert alts["widths.png"] == f"Channels kept: {MARKUP} 8 of 32"
    assert f", camera c0{MARKUP}." in alts["panel-01.png"]
    assert sum(MARKUP in box.get("aria-label", "") for box in reader.all("div")) == 2  # the panels
    assert "".join(reader.text).count(MARKUP) == 9  # data, machine, file, two layers, identity and camera of two panels


def test_the_page_loads_nothing_from_the_network_and_has_no_scripts(folder, reader):
    assert "http" not in (folder / "index.html").read_text(encoding="utf-8")
    assert not reader.all("script")
    assert {image["src"] for image in reader.all("img")} == {path.name for path in folder.glob("*.png")}
    assert [link["href"] for link in reader.all("link")] == ["data:,"]


def test_the_viewport_is_set_for_phones(reader):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in reader.all("meta")


def test_a_missing_template_variable_is_an_error():
    with pytest.raises(UndefinedError, match="'run' is undefined"):
        render("report.html.jinja")
