"""Answers operators by HTTP: opens a listener of its own for a few pages."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

_LAST_WORDS = 1.0  # seconds in the end for whoever reads a page


class HttpListenError(Exception):
    """The listener cannot be opened."""


@asynccontextmanager
async def serving(
    listen: str,
    routes: Mapping[str, Handler],
    logger: logging.Logger,
    *,
    setting: str,
    headers: Mapping[str, str] | None = None,
    local: bool = False,
) -> AsyncIterator[str]:
    """Serves until left; gives the address, with the port that was really bound.

    listen: host:port or unix:/path. routes: path -> what answers a GET. setting: where `listen`
    comes from. headers: sent with every answer. local: only who calls this machine by its own name
    or by an address is answered. Raises HttpListenError.
    """
    app = web.Application(middlewares=[_careful(logger, setting, headers or {}, local)])
    for path, handler in routes.items():
        app.router.add_get(path, handler)
    # A minute by default, by which one that stopped reading would hold up the process's end.
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_LAST_WORDS)
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
            raise HttpListenError(
                f"cannot listen on {listen} ({setting}): {error.strerror or error}"
            ) from None
        bound = runner.addresses[0]
        yield listen if isinstance(bound, str) else f"{host}:{bound[1]}"
    finally:
        await runner.cleanup()


def page(make: Callable[[str], tuple[bytes, str]]) -> Handler:
    """What answers with the bytes, and of the type, that `make` gives for the request's header
    `Accept`."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body, kind = make(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": kind})

    return answer


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


def _careful(
    logger: logging.Logger, setting: str, headers: Mapping[str, str], local: bool
) -> Middleware:
    """Refuses what another site's page makes a browser ask, and tells nobody of a defect but the
    log."""

    @web.middleware
    async def careful(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            # A foreign name that was made to point here would let a foreign page read this one.
            if local and not _is_local(request.host):
                raise web.HTTPForbidden(text="this page is for the machine it runs on\n")
            response = await handler(request)
        except web.HTTPException as error:
            error.headers.update(headers)
            raise
        except Exception:
            logger.exception("defect", extra={"fields": {"where": setting}})
            response = web.Response(status=500, text="the gateway failed; its log tells more\n")
        response.headers.update(headers)
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
