"""The command `preview`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import Refusal, app, short, to_table
from pipeline.files import Files
from pipeline.stage.run import log_to_stderr

if TYPE_CHECKING:
    from pipeline.config import Params
    from pipeline.preview.survey import Survey

SHEET = Path("artifacts/preview.png")
GIB = 2**30


@app.command(epilog="Example: smaller-student preview --out sheet.png")
def preview(
    out: Annotated[Path, typer.Option(help="PNG file for 24 images with their labels.")] = SHEET,
    timed: Annotated[
        bool, typer.Option("--time/--no-time", help="Take a few training steps, to estimate time and memory.")
    ] = True,
) -> None:
    """Show what would be trained on and what it would cost, before anything runs; writes the PNG only."""
    from pipeline.data.manifest import DataError
    from pipeline.preview.sheet import write_sheet
    from pipeline.preview.survey import raw_images, survey
    from pipeline.runtime import limit_threads
    from pipeline.stage.params_file import load

    log_to_stderr("preview")
    files = Files.here()
    params = load(files.params)
    limit_threads(params.runtime.threads)
    began = time.monotonic()
    with raw_images(files, params) as root:
        rendering = time.monotonic() - began
        found = survey(params, root)
        _show_data(params, found)
        if found.decoded:
            height, width = params.data.image_size
            try:
                shown = write_sheet(out.resolve(), found.decoded, root, (height, width))
            except OSError as error:
                reason = f"{out} cannot be written ({error.strerror or error}); choose another file with `--out`"
                raise Refusal(reason) from error
            typer.echo(f"{shown} images with their labels: {short(out.resolve())}")
        if timed and not found.problems and not found.missing:
            _show_cost(params, found, root, rendering)
    problems = list(found.problems)
    if found.missing:
        problems.insert(0, f"{len(found.missing)} listed files are missing, such as {found.missing[0]}")
    if problems:
        raise DataError("\n".join(problems))


def _show_data(params: "Params", found: "Survey") -> None:
    """Print the counts, the warnings by kind, and the notes."""
    from rich.console import Console

    from pipeline.data.manifest import by_kind
    from pipeline.protocols import PROTOCOLS

    protocol = params.data.protocol
    if found.counts:
        typer.echo(f"{params.data.source}, protocol {protocol}: {PROTOCOLS[protocol].summary}")
        Console().print(to_table(found.counts))
    sampled = len(found.decoded) + len(found.unreadable)
    typer.echo(
        f"{sampled:,} of {len(found.items):,} images, spread over the identities, were tried: {len(found.unreadable)} "
        "cannot be decoded. Stage `prepare` decodes all, and searches for duplicates and leaks."
    )
    for path, reason in found.unreadable[:3]:
        typer.echo(f"  cannot be decoded: {path}: {reason}")
    if found.warnings:
        typer.echo(f"{len(found.warnings):,} warnings (of the whole listing, and of the decoded images):")
    for line in by_kind(found.warnings):
        typer.echo(f"  {line}")
    for note in found.notes:
        typer.echo(f"Note: {note}")


def _show_cost(params: "Params", found: "Survey", root: Path, rendering: float) -> None:
    """Print the expected time and memory of the stages that take most of both; rendering took `rendering` seconds."""
    import psutil
    from rich.console import Console

    from pipeline.data.manifest import Manifest
    from pipeline.preview.estimate import EstimateError, estimate

    manifest = Manifest(found.items, root, params.data.closed_set)
    height, width = params.data.image_size
    cached = params.data.cache
    inspected = rendering + found.seconds * len(manifest) * (2 if cached else 1)  # the cache decodes each once more
    rows = [{"stage": "prepare", "steps": "", "seconds a step": "", "time": duration(inspected), "memory": ""}]
    threads, failure, peak = 0, "", 0
    for stage, _ in params.trainings:
        try:
            result = estimate(stage, params, manifest)
        except EstimateError as error:
            failure = f"{stage}: {error}"
            break  # a step of the student takes one of the teacher's and more
        (low, high), measured = result.seconds, result.measured
        threads, peak = measured.threads, max(peak, measured.memory)
        memory = f"{measured.memory / GIB:.1f} GiB"
        if measured.device_memory is not None:
            memory += f", GPU {measured.device_memory / GIB:.1f} GiB"
        step = " to ".join(dict.fromkeys(f"{seconds:.3g}" for seconds in result.step))
        time_ = " to ".join(dict.fromkeys((duration(low), duration(high))))
        rows.append(
            {"stage": stage, "steps": f"{result.steps:,}", "seconds a step": step, "time": time_, "memory": memory}
        )
    typer.echo("Expected on this machine:")
    Console().print(to_table(rows))
    if failure:
        typer.echo(f"Not measured: {failure}")
    if threads:
        count = f"{threads} thread" + ("s" if threads > 1 else "")
        typer.echo(
            f"Measured in a few steps with {count}, on a machine as busy as it is now: other programs that start or "
            "end change the times, even severalfold. The lower time is for the fastest quarter of the steps, and for a "
            "student that is small from its start; the upper one for the slowest quarter, and for a student that never "
            "shrinks. Surgery, export and benchmark come on top."
        )
    if cached:
        cache = len(manifest) * height * width * 3
        typer.echo(f"The image cache takes {cache / GIB:.1g} GiB on disk, and that memory if it is free.")
    available = psutil.virtual_memory().available
    if peak > available:
        typer.echo(f"Note: {peak / GIB:.1f} GiB of memory are needed, and {available / GIB:.1f} GiB are free")


def duration(seconds: float) -> str:
    """Format a time with one or two significant digits: an estimate has no more."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            amount = seconds / length
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
