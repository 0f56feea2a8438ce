"""Commands for the exported files."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import app, short
from pipeline.files import Files
from pipeline.stage.run import log_to_stderr

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
    typer.echo(f"{len(built)} images in {short(out)}, embedded by {model.name}")


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
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for a free one.", min=0, max=65535)] = 8000,
    name: Annotated[list[str] | None, typer.Option(help="Host name that the page is called by, if not localhost.")] = (
        None
    ),
) -> None:
    """Search by a page in the browser."""
    import uvicorn

    from pipeline.search.index import open_index
    from pipeline.search.page import allowed_hosts, application, listen

    hosts = allowed_hosts(host, name or [])
    indexes = [open_index(folder) for folder in index]
    for folder in sorted({str(asked.gallery) for asked in indexes}):
        typer.echo(f"images of {folder} are shown")
    with listen(host, port) as listener, suppress(KeyboardInterrupt):
        typer.echo(f"http://{(name or [host])[0]}:{listener.getsockname()[1]}/")
        config = uvicorn.Config(application(indexes, hosts), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


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
    from pipeline.search.gallery_compatibility import compatible as run
    from pipeline.stage.params_file import load

    log_to_stderr("compatible")
    files = Files.here()
    found = run(files, load(files.params), old, new)
    shown = {"both old": found.old, "new queries, old gallery": found.mixed, "both new": found.new}
    for what, value in shown.items():
        typer.echo(f"{what:26} mAP {'-' if value is None else f'{value:.4f}'}")
    typer.echo(found.verdict)
