"""Commands that run the pipeline, and show what it led to."""

import difflib
import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import Refusal, app, short, table
from pipeline.files import Files, write_text


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
    from pipeline.ops.locks import retraining
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

    from pipeline.ops import figures

    files, console = Files.here(), Console()
    if run or last:
        from pipeline.ops.comparison import executions
        from pipeline.ops.params import load
        from pipeline.ops.publishing import registry

        params = load(files.params)
        with registry(files, params) as known:
            console.print(table(executions(known.client, params.tracking.experiment, run or [], last)))
        return
    rows = figures.table(files)
    if not rows:
        raise Refusal("no stage has run yet; run `dvc repro` first")
    scored = figures.protocol(files)
    console.print(table(rows, f"{f'Protocol {scored}, batch' if scored else 'Batch'} 1, all threads"))
    for what, path in (("report", files.report / "index.html"), ("ONNX", files.artifacts("export") / "model.onnx")):
        if path.is_file():
            console.print(f"{what}: {short(path)}", highlight=False, soft_wrap=True)


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
