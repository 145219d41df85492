"""The status page: a few files, and what they show as JSON, by HTTP to people on this machine."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources

from aiohttp import web
from aiohttp.typedefs import Handler
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from tokenwire_service import httplistener

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# Nothing from elsewhere, nothing inline, in no frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@asynccontextmanager
async def serving(
    listen: str, status: Callable[[int], Message], logger: logging.Logger
) -> AsyncIterator[str]:
    """Serves until left; gives the address, with the port that was really bound.

    listen: host:port of the loopback interface, or unix:/path. status: what to show, with the
    seconds from a number on. Raises httplistener.HttpListenError.
    """
    routes: dict[str, Handler] = {"/status.json": _status(status)}
    for path, (name, kind) in _FILES.items():
        text = resources.files("tokenwire_service.page").joinpath(name).read_text("utf-8")
        routes[path] = _file(text, kind)
    async with httplistener.serving(
        listen, routes, logger, setting="status_page.listen", headers=_HEADERS, local=True
    ) as address:
        yield address


def _file(text: str, kind: str) -> Handler:
    async def file(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, content_type=kind, charset="utf-8")

    return file


def _status(status: Callable[[int], Message]) -> Handler:
    async def show(request: web.Request) -> web.StreamResponse:
        since = request.query.get("since", "0")
        if not since.isascii() or not since.isdigit() or len(since) > 12:
            raise web.HTTPBadRequest(text=f"since: got {since[:40]!r}, expected a whole number\n")
        text = MessageToJson(
            status(int(since)), always_print_fields_with_no_presence=True, indent=None
        )
        return web.Response(text=text, content_type="application/json")

    return show
