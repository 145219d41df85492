"""The composition root: builds the graph, opens the port, drains. The only module that sees all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from tokenwire.admin.v1 import admin_service_pb2, admin_service_pb2_grpc
from tokenwire.v1 import (
    chat_service_pb2,
    chat_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    tokenizer_service_pb2,
    tokenizer_service_pb2_grpc,
)
from tokenwire_service import keyfiles
from tokenwire_service.admin import AdminServicer
from tokenwire_service.admission import Admission
from tokenwire_service.callers import Callers
from tokenwire_service.certificates import Certificates
from tokenwire_service.config import Config, Upstream
from tokenwire_service.counters import Counters
from tokenwire_service.gateway import Gateway
from tokenwire_service.health import HEALTH_SERVICE, Health
from tokenwire_service.interceptors import Boundary
from tokenwire_service.keyfiles import FileUnusable, FileUsable, KeyFiles
from tokenwire_service.keyring import KeyRing
from tokenwire_service.pool import Pool
from tokenwire_service.recent import Recent
from tokenwire_service.relay import HEARTBEAT_SECONDS, Relayed
from tokenwire_service.retry import Backoff
from tokenwire_service.secret import Scrubber
from tokenwire_service.servicer import ChatServicer, ModelServicer, TokenizerServicer
from tokenwire_service.settings import ADMIN_OFF, DEFAULT_ADMIN, Connections
from tokenwire_service.telemetry import LogObserver, Observer, Observers, log_scrubber
from tokenwire_service.tokens import TokenCounter
from tokenwire_service.upstream.client import UpstreamClient
from tokenwire_service.upstream.dialects import chooser

if TYPE_CHECKING:
    from tokenwire_service.metrics import Observed

SERVICES = (
    chat_service_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name,
    tokenizer_service_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)

ADMIN_SERVICE = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

# Why each: docs/architecture.md, "Transport".
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # else a second process binds the same port without a word
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),  # clients ping silent streams; that is no abuse
    ("grpc.keepalive_time_ms", 60_000),  # notices callers that vanished without a word
    ("grpc.keepalive_timeout_ms", 20_000),
)


_LAST_WORDS = 1.0  # seconds after the grace for the statuses of calls that were cut off


class ListenError(Exception):
    """The port cannot be opened."""


class ServerEndedError(Exception):
    """The server stopped though nobody asked it to."""


class CutShortError(Exception):
    """A second signal ended the server before it had drained."""


@dataclass(frozen=True)
class Running:
    """A gateway that serves. `address` is where, with the port that was really bound; `admin`,
    `page` and `metrics` the same for operators, of the status page and for Prometheus, empty where
    they are off."""

    address: str
    admin: str
    page: str
    metrics: str
    gateway: Gateway
    server: grpc.aio.Server
    boundary: Boundary
    health: Health
    pools: Mapping[str, Pool]

    @property
    def leases(self) -> int:
        """Key leases held now; 0 at rest."""
        return sum(pool.ring.in_flight for pool in self.pools.values())

    @property
    def connections_busy(self) -> int:
        """Upstream answers being read now; 0 at rest."""
        return sum(pool.client.open_answers for pool in self.pools.values())


@asynccontextmanager
async def serving(
    config: Config,
    logger: logging.Logger,
    *,
    observer: Observer | None = None,
    scrub: Scrubber | None = None,
    grace: float = 0.0,
    heartbeat: float = HEARTBEAT_SECONDS,
) -> AsyncIterator[Running]:
    """Serves until left, then gives running calls `grace` seconds. `scrub`: what keeps keys out of
    the log; it learns of new ones. `heartbeat`: seconds of silence until a stream sends an empty
    message. Raises ListenError if a port cannot be opened."""
    async with AsyncExitStack() as stack:
        counters = Counters()
        recent = Recent(lambda: gateway.in_flight)
        scrub = scrub or log_scrubber()
        metrics = _metrics(config, scrub)
        observer = Observers(
            observer or LogObserver(logger),
            counters,
            recent,
            *(() if metrics is None else (metrics,)),
        )
        pools: dict[str, Pool] = {}
        dialect = chooser()
        for upstream in config.upstreams:
            client = UpstreamClient(upstream, dialect, config.limits)
            stack.push_async_callback(client.close)
            pools[upstream.name] = Pool(client, KeyRing(upstream), _bulkhead(config, upstream))
        retries = config.retries
        gateway = Gateway(
            config,
            pools,
            observer,
            backoff=Backoff(retries.backoff, retries.backoff_cap),
            heartbeat=heartbeat,
            relayed=_relayed(recent, metrics),
        )
        counter = TokenCounter(config.limits.tokenizer_bytes)
        stack.callback(counter.close)
        callers = Callers(config.callers)
        boundary = Boundary(observer, logger, config.limits.message_bytes, callers=callers)
        server = grpc.aio.server(
            interceptors=(boundary,),
            options=(
                *_OPTIONS,
                *_ages(config.connections),
                ("grpc.max_receive_message_length", config.limits.message_bytes),
                ("grpc.max_send_message_length", config.limits.message_bytes),
            ),
        )
        # The boundary hands the servicers its own CallContext, which their types say.
        chat_service_pb2_grpc.add_ChatServiceServicer_to_server(
            ChatServicer(gateway, config, logger),  # type: ignore[arg-type]
            server,
        )
        tokenizer_service_pb2_grpc.add_TokenizerServiceServicer_to_server(
            TokenizerServicer(gateway, counter),  # type: ignore[arg-type]
            server,
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(gateway, config),  # type: ignore[arg-type]
            server,
        )
        health_servicer = Health(SERVICES)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        if config.reflection:
            _add_reflection(server, (*SERVICES, HEALTH_SERVICE))
        tls = config.tls
        address = _listen(
            server,
            config.listen,
            "--listen",
            None if tls is None else lambda: Certificates(tls, logger).credentials(),
        )
        files = KeyFiles(config.upstreams)
        servicer = AdminServicer(gateway, config, pools, counters, recent, files, scrub, logger)
        admin = await _admin(servicer, config, logger, stack)
        page = await _status_page(servicer, config, logger, stack)
        exposed = ""
        if metrics is not None:
            exposed = await _metrics_page(
                metrics, gateway, config, pools, counters, files, logger, stack
            )
        await server.start()
        stack.push_async_callback(server.stop, grace)
        scrub.replace(key.secret for pool in pools.values() for key in pool.ring.keys)
        tell = _teller(pools, counters, scrub, logger)
        watching = asyncio.ensure_future(_watch(files, tell, config.key_file_interval, logger))
        stack.push_async_callback(_cancelled, watching)
        await health_servicer.started()
        yield Running(
            address, admin, page, exposed, gateway, server, boundary, health_servicer, pools
        )


async def serve_until_signalled(
    config: Config,
    logger: logging.Logger,
    announce: Callable[[Running], None],
    *,
    scrub: Scrubber | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends at once.

    SIGTERM comes from a supervisor: NOT_SERVING at once, but new calls are still taken for
    `drain.propagation` seconds, because endpoints learn of it only then; after that running
    calls get `drain.grace` seconds. SIGINT comes from a person and skips the first wait.
    Raises ServerEndedError if the server ends by itself, so that a supervisor restarts it, and
    CutShortError after a second signal, so that whoever watches knows that calls were cut off.
    """
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        async with serving(config, logger, scrub=scrub) as running:
            announce(running)
            ended = asyncio.ensure_future(running.server.wait_for_termination())
            first = await _next(signals, {ended})
            if first is None:
                raise ServerEndedError("the gRPC server ended by itself")
            fields = {"signal": first.name, "in_flight": running.gateway.in_flight}
            logger.info("draining", extra={"fields": fields})
            await running.health.draining()
            insisted = None
            if first is signal.SIGTERM:
                insisted = await _next(signals, {ended}, config.drain.propagation)
            running.gateway.draining = True
            if insisted is None:
                # Longer than we wait: what is left then is told why by us, not cut off by gRPC.
                stopping = asyncio.ensure_future(
                    running.server.stop(config.drain.grace + 2 * _LAST_WORDS)
                )
                idle = asyncio.ensure_future(running.boundary.idle())
                insisted = await _next(signals, {stopping, idle}, config.drain.grace)
                if not idle.done():
                    running.gateway.close()
                    await asyncio.wait({stopping, idle}, timeout=_LAST_WORDS)
                idle.cancel()
            # Also what watches health or reflects, and would do so until the grace is over.
            await running.server.stop(0)
            await ended
            logger.info("stopped", extra={"fields": {"cut_short": insisted is not None}})
            if insisted is not None:
                raise CutShortError(f"a second signal, {insisted.name}, ended it at once")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _next(
    signals: asyncio.Queue[signal.Signals],
    ends: set[asyncio.Future[Any]],
    seconds: float | None = None,
) -> signal.Signals | None:
    """The next signal; None if one of `ends` or the time came first."""
    waiting = asyncio.ensure_future(signals.get())
    done, _ = await asyncio.wait(
        {waiting, *ends}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
    )
    if waiting in done:
        return waiting.result()
    waiting.cancel()
    return None


def _ages(connections: Connections) -> Iterator[tuple[str, int]]:
    """gRPC adds or takes away up to a tenth of the age, so that callers do not return in step."""
    if connections.max_age is None:
        return
    yield "grpc.max_connection_age_ms", round(connections.max_age * 1000)
    if connections.max_age_grace is not None:
        yield "grpc.max_connection_age_grace_ms", round(connections.max_age_grace * 1000)


def _bulkhead(config: Config, upstream: Upstream) -> Admission:
    """The slots of one upstream: all of them, or three quarters where there are several."""
    slots = config.limits.in_flight
    if upstream.in_flight is not None:
        slots = upstream.in_flight
    elif len(config.upstreams) > 1:
        slots = max(1, slots * 3 // 4)
    return Admission(slots, config.limits.queue, time.monotonic)


async def _admin(
    servicer: AdminServicer, config: Config, logger: logging.Logger, stack: AsyncExitStack
) -> str:
    """Opens the port for operators; where, empty for nowhere. Nobody has asked for the default
    one, so a second gateway on this machine does without."""
    configured = config.admin.listen
    if configured == ADMIN_OFF:
        return ""
    server = grpc.aio.server(options=_OPTIONS)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
        servicer,  # type: ignore[arg-type]
        server,
    )
    if config.reflection:
        _add_reflection(server, (ADMIN_SERVICE,))
    umask = os.umask(0o177)  # a unix socket, unlike the loopback interface, knows who asks
    try:
        address = _listen(server, configured or DEFAULT_ADMIN, "admin.listen")
    except ListenError as error:
        if configured is not None:
            raise
        without = "`tokenwire keys` will not show this gateway"
        logger.warning("no admin port", extra={"fields": {"why": str(error), "so": without}})
        return ""
    finally:
        os.umask(umask)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return address


async def _status_page(
    servicer: AdminServicer, config: Config, logger: logging.Logger, stack: AsyncExitStack
) -> str:
    """Opens the status page; where, empty for nowhere."""
    listen = config.status_page.listen
    if listen == ADMIN_OFF:
        return ""
    # An HTTP server takes a while to load.
    from tokenwire_service import httplistener, statuspage

    try:
        return await stack.enter_async_context(statuspage.serving(listen, servicer.status, logger))
    except httplistener.HttpListenError as error:
        raise ListenError(str(error)) from None


def _metrics(config: Config, scrub: Scrubber) -> Observed | None:
    """What counts for Prometheus; None where nobody collects it."""
    if config.metrics.listen == ADMIN_OFF:
        return None
    from tokenwire_service import metrics  # takes a while to load, too

    return metrics.Observed(config, scrub)


def _relayed(recent: Recent, metrics: Observed | None) -> Relayed:
    """Who is told what streams send while they run."""
    if metrics is None:
        return recent.relayed

    def relayed(deltas: int, first_after: float | None, gap: float | None) -> None:
        recent.relayed(deltas, first_after, gap)
        metrics.relayed(deltas, gap)

    return relayed


async def _metrics_page(
    metrics: Observed,
    gateway: Gateway,
    config: Config,
    pools: Mapping[str, Pool],
    counters: Counters,
    files: KeyFiles,
    logger: logging.Logger,
    stack: AsyncExitStack,
) -> str:
    """Opens the port for Prometheus; where."""
    from tokenwire_service import httplistener
    from tokenwire_service.metrics import FirstConfig, Standing, exposition, watch_process

    registry = metrics.registry
    registry.register(Standing(gateway, config, pools, counters, files, FirstConfig()))
    watch_process(registry)
    routes = {"/metrics": httplistener.page(lambda accept: exposition(registry, accept))}
    listen = config.metrics.listen
    try:
        return await stack.enter_async_context(
            httplistener.serving(listen, routes, logger, setting="metrics.listen")
        )
    except httplistener.HttpListenError as error:
        raise ListenError(str(error)) from None


def _teller(
    pools: Mapping[str, Pool], counters: Counters, scrub: Scrubber, logger: logging.Logger
) -> Callable[[keyfiles.Change], None]:
    """What is done about a change of the files of keys, and said of it."""

    def tell(change: keyfiles.Change) -> None:
        if isinstance(change, FileUnusable):
            fields: dict[str, object] = {
                "file": str(change.path),
                "problem": change.problem,
                "so": "its last good keys stay",
            }
            logger.warning("key file unusable", extra={"fields": fields})
            return
        if isinstance(change, FileUsable):
            fields = {"file": str(change.path)}
            logger.info("key file usable again", extra={"fields": fields})
            return
        known = [key for pool in pools.values() for key in pool.ring.known_keys]
        scrub.replace(key.secret for key in (*known, *change.keys))
        pool = pools[change.upstream]
        pool.replace(change.keys)
        counters.keep(change.upstream, (key.id for key in pool.ring.known_keys))
        if change.added or change.removed or change.changed:
            fields = {
                "upstream": change.upstream,
                "added": ",".join(change.added),
                "removed": ",".join(change.removed),
                "changed": ",".join(change.changed),
                "keys": len(change.keys),
            }
            logger.info("keys changed", extra={"fields": fields})

    return tell


async def _watch(
    files: KeyFiles,
    tell: Callable[[keyfiles.Change], None],
    interval: float,
    logger: logging.Logger,
) -> None:
    """A defect must not end the watch in silence."""
    while files.paths:
        try:
            await keyfiles.watch(files, tell, interval=interval)
        except Exception:
            logger.exception("defect", extra={"fields": {"where": "files of keys"}})
            await asyncio.sleep(interval)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _listen(
    server: grpc.aio.Server,
    listen: str,
    option: str,
    credentials: Callable[[], grpc.ServerCredentials] | None = None,
) -> str:
    """Opens the port; the address, with the number that was really bound for port 0. `option`:
    what takes another. With `credentials` it speaks TLS."""
    if listen.startswith("unix:") and _is_served(listen.removeprefix("unix:").removeprefix("//")):
        raise ListenError(f"cannot listen on {listen}: another process serves there")
    try:
        if credentials is not None:
            port = server.add_secure_port(listen, credentials())
        else:
            port = server.add_insecure_port(listen)
    except (OSError, ValueError) as error:
        raise ListenError(f"cannot listen on {listen}: tls: {error}") from error
    except RuntimeError as error:
        hint = f"is it in use? {option} takes another"
        raise ListenError(f"cannot listen on {listen}: {hint}") from error
    host, colon, number = listen.rpartition(":")
    return f"{host}:{port}" if colon and number == "0" else listen


def _is_served(path: str) -> bool:
    """Whether somebody listens on a unix socket: gRPC would take it away from them."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # its queue is full
        except OSError:
            return False
        return True


class _Symbols:
    """The default pool, which also finds methods: ghz and `grpcurl describe` ask for those."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802
        """The file of a message, field, enum, service or method. Raises KeyError."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


def _add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """v1alpha, and v1, whose messages are the same and which grpcio-reflection lacks."""
    names = (*services, reflection.SERVICE_NAME)
    symbols = _Symbols()
    reflection.enable_server_reflection(names, server, pool=symbols)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names, pool=symbols).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": handler}
            ),
        )
    )
