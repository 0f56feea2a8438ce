"""The page."""

from html.parser import HTMLParser

from pipeline.report.html import Picture, Section, Table, Tile, page

VOID = {"meta", "link", "img"}


class Reader(HTMLParser):
    """Collects elements and text, and insists that every element is closed in order."""

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


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def sample(word="word"):
    table = Table(word, ("", word), [(word, word), ("b", "2")])
    pictures = [Picture("a.png", word, word), Picture("b.png", word, word, wide=True)]
    return page(word, word, [Tile(word, word, word)], [Section(word, word, [table], pictures)], [word])


def test_elements_are_closed_and_the_outline_is_sound():
    reader = read(sample())
    for tag, count in {"html": 1, "title": 1, "h1": 1, "main": 1, "section": 1, "table": 1, "img": 2}.items():
        assert len(reader.all(tag)) == count
    assert reader.all("html")[0]["lang"] == "en"
    assert [th["scope"] for th in reader.all("th")] == ["col", "col", "row", "row"]
    assert len(reader.all("td")) == 2


def test_every_picture_has_a_text_for_those_who_do_not_see_it():
    assert all(image["alt"] == "word" for image in read(sample()).all("img"))


def test_what_scrolls_has_a_name_and_the_keyboard_reaches_it():
    boxes = [box for box in read(sample()).all("div") if box.get("class") == "scroll"]
    assert len(boxes) == 2  # the table and the wide picture
    assert all(box["tabindex"] == "0" and box["aria-label"] == "word" for box in boxes)


def test_markup_in_a_text_stays_text():
    nasty = "<script>alert(1)</script>\"' & $title"
    reader = read(sample(nasty))
    assert not reader.all("script")
    assert all(image["alt"] == nasty for image in reader.all("img"))
    assert "".join(reader.text).count(nasty) >= 10


def test_nothing_comes_from_the_network_and_nothing_runs():
    text = sample()
    assert "http" not in text
    reader = read(text)
    assert not reader.all("script")
    assert {image["src"] for image in reader.all("img")} == {"a.png", "b.png"}
    assert [link["href"] for link in reader.all("link")] == ["data:,"]


def test_phones_are_told_to_use_their_own_width():
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in read(sample()).all("meta")
