"""Commands for MLflow, the model registry and the environment."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import Refusal, app, short
from pipeline.files import Files
from pipeline.stage.run import log_to_stderr

if TYPE_CHECKING:
    from pipeline.registry.model_registry import Registry


@app.command()
def sync(
    again: Annotated[
        bool,
        typer.Option(
            help="Upload all local run records again, as after a backup of MLflow was restored; it keeps no duplicates."
        ),
    ] = False,
) -> None:
    """Upload runs to MLflow that could not be uploaded before."""
    from pipeline.flow.dvc_cli import StageError, changed_stages
    from pipeline.stage.params_file import load
    from pipeline.tracking.recorder import complete_last_execution
    from pipeline.tracking.sync import sync as run

    files = Files.here()
    try:
        complete_last_execution(files, load(files.params), changed_stages)
    except StageError as error:  # such as while another `dvc repro` starts
        typer.echo(f"cached stages of the last `dvc repro` are not recorded yet: {error}", err=True)
    uploaded, notices = run(files, again)
    for notice in notices:
        typer.echo(notice)
    if uploaded:
        typer.echo(f"executions uploaded: {uploaded}")
    elif not notices:
        typer.echo("MLflow is up to date")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Release folder, as stage `export` writes it.")] = Path(
        "artifacts/export"
    ),
) -> None:
    """Register a release in MLflow, and promote it to champion if it passes the promotion rule."""
    from pipeline.registry.publish import publish as run
    from pipeline.stage.params_file import load

    log_to_stderr("publish")
    files = Files.here()
    published = run(files, load(files.params), folder)
    if not published.decision.passed:
        raise Rejection(published.sentence)
    typer.echo(published.sentence)


def _registry() -> AbstractContextManager["Registry"]:
    from pipeline.registry.publish import open_registry
    from pipeline.stage.params_file import load

    files = Files.here()
    return open_registry(files, load(files.params))


@app.command(epilog="Example: smaller-student pull --alias best --out model")
def pull(
    out: Annotated[Path, typer.Option(help="Folder to create; it must not exist.")] = Path("model"),
    alias: Annotated[str, typer.Option(help="champion, challenger, best, or a version number.")] = "champion",
) -> None:
    """Download a model from the registry and verify it."""
    with _registry() as registry:
        version = registry.version_of(alias)
        registry.download(version, out)
    typer.echo(f"downloaded version {version} to {short(out)}; card.md there explains how to run it")


@app.command(epilog="Example: smaller-student rollback --to 3")
def rollback(
    to: Annotated[
        str | None,
        typer.Option(help="Version that passed the promotion rule; default: the previous champion.", metavar="VERSION"),
    ] = None,
) -> None:
    """Make an earlier version champion again."""
    with _registry() as registry:
        withdrawn, champion = registry.roll_back(to)
    typer.echo(f"version {champion} is champion again" + "".join(f", version {v} was withdrawn" for v in withdrawn))


@app.command()
def history() -> None:
    """List all champions with the time and reason of their promotion."""
    from rich.console import Console
    from rich.table import Table

    with _registry() as registry:
        if promotions := registry.lineage().promotions:
            table = Table()
            for heading in ("since (UTC)", "champion", "action", "reason"):
                table.add_column(heading, no_wrap=heading != "reason")
            for promotion in promotions:
                since = f"{promotion.when:%Y-%m-%d %H:%M}"
                table.add_row(since, promotion.version, promotion.action, promotion.reason)
            Console().print(table)
        registry.checked_lineage()  # raises if something was deleted or moved by hand
    if not promotions:
        raise Refusal("no version was promoted yet; run `smaller-student publish` first")


class Rejection(RuntimeError):
    """The challenger did not pass the promotion rule."""

    exit_code = 4


@app.command()
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Remove stale locks, end lost runs, and upload pending runs.")
    ] = False,
) -> None:
    """Check libraries, disk, params.yaml, locks, MLflow and Prefect."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pipeline.flow.doctor import examine

    failures = 0
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    for check in examine(Files.here()):
        prefix, failed = "", check.ok is False
        if fix and failed and check.fix is not None:
            try:
                check.fix()
                prefix, failed = "done: ", False
            except Exception as error:  # any library; the other checks still run
                prefix = f"failed ({error}): "
        failures += failed
        mark = {True: "[green]ok[/]", False: "[red]bad[/]", None: "[cyan]-[/]"}[check.ok]
        remedy = f"\n[dim]{escape(prefix + check.remedy)}[/]" if check.remedy else ""
        table.add_row(mark, check.name, escape(check.message) + remedy)
    Console().print(table)
    if failures:
        raise ChecksFailed(f"{failures} {'check' if failures == 1 else 'checks'} failed")


class ChecksFailed(RuntimeError):
    """At least one check of `doctor` failed."""
