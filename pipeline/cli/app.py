"""What all commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    help="An image-retrieval network that shrinks while it learns.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEBUG = typer.Option("--debug", help="Show tracebacks.")


@app.callback()
def _options(debug: Annotated[bool, DEBUG] = False) -> None:  # read from sys.argv where errors are reported
    pass


class Refusal(ValueError):
    """The command cannot do what is asked; its text says why."""

    exit_code = 2


def table(rows: list[dict[str, str]], title: str | None = None) -> "Table":
    """Texts to the left, figures to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title=title, box=SIMPLE_HEAD, padding=0)
    for heading in rows[0]:
        text = heading in ("stage", "run", "began", "ended", "commit")
        shown.add_column(heading, justify="left" if text else "right")
    for row in rows:
        shown.add_row(*row.values())
    return shown


def short(path: Path) -> Path:
    """A path as people would write it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
