"""A web page for image search: drop a picture, compare the results and the speed of several models."""

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

from pipeline.data.images import open_image, upright_rgb
from pipeline.search.index import GalleryError, Index

T = TypeVar("T")

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
TOP = 20
"""Search results in a column."""
THUMBNAIL = 256
"""Longest side of a result's image, pixels."""
MAX_UPLOAD = 64 * 2**20
"""Largest picture that is accepted, bytes."""
MAX_WAITING = 8
"""Searches that may wait while one runs; each keeps its picture in memory. Further ones get status 503."""
REPEATS = 5
"""Timed calls after a first one; the fastest is reported."""


class AddressError(ValueError):
    """The page cannot be served at this address."""

    exit_code = 2


def allowed_hosts(host: str, names: Sequence[str]) -> list[str]:
    """Return the allowed values of the HTTP header `Host`.

    Args:
        host: Address that the server listens on.
        names: Values of `--name`.

    Raises:
        AddressError: If a name is not a plain host name, or `host` needs one and there is none.
    """
    if invalid := [name for name in names if not name or set(name) & set("*/:")]:
        raise AddressError(f"`--name {invalid[0]}` is not a host name; give it without protocol, port or `*`")
    needs_name = not host or ":" in host or host == "0.0.0.0"  # noqa: S104 - compared, not bound
    if needs_name and not names:
        raise AddressError(f"a page at {host or 'all addresses'} needs a host name; give it with `--name`")
    return list(dict.fromkeys(["localhost", "127.0.0.1", *([] if needs_name else [host]), *names]))


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket of the server; port 0 takes a free port.

    Raises:
        AddressError: If the address is in use, or does not belong to this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = f"cannot listen on {host}:{port} ({error.strerror or error})"
        raise AddressError(f"{reason}; choose another `--host` or `--port`") from None


def application(indexes: Sequence[Index], hosts: Sequence[str]) -> FastAPI:
    """Build the web application: the page and its endpoints.

    Args:
        indexes: One column of the page each.
        hosts: Allowed `Host` headers, against DNS rebinding: a foreign domain that resolves to this machine is refused.
    """
    app = FastAPI(title="smaller-student", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    descriptions = [_describe(index) for index in indexes]
    html = TEMPLATES.get_template("page.html.jinja").render(indexes=descriptions)
    search_lock = asyncio.Lock()  # parallel searches would distort each other's times and add up in memory
    pending = 0

    @app.middleware("http")
    async def check_origin(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return Response("Requests from other origins are refused.", 403)
        response = await call_next(request)
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Cache-Control": "no-cache"})

    @app.get("/indexes")
    def list_indexes() -> list[dict[str, Any]]:
        return descriptions

    @app.post("/search")
    async def search(request: Request) -> dict[str, Any]:
        nonlocal pending
        if pending > MAX_WAITING:
            raise HTTPException(503, "Too many searches are waiting; try again in a moment.", {"Retry-After": "5"})
        pending += 1
        try:
            content = await _read_upload(request)
            async with search_lock:
                return await run_in_threadpool(_search, indexes, content)
        finally:
            pending -= 1

    @app.get("/image/{column}/{place}")
    def image(column: int, place: int) -> Response:
        if not (0 <= column < len(indexes) and 0 <= place < len(indexes[column])):
            raise HTTPException(404, "there is no such image")
        index = indexes[column]
        try:
            content = _thumbnail(index.path(place))
        except GalleryError:  # its reason would reveal which files exist here
            text = f"{index.paths[place]} is not in the gallery, or is not the file that was indexed"
            raise HTTPException(404, text) from None
        except Exception as error:  # whatever a decoder raises
            raise HTTPException(404, f"{index.paths[place]} can no longer be read: {error}") from None
        return Response(content, media_type="image/png", headers={"Cache-Control": "max-age=3600"})

    return app


async def _read_upload(request: Request) -> bytes:
    """Read the body of a request, up to `MAX_UPLOAD` bytes.

    Raises:
        HTTPException: With status 413, before reading anything if `Content-Length` is too large.
    """
    too_large = HTTPException(413, f"The picture has more than {MAX_UPLOAD} bytes; make it smaller.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_UPLOAD:
        raise too_large
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_UPLOAD:
            raise too_large
    return bytes(content)


def _describe(index: Index) -> dict[str, Any]:
    metadata = index.model.metadata
    return {
        "name": index.model.name,
        "gallery": index.gallery.name,
        "images": len(index),
        "map": metadata.map,
        "protocol": metadata.protocol,
        "params": metadata.params,
        "macs": metadata.macs,
    }


def _search(indexes: Sequence[Index], content: bytes) -> dict[str, Any]:
    """Search all indexes for a picture, given as the content of its file."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "query"
        picture.write_bytes(content)
        try:
            pixels = [index.query(picture) for index in indexes]
        except Exception as error:  # whatever a decoder raises
            reason = str(error).replace(str(picture), "it")
            raise HTTPException(422, f"This file cannot be read as a picture: {reason}") from None
    columns = []
    for index, query in zip(indexes, pixels, strict=True):
        embedding, milliseconds = _timed(partial(index.model.embed, query))
        hits, searching = _timed(partial(index.search, embedding, TOP))
        columns.append({"milliseconds": milliseconds, "searching": searching, "hits": [asdict(hit) for hit in hits]})
    return {"columns": columns}


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return the result, and the milliseconds of the fastest call, which other load on the machine disturbs least."""
    result, fastest = function(), float("inf")
    for _ in range(REPEATS):
        started = perf_counter()
        function()
        fastest = min(fastest, 1000 * (perf_counter() - started))
    return result, fastest


def _thumbnail(path: Path) -> bytes:
    """Return a reduced copy of an image as PNG."""
    with open_image(path) as image:
        thumbnail = upright_rgb(image)
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    thumbnail.save(content, "PNG")
    return content.getvalue()
