"""The page itself: plain HTML without scripts or anything from the network, so that it opens from a file anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template


@dataclass(frozen=True)
class Tile:
    """A headline number: what it is, the number, and what it compares with."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row, the others are numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG beside the page.

    Attributes:
        file: Its name.
        alt: What it shows, in words, for those who do not see it.
        caption: Text below it.
        wide: Whether it keeps a readable width on a phone and scrolls sideways instead.
    """

    file: str
    alt: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and what follows: text, tables, pictures."""

    title: str
    text: str
    tables: Sequence[Table] = field(default=())
    pictures: Sequence[Picture] = field(default=())


def page(title: str, summary: str, tiles: Sequence[Tile], sections: Sequence[Section], notes: Sequence[str]) -> str:
    """The whole page.

    Args:
        title: Of the window and the first heading.
        summary: The result in a sentence or two.
        tiles: Headline numbers.
        sections: What follows, in this order.
        notes: How the numbers were measured.

    Returns:
        HTML. Every text is escaped, so an identity called ``<b>`` is one.
    """
    return PAGE.substitute(
        title=escape(title),
        summary=escape(summary),
        style=STYLE,
        tiles="\n".join(map(_tile, tiles)),
        sections="\n".join(map(_section, sections)),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in notes),
    )


def _tile(tile: Tile) -> str:
    return f"<div><dt>{escape(tile.label)}</dt><dd><strong>{escape(tile.value)}</strong> {escape(tile.note)}</dd></div>"


def _section(section: Section) -> str:
    heading = f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>"
    return "\n".join(
        ["<section>", heading, *map(_table, section.tables), *map(_picture, section.pictures), "</section>"]
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in table.rows
    )
    content = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    caption = escape(table.caption)
    return f"<figure><figcaption>{caption}</figcaption>{_scrolling(content, caption)}</figure>"


def _picture(picture: Picture) -> str:
    image = f'<img src="{escape(picture.file)}" alt="{escape(picture.alt)}">'
    caption = escape(picture.caption)
    return f"<figure>{_scrolling(image, caption) if picture.wide else image}<figcaption>{caption}</figcaption></figure>"


def _scrolling(content: str, label: str) -> str:
    """A box that scrolls sideways where the window is narrow; it has a name and can be reached by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{content}</div>'


STYLE = """
:root { color-scheme: light; --ink: #1d2429; --soft: #56626a; --rule: #d9dee2; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 64rem; background: #fff; color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 3rem 0 .3rem; padding-top: .8rem; border-top: 1px solid var(--rule); font-size: 1.3rem; }
p { margin: .5rem 0 1rem; max-width: 44rem; }
header p { font-size: 1.1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .75rem; margin: 1.2rem 0; }
dl div { padding: .8rem 1rem; border-left: 4px solid var(--accent); background: #f3f6f8; }
dt, figcaption, footer { color: var(--soft); font-size: .92rem; }
dd { margin: 0; font-size: .92rem; }
dd strong { display: block; font-size: 1.45rem; line-height: 1.3; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); font-size: .92rem; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; max-width: 44rem; height: auto; }
figure .scroll img { max-width: none; min-width: 42rem; }
figcaption { margin: .4rem 0; max-width: 44rem; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
footer ul { padding-left: 1.2rem; }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$summary</p>
<dl>
$tiles
</dl>
</header>
<main>
$sections
</main>
<footer>
<h2>How to read it</h2>
<ul>
$notes
</ul>
</footer>
</body>
</html>
""")
