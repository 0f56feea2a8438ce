"""Tables as spreadsheets, pandas and other systems write them."""

import csv
import io
import unicodedata

import pandas as pd
import pytest

from pipeline.data.manifest import DataError, by_kind
from pipeline.data.sources import read_source
from pipeline.data.tables import boxes_of, path_of, read_table
from pipeline.labels import LOOK_ALIKE
from tests import layouts
from tests.data.test_sources import section

ROWS = [(f"car{n}/{camera}.png", f"car{n}", camera) for n in range(3) for camera in "ab"]
HEADER = ("path", "identity", "camera")


@pytest.fixture
def root(tmp_path):
    for number, (path, _, camera) in enumerate(ROWS):
        layouts.picture(tmp_path / path, number // 2, ord(camera))
    return tmp_path


def text_of(rows=ROWS, header=HEADER, **options):
    sink = io.StringIO(newline="")
    csv.writer(sink, **options).writerows([header, *rows])
    return sink.getvalue()


def read(root, content):
    (root / "images.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_source(section("csv"), root)


def labels(listing):
    return [(item.path, item.identity, item.camera) for item in listing.items]


@pytest.mark.parametrize(
    "content",
    [
        text_of(delimiter=";").encode("utf-8-sig"),
        text_of(delimiter="\t").encode("utf-16"),
        text_of(delimiter="|", lineterminator="\n").encode(),
        text_of(header=("Path", " IDENTITY ", "Camera"), quoting=csv.QUOTE_ALL).encode(),
        text_of([("./" + path, identity, camera) for path, identity, camera in ROWS]).encode(),
        text_of([(f" {path} ", f"{identity} ", f" {camera}") for path, identity, camera in ROWS]).encode(),
        text_of([(path.replace("/", "\\"), identity, camera) for path, identity, camera in ROWS]).encode(),
        (text_of() + ",,\r\n,,\r\n").encode(),
        ("sep=;\r\n" + text_of(delimiter=";")).encode("utf-8-sig"),
    ],
    ids=["excel", "excel unicode", "bars", "quoted", "dot", "spaces", "windows", "empty rows", "sep"],
)
def test_tables_of_many_programs_are_read_alike(root, content):
    assert labels(read(root, content)) == ROWS


def test_the_index_that_pandas_writes_is_ignored_and_named(root):
    frame = pd.DataFrame(ROWS, columns=list(HEADER)).assign(colour="red")
    listing = read(root, frame.to_csv())
    assert labels(listing) == ROWS
    assert list(by_kind(listing.warnings)) == ["columns are ignored (1): images.csv ('', 'colour')"]


def test_absolute_paths_below_the_root_are_read(root):
    listing = read(root, text_of([(str(root / path), identity, camera) for path, identity, camera in ROWS]))
    assert labels(listing) == ROWS


def test_a_path_without_a_file_stays_as_it_is_in_the_table(root):
    for written in ("car9\\a.png", "/elsewhere/a.png", "../a.png", "car9/a.png "):
        assert path_of(root, written) == written


def test_a_path_in_the_other_unicode_normal_form_is_found(tmp_path):
    on_disk = unicodedata.normalize("NFD", "Müller/ä.png")
    layouts.picture(tmp_path / on_disk, 1)
    assert path_of(tmp_path, unicodedata.normalize("NFC", on_disk)) == on_disk


def test_labels_are_trimmed_and_each_changed_label_is_counted_once(root):
    rows = [(path, f"{identity} " if identity == "car1" else identity, camera) for path, identity, camera in ROWS]
    listing = read(root, text_of(rows))
    assert labels(listing) == ROWS
    assert list(by_kind(listing.warnings)) == [
        "identity labels are trimmed or Unicode-normalised (1): car1/a.png ('car1 ' is read as 'car1')"
    ]


def test_labels_that_look_alike_are_named(root):
    names = ["007", "7", "CAR", "car", "12.0", "5"]
    rows = [(path, name, camera) for (path, _, camera), name in zip(ROWS, names, strict=True)]
    listing = read(root, text_of(rows))
    assert [item.identity for item in listing.items] == names
    kinds = list(by_kind(listing.warnings))
    assert kinds[0].startswith(f"identity labels {LOOK_ALIKE} (2): such as ")
    assert kinds[1].startswith("identity labels end in .0") and "'12.0'" in kinds[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,identity\nMüller.png,Müller\n".encode("cp1252"), "not UTF-8 text, perhaps Windows' cp1252; save it as"),
        (b"PK\x03\x04rest of a workbook", "is a spreadsheet, not CSV; save it as `CSV UTF-8`"),
    ],
)
def test_content_that_is_no_utf8_text_is_refused_with_the_remedy(root, content, message):
    with pytest.raises(DataError, match=message):
        read(root, content)


@pytest.mark.parametrize(
    ("header", "box"),
    [
        ("x,y,width,height", (3, 4, 8, 10)),
        ("X1;Y1;X2;Y2", (3, 4, 5, 6)),
        ("w,h,x,y", (5, 6, 8, 10)),
        ("xmin,ymin,xmax,ymax", (3, 4, 5, 6)),
    ],
)
def test_boxes_have_corners_or_sizes(tmp_path, header, box):
    delimiter = ";" if ";" in header else ","
    fields = delimiter.join(("3.4", "4", "5", "6.0"))
    text = f"path{delimiter}identity{delimiter}{header}\na.png{delimiter}1{delimiter}{fields}\n"
    (tmp_path / "images.csv").write_text(text + f"b.png{delimiter}1{delimiter * 4}\n")
    table = read_table(tmp_path / "images.csv")
    assert boxes_of(table) == [box, None]
    assert table.ignored == []
