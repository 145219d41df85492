"""The status page: a few files, and what they show as JSON, by HTTP to people on this machine."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

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


class PageError(Exception):
    """The listener cannot be opened."""


@asynccontextmanager
async def serving(
    listen: str, status: Callable[[int], Message], logger: logging.Logger
) -> AsyncIterator[str]:
    """Serves until left; gives the address, with the port that was really bound.

    listen: host:port of the loopback interface, or unix:/path. status: what to show, with the
    seconds from a number on. Raises PageError.
    """
    app = web.Application(middlewares=[_careful(logger)])
    for path, (name, kind) in _FILES.items():
        text = resources.files("tokenwire_service.page").joinpath(name).read_text("utf-8")
        app.router.add_get(path, _file(text, kind))
    app.router.add_get("/status.json", _status(status))
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    try:
        host, _, port = listen.rpartition(":")
        try:
            site: web.BaseSite
            if listen.startswith("unix:"):
                site = web.SockSite(runner, _own(listen.removeprefix("unix:").removeprefix("//")))
            else:
                site = web.TCPSite(runner, host.strip("[]"), int(port), reuse_address=True)
            await site.start()
        except OSError as error:
            raise PageError(
                f"cannot listen on {listen} (status_page.listen): {error.strerror or error}"
            ) from None
        bound = runner.addresses[0]
        yield listen if isinstance(bound, str) else f"{host}:{bound[1]}"
    finally:
        await runner.cleanup()


def _own(path: str) -> socket.socket:
    """A socket there that only the user who runs the gateway may connect to, as the admin port's;
    one that a gateway before has left makes way. Raises OSError."""
    if Path(path).is_socket():
        Path(path).unlink()
    made = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)
    try:
        made.bind(path)
    except OSError:
        made.close()
        raise
    finally:
        os.umask(umask)
    return made


def _careful(logger: logging.Logger) -> Middleware:
    """Refuses what another site's page makes a browser ask, and tells nobody of a defect but the
    log."""

    @web.middleware
    async def careful(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            # A foreign name that was made to point here would let a foreign page read this one.
            if not _is_local(request.host):
                raise web.HTTPForbidden(text="this page is for the machine it runs on\n")
            response = await handler(request)
        except web.HTTPException as error:
            error.headers.update(_HEADERS)
            raise
        except Exception:
            logger.exception("defect", extra={"fields": {"where": "status page"}})
            response = web.Response(status=500, text="the gateway failed; its log tells more\n")
        response.headers.update(_HEADERS)
        return response

    return careful


def _is_local(host: str) -> bool:
    """Whether a header `Host` has this machine's own name, or an address."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


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
