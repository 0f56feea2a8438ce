"""Commands that configure and run the pipeline, and show its results."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import Refusal, app, short, to_table
from pipeline.files import Files, write_text


@app.command(epilog="Example: smaller-student preset market1501-r50")
def preset(
    name: Annotated[str | None, typer.Argument(help="Name of a file in presets/, without .yaml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a params.yaml that you have edited.")] = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Add missing keys to params.yaml and rename old ones; keep its values.")
    ] = False,
) -> None:
    """Write params.yaml from a preset, or update an existing one."""
    from pipeline.stage import presets
    from pipeline.stage.params_file import load

    files = Files.here()
    if (name is None) is not upgrade:
        raise Refusal(f"name a preset ({', '.join(presets.names(files.root))}), or use `--upgrade`")
    if name is None:
        changes = presets.upgrade(files.root, files.params)
        for change in changes or ["no key is missing"]:
            typer.echo(f"params.yaml: {change}")
        load(files.params)  # reports remaining errors, such as unknown keys
        return
    text = presets.preset_text(files.root, name)
    if files.params.exists() and not force and not presets.is_preset(files.root, files.params):
        raise Refusal("params.yaml has been edited; `--force` overwrites it")
    write_text(files.params, text)
    typer.echo(f"wrote preset {name} to params.yaml; `dvc repro` runs it")


@app.command()
def retrain(
    force: Annotated[bool, typer.Option(help="Track an execution in MLflow even if nothing changed.")] = False,
) -> None:
    """Fetch new data, run the stages that changed, and publish the result."""
    from pipeline.stage.params_file import load
    from pipeline.tracking.store import check_uri, tracking_uri

    files = Files.here()
    load(files.params)
    check_uri(tracking_uri(files))  # before Prefect is imported, which takes seconds
    from pipeline.flow.retrain import retrain as flow
    from pipeline.flow.server import check_server

    check_server()
    state = flow(force=force, return_state=True)
    if not state.is_completed():
        raise RuntimeError(state.message)
    typer.echo(f"{state.name}: {state.message}")


@app.command(epilog="Example: smaller-student compare --last 5")
def compare(
    run: Annotated[
        list[str] | None, typer.Argument(help="MLflow run ids of executions to compare; prefixes suffice.")
    ] = None,
    last: Annotated[int, typer.Option(help="Compare the latest executions; 0: show this checkout.", min=0)] = 0,
) -> None:
    """Show the results of this checkout's stages, or compare executions in MLflow."""
    from rich.console import Console

    from pipeline.tracking import metrics

    files, console = Files.here(), Console()
    if run or last:
        from pipeline.stage.params_file import load
        from pipeline.tracking.comparison import executions_table
        from pipeline.tracking.store import connect

        params = load(files.params)
        with connect(files) as client:
            console.print(to_table(executions_table(client, params.tracking.experiment, run or [], last)))
        return
    rows = metrics.result_table(files)
    if not rows:
        raise Refusal("no stage has run yet; run `dvc repro` first")
    protocol = metrics.last_conditions(files)
    title = f"{f'Protocol {protocol}, batch' if protocol else 'Batch'} {metrics.timed_batch(files)}, all threads"
    console.print(to_table(rows, title))
    if note := metrics.teacher_note(files):
        console.print(note, highlight=False)
    for label, path in (("report", files.report / "index.html"), ("ONNX", files.artifacts("export") / "model.onnx")):
        if path.is_file():
            console.print(f"{label}: {short(path)}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: smaller-student evaluate embeddings.npz --protocol market --rerank")
def evaluate(
    file: Annotated[
        Path,
        typer.Argument(
            help=".npz file: query, gallery (N, D); query_ids, query_cameras, gallery_ids, gallery_cameras (N,)."
        ),
    ],
    protocol: Annotated[str, typer.Option(help="Evaluation protocol, such as market or loo.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    rerank: Annotated[bool, typer.Option(help="Apply k-reciprocal re-ranking.")] = False,
    optimistic: Annotated[
        bool, typer.Option(help="Rank positives first among equally similar images; default: negatives first.")
    ] = False,
) -> None:
    """Compute retrieval metrics of embeddings from any model."""
    import time

    from pipeline.protocols import PROTOCOLS
    from pipeline.retrieval import scoring
    from pipeline.retrieval.metrics import Ties
    from pipeline.retrieval.npz import read_archive
    from pipeline.retrieval.similarity import Cosine
    from pipeline.search.reranking import Reranked
    from pipeline.stage.run import log_to_stderr

    log_to_stderr("evaluate")
    archive = read_archive(file, protocol)
    started = time.perf_counter()
    ties: Ties = "positives first" if optimistic else "negatives first"
    similarity = Reranked if rerank else Cosine
    result = scoring.evaluate(protocol, archive.query, archive.gallery, similarity=similarity, ties=ties)
    values = scoring.figures(protocol, result) | {"seconds": round(time.perf_counter() - started, 3)}
    if as_json:
        typer.echo(json.dumps(values))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Protocol {protocol}: {PROTOCOLS[protocol].summary}", show_header=False)
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


@app.command()
def unpack(
    archive: Annotated[Path, typer.Argument(help=".zip or .tar file, compressed or not.")],
    target: Annotated[Path, typer.Argument(help="Folder to create; it must not exist.")],
) -> None:
    """Extract the regular files of a data set archive, or nothing if any entry is unsafe."""
    from pipeline.data.unpack import unpack as run

    typer.echo(f"extracted {run(archive, target)} files to {target}")
