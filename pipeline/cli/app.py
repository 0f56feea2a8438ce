"""The Typer application, and helpers that all commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    help="Compress image-retrieval networks: run the pipeline, track and publish results, and search images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass  # `run_guarded` reads the option from sys.argv


class Refusal(ValueError):
    """The command cannot be executed with these arguments or in this state."""

    exit_code = 2


def to_table(rows: list[dict[str, str]], title: str | None = None) -> "Table":
    """Build a rich table of rows with the same keys; text is left-aligned, numbers are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    for heading in rows[0]:
        is_text = heading in ("stage", "run", "start", "status", "commit")
        table.add_column(heading, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def short(path: Path) -> Path:
    """Return a path relative to the current directory, if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
