"""Commands for what MLflow knows: executions, and the model in use."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import Refusal, app, short
from pipeline.files import Files
from pipeline.stage.run import log_to_stderr


@app.command()
def sync(
    again: Annotated[bool, typer.Option(help="Write everything again that is still recorded; nothing is doubled.")] = (
        False
    ),
) -> None:
    """Bring MLflow up to date with what was recorded while it was out of reach."""
    from pipeline.flow.dvc_cli import StageError, changes
    from pipeline.stage.params_file import load
    from pipeline.tracking.recorder import complete_last
    from pipeline.tracking.sync import sync as run

    files = Files.here()
    try:
        complete_last(files, load(files.params), changes)
    except StageError as error:  # such as in the first moments of another `dvc repro`
        typer.echo(f"stages that the last `dvc repro` did not have to run are not recorded yet: {error}", err=True)
    changed, notices = run(files, again)
    for notice in notices:
        typer.echo(notice)
    typer.echo(f"{changed} executions brought up to date" if changed else "MLflow is up to date")


RELEASE = typer.Argument(help="What stage `export` wrote.")


@app.command()
def publish(folder: Annotated[Path, RELEASE] = Path("artifacts/export")) -> None:
    """Register a release as challenger; it becomes champion if the gate lets it pass."""
    from pipeline.registry.publish import publish as run
    from pipeline.stage.params_file import load

    log_to_stderr("publish")
    files = Files.here()
    found = run(files, load(files.params), folder)
    if not found.decision.passed:
        raise Rejection(found.sentence)
    typer.echo(found.sentence)


@app.command()
def pull(
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")] = Path("model"),
    alias: Annotated[str, typer.Option(help="champion, challenger, best, or a version.")] = "champion",
) -> None:
    """Fetch a model from the registry, and check it."""
    from pipeline.registry.publish import registry
    from pipeline.stage.params_file import load

    files = Files.here()
    with registry(files, load(files.params)) as known:
        version = known.version_of(alias)
        known.download(version, out)
    typer.echo(f"version {version} in {short(out)}; its card.md tells how to run it")


@app.command()
def rollback(
    to: Annotated[
        str | None, typer.Option(help="A version that passed the gate, also where champions are gone.")
    ] = None,
) -> None:
    """Put the champion before the present one back in its place, or name another one."""
    from pipeline.registry.publish import registry
    from pipeline.stage.params_file import load

    files = Files.here()
    with registry(files, load(files.params)) as known:
        taken, champion = known.roll_back(to)
    typer.echo(f"version {champion} is champion again" + "".join(f", version {one} was taken back" for one in taken))


@app.command()
def history() -> None:
    """Show who was champion, since when and why."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.registry.publish import registry
    from pipeline.stage.params_file import load

    files = Files.here()
    with registry(files, load(files.params)) as known:
        if promotions := known.lineage().promotions:
            shown = Table()
            for heading in ("since (UTC)", "champion", "by", "why"):
                shown.add_column(heading, no_wrap=heading != "why")
            for one in promotions:
                shown.add_row(f"{one.when:%Y-%m-%d %H:%M}", one.version, one.action, one.reason)
            Console().print(shown)
        known.checked()  # refuses if something was deleted or moved since
    if not promotions:
        raise Refusal("nothing was promoted yet; run `smaller-student publish` first")


class Rejection(RuntimeError):
    """The gate refused a challenger."""

    exit_code = 4


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Remove what is certainly dead.")] = False,
) -> None:
    """Check what other tools do not show: libraries, disk, locks, MLflow, Prefect."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pipeline.flow.doctor import examine

    failed = 0
    shown = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    for check in examine(Files.here()):
        done, bad = "", check.ok is False
        if fix and bad and check.fix is not None:
            try:
                check.fix()
                done, bad = "done: ", False
            except Exception as error:  # of many libraries; the other checks still run
                done = f"not done ({error}): "
        failed += bad
        mark = {True: "[green]ok[/]", False: "[red]bad[/]", None: "[cyan]-[/]"}[check.ok]
        remedy = f"\n[dim]{escape(done + check.remedy)}[/]" if check.remedy else ""
        shown.add_row(mark, check.name, escape(check.message) + remedy)
    Console().print(shown)
    if failed:
        raise ChecksFailed(f"{failed} {'check' if failed == 1 else 'checks'} failed")


class ChecksFailed(RuntimeError):
    """The doctor found something."""
