"""A page for the browser: drop a picture, see what each model finds in its gallery, and how long it took."""

import asyncio
import io
import socket
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pipeline.data.images import opened, upright_rgb
from pipeline.search.index import Index

T = TypeVar("T")

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
TOP = 20
"""Images that are shown."""
LARGEST = 256
"""Longest side of a shown image, pixels."""
UPLOAD = 64 * 2**20
"""Bytes of a dropped file; more are not read."""
WAITING = 8
"""Searches that wait their turn; who comes then is asked to come again: each holds its picture."""
REPEATS = 5
"""Calls of a model after a first one, of which the fastest is told."""


class AddressError(ValueError):
    """The page cannot be served at such an address."""

    exit_code = 2


def allowed_hosts(host: str, names: Sequence[str]) -> list[str]:
    """Host names that the page may be called by.

    Args:
        host: Address that it listens at.
        names: That the user gave.

    Raises:
        AddressError: If nobody could call it, or everybody by any name.
    """
    if strange := [name for name in names if not name or set(name) & set("*/:")]:
        raise AddressError(f"`--name {strange[0]}` is no host name; give it without protocol, port or `*`")
    nameless = not host or ":" in host or host == "0.0.0.0"  # noqa: S104 (asked about, not listened at)
    if nameless and not names:
        raise AddressError(f"a page at {host or 'all addresses'} is called by a name; give it by `--name`")
    return list(dict.fromkeys(["localhost", "127.0.0.1", *([] if nameless else [host]), *names]))


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the server accepts connections on; port 0 takes a free one.

    Raises:
        AddressError: If the address is in use, or not one of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = f"{host}:{port} cannot be listened at ({error.strerror or error})"
        raise AddressError(f"{reason}; name another `--host` or `--port`") from None


def application(indexes: Sequence[Index], hosts: Sequence[str]) -> FastAPI:
    """The page and what it asks for.

    Args:
        indexes: Columns of the page.
        hosts: Names that it may be called by: a foreign page that gets a name of its own to point here is refused.
    """
    app = FastAPI(title="smaller-student", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    about = [_about(index) for index in indexes]
    html = TEMPLATES.get_template("page.html.jinja").render(indexes=about)
    turn = asyncio.Lock()  # two at once would spoil each other's times, and forty large pictures the machine's memory
    present = 0

    @app.middleware("http")
    async def keep_out(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return Response("This page answers its own pages only.", 403)
        answer = await go_on(request)
        answer.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Cache-Control": "no-cache"})

    @app.get("/indexes")
    def tell() -> list[dict[str, Any]]:
        return about

    @app.post("/search")
    async def search(request: Request) -> dict[str, Any]:
        nonlocal present
        if present > WAITING:
            raise HTTPException(503, "Many are searching; try again in a moment.", {"Retry-After": "5"})
        present += 1
        try:
            content = await _upload(request)
            async with turn:
                return await run_in_threadpool(_search, indexes, content)
        finally:
            present -= 1

    @app.get("/image/{column}/{place}")
    def image(column: int, place: int) -> Response:
        if not (0 <= column < len(indexes) and 0 <= place < len(indexes[column])):
            raise HTTPException(404, "there is no such image")
        index = indexes[column]
        try:
            content = _small(index.path(place))
        except Exception as error:  # whatever a decoder raises
            raise HTTPException(404, f"{index.paths[place]} cannot be shown any more: {error}") from None
        return Response(content, media_type="image/png", headers={"Cache-Control": "max-age=3600"})

    return app


async def _upload(request: Request) -> bytes:
    """What was sent, unless it is too much; what says so itself is not even read.

    Raises:
        HTTPException: 413.
    """
    too_much = HTTPException(413, f"The picture has more than {UPLOAD} bytes; make it smaller.")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > UPLOAD:
        raise too_much
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > UPLOAD:
            raise too_much
    return bytes(content)


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
                "hits": [asdict(hit) for hit in hits],
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
