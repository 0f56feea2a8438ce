"""The command `smaller-student`; what is heavy is imported by the command that needs it."""

import difflib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.files import Files, write_text
from pipeline.ops.stage import guarded, log_to_stderr

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


@app.command()
def preset(
    name: Annotated[str, typer.Argument(help="A file in presets/, without its ending.")],
    force: Annotated[bool, typer.Option(help="Overwrite a params.yaml that is no preset.")] = False,
) -> None:
    """Write params.yaml from presets/NAME.yaml."""
    from pipeline.ops.params import load

    files = Files.here()
    folder = files.root / "presets"
    presets = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f"; nearest: `{near[0]}`" if near else ""
        raise Refusal(f"preset `{name}` is unknown{hint}; there are: {', '.join(presets) or f'none in {folder}'}")
    text = presets[name].read_text(encoding="utf-8")
    if files.params.exists() and not force:
        present = files.params.read_text(encoding="utf-8")
        if all(present != path.read_text(encoding="utf-8") for path in presets.values()):
            raise Refusal("params.yaml holds changes of your own; `--force` overwrites them")
    load(presets[name])
    write_text(files.params, text)
    typer.echo(f"params.yaml is preset {name} now; `dvc repro` runs it")


@app.command()
def retrain(
    force: Annotated[bool, typer.Option(help="Record an execution even if nothing changed.")] = False,
) -> None:
    """Run what changed, as a Prefect flow."""
    from pipeline.ops.execution import retraining
    from pipeline.ops.params import load

    files = Files.here()
    load(files.params)
    with retraining(files):  # taken here already: importing Prefect takes seconds, and who is refused hears it at once
        from pipeline.ops.flow import retrain as flow

        state = flow(force=force, return_state=True)
    if not state.is_completed():
        raise RuntimeError(state.message)
    typer.echo(f"{state.name}: {state.message}")


@app.command()
def compare(
    run: Annotated[list[str] | None, typer.Argument(help="Run ids of executions in MLflow, or their beginnings.")] = (
        None
    ),
    last: Annotated[int, typer.Option(help="Show so many executions, the latest ones.", min=0)] = 0,
) -> None:
    """Show what each stage of this checkout led to; or executions side by side, as MLflow knows them."""
    from rich.console import Console

    from pipeline.ops.figures import protocol, table

    files, console = Files.here(), Console()
    if run or last:
        from pipeline.ops.comparison import executions
        from pipeline.ops.params import load
        from pipeline.ops.publishing import registry

        params = load(files.params)
        with registry(files, params) as known:
            console.print(_table(executions(known.client, params.tracking.experiment, run or [], last)))
        return
    rows = table(files)
    if not rows:
        raise Refusal("no stage has run yet; run `dvc repro` first")
    scored = protocol(files)
    console.print(_table(rows, f"{f'Protocol {scored}, batch' if scored else 'Batch'} 1, all threads"))
    for what, path in (("report", files.report / "index.html"), ("ONNX", files.artifacts("export") / "model.onnx")):
        if path.is_file():
            console.print(f"{what}: {_short(path)}", highlight=False, soft_wrap=True)


@app.command()
def sync(
    again: Annotated[bool, typer.Option(help="Tell everything again that is still known; nothing is doubled.")] = False,
) -> None:
    """Tell MLflow what it missed while it was away."""
    from pipeline.ops.params import load
    from pipeline.ops.sync import sync as run

    files = Files.here()
    executions, events = run(files, load(files.params), again)
    typer.echo(f"told {events} events of {executions} executions" if events else "MLflow knows everything")


RELEASE = typer.Argument(help="What stage `export` wrote.")


@app.command()
def publish(folder: Annotated[Path, RELEASE] = Path("artifacts/export")) -> None:
    """Register a release as challenger; it becomes champion if the gate lets it pass."""
    from pipeline.ops.params import load
    from pipeline.ops.publishing import publish as run

    log_to_stderr("publish")
    files = Files.here()
    found = run(files, load(files.params), folder)
    if not found.verdict.passed:
        raise Rejection(f"version {found.version} stays challenger: {found.verdict.reason}")
    typer.echo(f"version {found.version} is champion: {found.verdict.reason}")


@app.command()
def pull(
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")] = Path("model"),
    alias: Annotated[str, typer.Option(help="champion, challenger, best, or a version.")] = "champion",
) -> None:
    """Fetch a model from the registry, and check it."""
    from pipeline.ops.params import load
    from pipeline.ops.publishing import registry

    files = Files.here()
    with registry(files, load(files.params)) as known:
        version = known.version_of(alias)
        known.download(version, out)
    typer.echo(f"version {version} in {_short(out)}; its card.md tells how to run it")


@app.command()
def rollback() -> None:
    """Put the champion before the present one back in its place."""
    from pipeline.ops.params import load
    from pipeline.ops.publishing import registry

    files = Files.here()
    with registry(files, load(files.params)) as known:
        old, new = known.roll_back()
    typer.echo(f"version {new} is champion again, version {old} was taken back")


@app.command()
def history() -> None:
    """Show who was champion, since when and why."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.ops.params import load
    from pipeline.ops.publishing import registry

    files = Files.here()
    with registry(files, load(files.params)) as known:
        lines = known.ledger()
    if not lines:
        raise Refusal("nothing was promoted yet; run `smaller-student publish` first")
    shown = Table()
    for heading in ("since (UTC)", "champion", "by", "why"):
        shown.add_column(heading, no_wrap=heading != "why")
    for line in lines:
        shown.add_row(f"{line.when:%Y-%m-%d %H:%M}", line.version, line.action, line.reason)
    Console().print(shown)


@app.command()
def evidence(
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of data, teacher and students.")] = None,
    target: Annotated[list[float] | None, typer.Option(help="Reductions to ask for.")] = None,
) -> None:
    """Compare all methods at all targets (hours); run it again to go on after an interruption."""
    from pipeline.ops.evidence import SEEDS, TARGETS, gather, grid

    path = gather(Files.here(), list(grid(seed or SEEDS, target or TARGETS)))
    typer.echo(f"evidence: {_short(path)}")


@app.command()
def evaluate(
    file: Annotated[
        Path,
        typer.Argument(help="A .npz file: query, query_ids, query_cameras; gallery, gallery_ids, gallery_cameras."),
    ],
    protocol: Annotated[str, typer.Option(help="How to score, such as market or loo.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
    rerank: Annotated[bool, typer.Option(help="Rank again by k-reciprocal neighbours.")] = False,
    optimistic: Annotated[bool, typer.Option(help="Let positives come first among equally similar images.")] = False,
) -> None:
    """Score embeddings of any origin."""
    import time

    from pipeline.ops.archive import read_archive
    from pipeline.retrieval import protocols
    from pipeline.retrieval.metrics import Ties

    archive = read_archive(file, protocol)
    started = time.perf_counter()
    ties: Ties = "positives first" if optimistic else "negatives first"
    found = protocols.evaluate(protocol, archive.query, archive.gallery, rerank=rerank, ties=ties)
    figures = protocols.figures(protocol, found) | {"seconds": round(time.perf_counter() - started, 3)}
    if as_json:
        typer.echo(json.dumps(figures))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Protocol {protocol}: {protocols.PROTOCOLS[protocol].summary}", show_header=False)
    for name, value in figures.items():
        shown.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(shown)


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(help="A .zip or .tar file, compressed or not.")],
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
) -> None:
    """Unpack a data set's archive; nothing but regular files inside of the folder is ever written."""
    from pipeline.ops.unpack import unpack as run

    typer.echo(f"{run(archive, target)} files in {target}")


MODEL = typer.Option(help="ONNX file of a release.")


@app.command()
def index(
    gallery: Annotated[Path, typer.Option(help="Folder of images, searched in depth.")],
    out: Annotated[Path, typer.Option(help="Folder of the index.")],
    model: Annotated[Path, MODEL] = Path("artifacts/export/model.onnx"),
) -> None:
    """Embed a gallery, so that it can be searched."""
    from pipeline.search.index import build, check_place

    log_to_stderr("index")
    check_place(out)
    built = build(model, gallery)
    built.save(out, model)
    typer.echo(f"{len(built)} images in {_short(out)}, embedded by {model.name}")


@app.command()
def search(
    index: Annotated[Path, typer.Option(help="What `smaller-student index` wrote.")],
    query: Annotated[Path, typer.Option(help="Image to ask for.")],
    top: Annotated[int, typer.Option(help="How many images to find.", min=1)] = 10,
    out: Annotated[Path | None, typer.Option(help="PNG file to draw query and finds in.")] = None,
    model: Annotated[Path | None, typer.Option(help="The index's model, where it lies elsewhere now.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print finds as JSON.")] = False,
) -> None:
    """Find the images of a gallery that are most like one."""
    from dataclasses import asdict

    from pipeline.search.index import open_index

    asked = open_index(index, model)
    picture = asked.query(query)
    hits = asked.search(asked.model.embed(picture), top)
    if out is not None:
        from pipeline.report.panels import save_finds

        save_finds(out, asked.model.name, picture[0], [asked.query(asked.path(hit.place))[0] for hit in hits])
    if as_json:
        typer.echo(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False))
        return
    for hit in hits:
        typer.echo(f"{hit.similarity:.4f}  {hit.path}")


@app.command()
def serve(
    index: Annotated[list[Path], typer.Option(help="What `smaller-student index` wrote; each is a column.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is reached from other machines.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[list[str] | None, typer.Option(help="Host name that the page is called by, if not localhost.")] = (
        None
    ),
) -> None:
    """Search by a page in the browser."""
    import uvicorn

    from pipeline.search.index import open_index
    from pipeline.search.page import application, callable_by

    hosts = callable_by(host, name or [])
    indexes = [open_index(folder) for folder in index]
    for folder in sorted({str(asked.gallery) for asked in indexes}):
        typer.echo(f"images of {folder} are shown")
    typer.echo(f"http://{(name or [host])[0]}:{port}/")
    uvicorn.run(application(indexes, hosts), host=host, port=port, log_level="warning", access_log=False)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="What stage `export` wrote, or what was downloaded.")] = Path(
        "artifacts/export"
    ),
) -> None:
    """Hash all files of a release, and run its models on the picture that goes with them."""
    from pipeline.export.sample import check_release

    for name, close in check_release(folder).items():
        typer.echo(f"{name}: SHA-256 as written, cosine {close:.6f} with the embedding that was written")


@app.command()
def compatible(
    old: Annotated[Path, typer.Argument(help="ONNX file of an older release, whose gallery there is.")],
    new: Annotated[Path, typer.Option(help="ONNX file that shall take its place.")] = Path(
        "artifacts/export/model.onnx"
    ),
) -> None:
    """Say whether a gallery must be embedded anew, by this checkout's test set."""
    from pipeline.ops.compatible import compatible as run

    log_to_stderr("compatible")
    found = run(Files.here(), old, new)
    shown = {"both old": found.old, "new queries, old gallery": found.mixed, "both new": found.new}
    for what, value in shown.items():
        typer.echo(f"{what:26} mAP {'-' if value is None else f'{value:.4f}'}")
    typer.echo(found.verdict)


class Rejection(RuntimeError):
    """The gate refused a challenger."""

    exit_code = 4


class Refusal(ValueError):
    """The command cannot do what is asked; its text says why."""

    exit_code = 2


def _table(rows: list[dict[str, str]], title: str | None = None) -> "Table":
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


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> None:
    """Entry point of `smaller-student`."""
    sys.exit(guarded("smaller-student", app))
