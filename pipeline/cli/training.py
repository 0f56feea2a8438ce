"""Commands that run the pipeline, and show what it led to."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import Refusal, app, short, table
from pipeline.files import Files, write_text


@app.command()
def preset(
    name: Annotated[str | None, typer.Argument(help="A file in presets/, without its ending.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml with values of your own.")] = False,
    upgrade: Annotated[bool, typer.Option("--upgrade", help="Add new keys to params.yaml, keep its values.")] = False,
) -> None:
    """Write params.yaml with the values of a preset, or bring your own up to date."""
    from pipeline.stage import presets
    from pipeline.stage.params_file import load

    files = Files.here()
    if (name is None) is not upgrade:
        raise Refusal(f"name a preset ({', '.join(presets.names(files.root))}), or say `--upgrade`")
    if name is None:
        changes = presets.upgrade(files.root, files.params)
        for change in changes or ["has every key already"]:
            typer.echo(f"params.yaml: {change}")
        load(files.params)  # names what is still wrong, such as unknown keys
        return
    text = presets.preset_text(files.root, name)
    if files.params.exists() and not force and not presets.is_preset(files.root, files.params):
        raise Refusal("params.yaml holds changes of your own; `--force` overwrites them")
    write_text(files.params, text)
    typer.echo(f"params.yaml is preset {name} now; `dvc repro` runs it")


@app.command()
def retrain(
    force: Annotated[bool, typer.Option(help="Record an execution even if nothing changed.")] = False,
) -> None:
    """Run what changed, as a Prefect flow."""
    from pipeline.stage.params_file import load
    from pipeline.tracking.store import check_uri, tracking_uri

    files = Files.here()
    load(files.params)
    check_uri(tracking_uri(files))  # a wrong one is refused before Prefect is imported, which takes seconds
    from pipeline.flow.retrain import retrain as flow

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

    from pipeline.tracking import metrics

    files, console = Files.here(), Console()
    if run or last:
        from pipeline.stage.params_file import load
        from pipeline.tracking.comparison import executions
        from pipeline.tracking.store import connected

        params = load(files.params)
        with connected(files) as client:
            console.print(table(executions(client, params.tracking.experiment, run or [], last)))
        return
    rows = metrics.table(files)
    if not rows:
        raise Refusal("no stage has run yet; run `dvc repro` first")
    scored = metrics.protocol(files)
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

    from pipeline.protocols import PROTOCOLS
    from pipeline.retrieval import scoring
    from pipeline.retrieval.metrics import Ties
    from pipeline.retrieval.npz import read_archive
    from pipeline.retrieval.similarity import Cosine
    from pipeline.search.reranking import Reranked

    archive = read_archive(file, protocol)
    started = time.perf_counter()
    ties: Ties = "positives first" if optimistic else "negatives first"
    similarity = Reranked if rerank else Cosine
    found = scoring.evaluate(protocol, archive.query, archive.gallery, similarity=similarity, ties=ties)
    figures = scoring.figures(protocol, found) | {"seconds": round(time.perf_counter() - started, 3)}
    if as_json:
        typer.echo(json.dumps(figures))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"Protocol {protocol}: {PROTOCOLS[protocol].summary}", show_header=False)
    for name, value in figures.items():
        shown.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(shown)


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(help="A .zip or .tar file, compressed or not.")],
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
) -> None:
    """Unpack a data set's archive; nothing but regular files inside of the folder is ever written."""
    from pipeline.data.unpack import unpack as run

    typer.echo(f"{run(archive, target)} files in {target}")
