"""A page for the browser: drop a picture, see what each model finds in its gallery, and how long it took."""

import io
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipeline.data.images import opened, upright_rgb
from pipeline.data.manifest import DataError
from pipeline.search.index import Index

T = TypeVar("T")

PAGE = Path(__file__).with_name("page.html")
TOP = 20
"""Images that are shown."""
LARGEST = 256
"""Longest side of a shown image, pixels."""
UPLOAD = 64 * 2**20
"""Bytes of a dropped file; more are not read."""
REPEATS = 5
"""Calls of a model after a first one, of which the fastest is told."""


def application(indexes: Sequence[Index], hosts: Sequence[str]) -> FastAPI:
    """The page and what it asks for.

    Args:
        indexes: Columns of the page.
        hosts: Names that it may be called by: a foreign page that gets a name of its own to point here is refused.
    """
    app = FastAPI(title="smaller-student", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    html = PAGE.read_text(encoding="utf-8")
    turn = Lock()  # two at once would spoil each other's times, and forty large pictures the machine's memory

    @app.get("/")
    def page() -> Response:
        return Response(html, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})

    @app.get("/indexes")
    def tell() -> list[dict[str, Any]]:
        return [_about(index) for index in indexes]

    @app.post("/search")
    async def search(request: Request) -> dict[str, Any]:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > UPLOAD:
                raise HTTPException(413, f"The picture has more than {UPLOAD} bytes; make it smaller.")
        return await run_in_threadpool(in_turn, bytes(content))

    def in_turn(content: bytes) -> dict[str, Any]:
        with turn:
            return _search(indexes, content)

    @app.get("/image/{column}/{place}")
    def image(column: int, place: int) -> Response:
        if not (0 <= column < len(indexes) and 0 <= place < len(indexes[column])):
            raise HTTPException(404, "there is no such image")
        index = indexes[column]
        try:
            content = _small(index.gallery / index.paths[place])
        except (DataError, OSError) as error:
            raise HTTPException(404, f"{index.paths[place]} cannot be shown any more: {error}") from None
        return Response(content, media_type="image/png", headers={"Cache-Control": "max-age=3600"})

    return app


def _about(index: Index) -> dict[str, Any]:
    about = index.model.metadata
    return {
        "name": index.model.name,
        "gallery": index.gallery.name,
        "images": len(index),
        "map": about.map,
        "protocol": about.protocol,
        "params": about.params,
        "macs": about.macs,
    }


def _search(indexes: Sequence[Index], content: bytes) -> dict[str, Any]:
    """What all indexes find for the content of a picture's file."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "query"
        picture.write_bytes(content)
        try:
            pixels = [index.query(picture) for index in indexes]
        except Exception as error:  # whatever a decoder raises
            reason = str(error).replace(str(picture), "it")
            raise HTTPException(422, f"This is no picture that can be read: {reason}") from None
    columns = []
    for index, query in zip(indexes, pixels, strict=True):
        embedding, milliseconds = _timed(partial(index.model.embed, query))
        hits, searching = _timed(partial(index.search, embedding, TOP))
        columns.append(
            {
                "milliseconds": milliseconds,
                "searching": searching,
                "hits": [{"place": hit.place, "path": hit.path, "similarity": hit.similarity} for hit in hits],
            }
        )
    return {"columns": columns}


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """Result, and milliseconds of the fastest call: others met whatever else the machine did."""
    found, fastest = work(), float("inf")
    for _ in range(REPEATS):
        started = perf_counter()
        work()
        fastest = min(fastest, 1000 * (perf_counter() - started))
    return found, fastest


def _small(path: Path) -> bytes:
    """An image as a small PNG."""
    with opened(path) as image:
        shown = upright_rgb(image)
        shown.thumbnail((LARGEST, LARGEST), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    shown.save(content, "PNG")
    return content.getvalue()
