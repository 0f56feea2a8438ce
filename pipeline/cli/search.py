"""Commands that use exported models: index, search, serve, verify, compatible."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.app import Refusal, app, short
from pipeline.files import Files
from pipeline.stage.run import log_to_stderr


@app.command(epilog="Example: smaller-student index --gallery photos --out index")
def index(
    gallery: Annotated[Path, typer.Option(help="Folder of images, including its subfolders.")],
    out: Annotated[Path, typer.Option(help="Folder for the index.")],
    model: Annotated[Path, typer.Option(help="ONNX file of a release.")] = Path("artifacts/export/model.onnx"),
) -> None:
    """Embed the images of a gallery for searching."""
    from pipeline.search.index import build, check_place

    log_to_stderr("index")
    check_place(out)
    built = build(model, gallery)
    built.save(out, model)
    typer.echo(f"{len(built)} images in {short(out)}, embedded by {model.name}")


@app.command(epilog="Example: smaller-student search --index index --query car.jpg --top 5 --out hits.png")
def search(
    index: Annotated[Path, typer.Option(help="Folder written by `smaller-student index`.")],
    query: Annotated[Path, typer.Option(help="Query image.")],
    top: Annotated[int, typer.Option(help="Number of images to find.", min=1)] = 10,
    out: Annotated[Path | None, typer.Option(help="PNG file for a picture of the query and its hits.")] = None,
    model: Annotated[Path | None, typer.Option(help="ONNX file of the index, if it was moved.")] = None,
    gallery: Annotated[Path | None, typer.Option(help="Folder of the images, if it was moved.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the hits as JSON.")] = False,
) -> None:
    """Find the gallery images most similar to a query image."""
    from dataclasses import asdict

    from pipeline.search.index import open_index

    opened = open_index(index, model, gallery)
    if gallery is not None or out is not None:
        opened.check_gallery()
    picture = opened.query(query)
    hits = opened.search(opened.model.embed(picture), top)
    paths, problems = opened.intact(hits)
    if out is not None:
        from pipeline.report.panels import save_finds

        if not paths:
            raise Refusal(f"no hit can be shown in {short(out)}: {problems[0]}")
        save_finds(out, opened.model.name, picture[0], [opened.query(path)[0] for path in paths])
    if as_json:
        typer.echo(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False))
    else:
        for hit in hits:
            typer.echo(f"{hit.similarity:.4f}  {hit.path}")
    if problems:
        typer.echo(f"{len(problems)} of {len(hits)} hits can no longer be shown: {problems[0]}", err=True)


@app.command(epilog="Example: smaller-student serve --index index --port 8000")
def serve(
    index: Annotated[
        list[Path], typer.Option(help="Folder written by `smaller-student index`; repeat it to compare models.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        list[str] | None, typer.Option(help="Host name in the page's address, if not localhost; can be repeated.")
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help="ONNX file, if it was moved: one for all indexes, or one for each, in order."),
    ] = None,
    gallery: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the images, if it was moved: one for all indexes, or one for each, in order."),
    ] = None,
) -> None:
    """Serve a web page for searching by image."""
    import uvicorn

    from pipeline.search.index import open_index
    from pipeline.search.page import allowed_hosts, application, listen

    hosts = allowed_hosts(host, name or [])
    models, galleries = _for_each(model, "--model", len(index)), _for_each(gallery, "--gallery", len(index))
    indexes = [open_index(*one) for one in zip(index, models, galleries, strict=True)]
    for opened in indexes:
        opened.check_gallery()
    for folder in sorted({str(opened.gallery) for opened in indexes}):
        typer.echo(f"serving the images of {folder}")
    with listen(host, port) as listener, suppress(KeyboardInterrupt):
        typer.echo(f"http://{(name or [host])[0]}:{listener.getsockname()[1]}/")
        config = uvicorn.Config(application(indexes, hosts), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


def _for_each(paths: list[Path] | None, option: str, indexes: int) -> list[Path] | list[None]:
    """Return a path for each index; a single one is that of all.

    Raises:
        Refusal: If there are others than none, one, or one for each.
    """
    if not paths:
        return [None] * indexes
    if len(paths) not in (1, indexes):
        raise Refusal(
            f"{len(paths)} `{option}` for {indexes} `--index`: give one, or one for each index in their order"
        )
    return paths * indexes if len(paths) == 1 else paths


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(help="Release folder, as stage `export` or `smaller-student pull` writes it.")
    ] = Path("artifacts/export"),
) -> None:
    """Check the hashes of a release, and the embeddings of its sample picture."""
    from pipeline.export.sample import check_release

    for name, cosine in check_release(folder).items():
        typer.echo(f"{name}: SHA-256 matches, cosine with the expected embedding {cosine:.6f}")


@app.command(epilog="Example: smaller-student compatible old/model.onnx")
def compatible(
    old: Annotated[Path, typer.Argument(help="ONNX file that embedded the present gallery.")],
    new: Annotated[Path, typer.Option(help="ONNX file to replace it.")] = Path("artifacts/export/model.onnx"),
) -> None:
    """Test on this checkout's test set whether a new model needs a new index of the gallery."""
    from pipeline.search.gallery_compatibility import compatible as run
    from pipeline.stage.params_file import load

    log_to_stderr("compatible")
    files = Files.here()
    result = run(files, load(files.params), old, new)
    scores = {"both old": result.old, "new queries, old gallery": result.mixed, "both new": result.new}
    for models, value in scores.items():
        typer.echo(f"{models:26} mAP {'-' if value is None else f'{value:.4f}'}")
    typer.echo(result.verdict)
