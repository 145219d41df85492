"""The composition root: builds the graph, opens the port, drains. The only module that sees all."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
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
from tokenwire_service import keyfiles, reload, sharing
from tokenwire_service.admin import AdminServicer
from tokenwire_service.backlog import Backlog, calls_in_core, servers, time_wanted
from tokenwire_service.certificates import Certificates
from tokenwire_service.config import Config
from tokenwire_service.counters import Counters
from tokenwire_service.gateway import Gateway
from tokenwire_service.health import HEALTH_SERVICE, Health
from tokenwire_service.interceptors import Boundary
from tokenwire_service.labels import Labels
from tokenwire_service.live import Live
from tokenwire_service.looplag import LoopLag
from tokenwire_service.pool import Pool
from tokenwire_service.recent import Recent
from tokenwire_service.relay import HEARTBEAT_SECONDS, Relayed
from tokenwire_service.reload import Revision, Source
from tokenwire_service.secret import Scrubber
from tokenwire_service.servicer import ChatServicer, ModelServicer, TokenizerServicer
from tokenwire_service.settings import ADMIN_OFF, DEFAULT_ADMIN, Connections
from tokenwire_service.telemetry import LogObserver, Observer, Observers, log_scrubber
from tokenwire_service.upstream.client import UpstreamClient

if TYPE_CHECKING:
    from tokenwire_service.metrics import Observed, Standing
    from tokenwire_service.otlp import Otlp

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
    # Calls that come while the loop is late are refused by us, with a reason: gRPC would reset them
    # after 30 s.
    ("grpc.server_max_unrequested_time_in_server", 3600),
)


_ON_THEIR_WAY = 0.2  # seconds in which calls begin that came before connections were told to go
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
    `page`, `probes` and `metrics` the same for operators, of the status page, for probes of health
    alone and for Prometheus, empty where they are off."""

    address: str
    admin: str
    page: str
    probes: str
    metrics: str
    live: Live
    server: grpc.aio.Server
    boundary: Boundary
    health: Health
    revision: Revision

    @property
    def gateway(self) -> Gateway:
        """For calls that begin now."""
        return self.live.gateway

    @property
    def pools(self) -> Mapping[str, Pool]:
        """Of each upstream."""
        return self.live.pools

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
    source: Source | None = None,
) -> AsyncIterator[Running]:
    """Serves until left, then gives running calls `grace` seconds. `scrub`: what keeps keys out of
    the log; it learns of new ones. `heartbeat`: seconds of silence until a stream sends an empty
    message. `source`: the file of `config`, watched for another one. Raises ListenError if a port
    cannot be opened."""
    async with AsyncExitStack() as stack:
        counters = Counters()
        lag = LoopLag(time.monotonic)
        lag.start()
        stack.callback(lag.close)
        recent = Recent(lambda: gateway.in_flight)
        scrub = scrub or log_scrubber()
        labels = Labels(config, scrub)
        metrics = _metrics(config, labels)
        otlp = _otlp(config, labels, scrub, logger)
        wanted: list[Observer | None] = [observer or LogObserver(logger), counters, recent, metrics]
        if otlp is not None:
            stack.push_async_callback(otlp.close)  # last of all: what ends now is told, too
            wanted.append(otlp.observer)
        observer = Observers(*(each for each in wanted if each is not None))
        shared = await stack.enter_async_context(sharing.started(config.redis, logger))
        live = Live(
            config,
            observer,
            counters,
            scrub,
            logger,
            heartbeat=heartbeat,
            relayed=_relayed(recent, metrics),
            lag=lag,
            shared=shared,
        )
        stack.push_async_callback(live.close)
        gateway = live.gateway
        revision = Revision()
        pending = config.limits.pending
        backlog = Backlog(
            lambda: calls_in_core(server_id),
            pending // 2,
            lag,
            time.monotonic,
            time.process_time,
            time_wanted,
        )
        boundary = Boundary(
            observer,
            logger,
            config.limits.message_bytes,
            callers=live.callers,
            tracer=None if otlp is None else otlp.tracer,
            backlog=backlog,
        )
        before = servers()
        server = grpc.aio.server(
            interceptors=(boundary,),
            options=(
                *_OPTIONS,
                *_ages(config.connections),
                ("grpc.server.max_pending_requests", pending),
                ("grpc.server.max_pending_requests_hard_limit", pending),
                ("grpc.max_receive_message_length", config.limits.message_bytes),
                ("grpc.max_send_message_length", config.limits.message_bytes),
            ),
        )
        server_id = max(servers() - before)
        served: Any = _Generic(server)
        # The boundary hands the servicers its own CallContext, which their types say.
        chat_service_pb2_grpc.add_ChatServiceServicer_to_server(
            ChatServicer(lambda: live.gateway, logger),  # type: ignore[arg-type]
            served,
        )
        tokenizer_service_pb2_grpc.add_TokenizerServiceServicer_to_server(
            TokenizerServicer(lambda: live.gateway, live.counter),  # type: ignore[arg-type]
            served,
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(lambda: live.gateway),  # type: ignore[arg-type]
            served,
        )
        health_servicer = Health(SERVICES)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, served)
        if config.reflection:
            _add_reflection(server, (*SERVICES, HEALTH_SERVICE))
        tls = config.tls
        certificates: Certificates | None = None

        def credentials() -> grpc.ServerCredentials:
            nonlocal certificates
            assert tls is not None
            certificates = Certificates(tls, logger)
            return certificates.credentials()

        address = _listen(server, config.listen, "--listen", None if tls is None else credentials)
        servicer = AdminServicer(
            gateway, live.pools, counters, recent, live.files, revision, scrub, logger
        )
        admin = await _admin(servicer, config, logger, stack)
        page = await _status_page(servicer, config, logger, stack)
        probes = await _health_port(health_servicer, config, stack)
        exposed = ""
        if metrics is not None:
            exposed = await _metrics_page(
                metrics,
                _standing(live, backlog, counters, revision, otlp, shared, certificates),
                config.metrics.listen,
                logger,
                stack,
            )
        watches = _Watches(live, labels, boundary, revision, logger)
        stack.push_async_callback(watches.end)
        await server.start()
        stack.push_async_callback(server.stop, grace)
        if source is not None:
            watches.watch(source)
        await health_servicer.started()
        yield Running(
            address,
            admin,
            page,
            probes,
            exposed,
            live,
            server,
            boundary,
            health_servicer,
            revision,
        )


async def serve_until_signalled(
    config: Config,
    logger: logging.Logger,
    announce: Callable[[Running], None],
    *,
    scrub: Scrubber | None = None,
    source: Source | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends at once.

    SIGTERM comes from a supervisor: NOT_SERVING at once, but new calls are still taken for
    `drain.propagation` seconds, because endpoints learn of it only then; after that running
    calls get `drain.grace` seconds. SIGINT comes from a person and skips the first wait.
    SIGHUP has the configuration read again, where it comes from a `source`.
    Raises ServerEndedError if the server ends by itself, so that a supervisor restarts it, and
    CutShortError after a second signal, so that whoever watches knows that calls were cut off.
    """
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    if source is not None:
        loop.add_signal_handler(signal.SIGHUP, source.asked.set)
    try:
        async with serving(config, logger, scrub=scrub, source=source) as running:
            announce(running)
            ended = asyncio.ensure_future(running.server.wait_for_termination())
            first = await _next(signals, {ended})
            if first is None:
                raise ServerEndedError("the gRPC server ended by itself")
            fields = {"signal": first.name, "in_flight": running.gateway.in_flight}
            logger.info("draining", extra={"fields": fields})
            await running.health.draining()
            drain = running.live.config.drain
            insisted = None
            if first is signal.SIGTERM:
                insisted = await _next(signals, {ended}, drain.propagation)
                if ended.done():
                    raise ServerEndedError("the gRPC server ended by itself")
            if insisted is None:
                # Longer than we wait: what is left then is told why by us, not cut off by gRPC.
                stopping = asyncio.ensure_future(running.server.stop(drain.grace + 2 * _LAST_WORDS))
                # Connections are told to go elsewhere now. Calls that have reached gRPC before that
                # may begin a moment later, and are served as those that run.
                insisted = await _next(signals, {stopping}, min(_ON_THEIR_WAY, drain.grace))
            running.gateway.draining = True
            if insisted is None:
                idle = asyncio.ensure_future(running.boundary.idle())
                insisted = await _next(signals, {stopping, idle}, drain.grace)
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
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
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
    # Here the setting does not count: whoever reaches this port is an operator.
    _add_reflection(server, (ADMIN_SERVICE, *SERVICES, HEALTH_SERVICE))
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


async def _health_port(servicer: Health, config: Config, stack: AsyncExitStack) -> str:
    """Opens the port for probes; where, empty for nowhere."""
    listen = config.health.listen
    if listen == ADMIN_OFF:
        return ""
    server = grpc.aio.server(options=_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = _listen(server, listen, "health.listen")
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return address


def _metrics(config: Config, labels: Labels) -> Observed | None:
    """What counts for Prometheus; None where nobody collects it."""
    if config.metrics.listen == ADMIN_OFF:
        return None
    from tokenwire_service import metrics  # takes a while to load, too

    return metrics.Observed(labels)


def _relayed(recent: Recent, metrics: Observed | None) -> Relayed:
    """Who is told what streams send while they run."""
    if metrics is None:
        return recent.relayed

    def relayed(deltas: int, first_after: float | None, gap: float | None) -> None:
        recent.relayed(deltas, first_after, gap)
        metrics.relayed(deltas, gap)

    return relayed


def _otlp(config: Config, labels: Labels, scrub: Scrubber, logger: logging.Logger) -> Otlp | None:
    """Who tells the collector; None where there is none."""
    if config.otlp.endpoint is None:
        return None
    from tokenwire_service import otlp  # takes a while to load, and some MiB

    return otlp.Otlp(config.otlp, labels, scrub, logger)


def _standing(
    live: Live,
    backlog: Backlog,
    counters: Counters,
    revision: Revision,
    otlp: Otlp | None,
    shared: sharing.Shared | None,
    certificates: Certificates | None,
) -> Standing:
    """What Prometheus reads of how the gateway stands."""
    from tokenwire_service import metrics

    def redis_away() -> bool:
        return shared is not None and not shared.store.here

    return metrics.Standing(
        live.gateway,
        live.pools,
        counters,
        live.files,
        revision,
        backlog=backlog,
        spans=dict if otlp is None else otlp.spans,
        redis_away=redis_away,
        certificates_refused=lambda: certificates is not None and bool(certificates.problem),
    )


async def _metrics_page(
    metrics: Observed,
    standing: Standing,
    listen: str,
    logger: logging.Logger,
    stack: AsyncExitStack,
) -> str:
    """Opens the port for Prometheus; where."""
    from tokenwire_service import httplistener
    from tokenwire_service.metrics import exposition, watch_process

    registry = metrics.registry
    registry.register(standing)
    watch_process(registry)
    routes = {"/metrics": httplistener.page(lambda accept: exposition(registry, accept))}
    try:
        return await stack.enter_async_context(
            httplistener.serving(listen, routes, logger, setting="metrics.listen")
        )
    except httplistener.HttpListenError as error:
        raise ListenError(str(error)) from None


class _Generic:
    """What generated code adds servicers to: a server that is not told the names of its methods.

    For each method that it knows by name grpc.aio has a task that waits for its calls, and asks
    every one of these at each call. Calls of methods that it does not know have one task together.
    Of what a profiler saw of a unary call, thirteen tasks took 90 us of 1,600.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """They are among the generic ones already."""


class _Watches:
    """What looks at files while the server runs."""

    def __init__(
        self,
        live: Live,
        labels: Labels,
        boundary: Boundary,
        revision: Revision,
        logger: logging.Logger,
    ) -> None:
        self._live = live
        self._labels = labels
        self._boundary = boundary
        self._revision = revision
        self._logger = logger
        self._keys = asyncio.ensure_future(self._watch_keys())
        self._others: set[asyncio.Task[None]] = set()

    def watch(self, source: Source) -> None:
        """Looks at the configuration file, too."""
        live = self._live
        self._begin(
            reload.watch(
                source,
                live.config,
                self._take,
                self._revision,
                self._logger,
                interval=lambda: live.config.key_file_interval,
            )
        )

    async def end(self) -> None:
        """Ends all of it."""
        tasks = {self._keys, *self._others}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, config: Config) -> tuple[str, ...]:
        taken = self._live.take(config)
        self._labels.take(self._live.config)
        self._logger.setLevel(self._live.config.log.level.upper())
        if taken.left:
            self._begin(self._close(taken.left))
        self._keys.cancel()  # there may be other files
        self._keys = asyncio.ensure_future(self._watch_keys())
        return taken.kept

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    async def _close(self, left: Sequence[UpstreamClient]) -> None:
        """Closes what only calls use that run now."""
        try:
            await self._boundary.passed()
        finally:
            for client in left:
                await client.close()

    async def _watch_keys(self) -> None:
        """A defect must not end it in silence."""
        live = self._live
        interval = live.config.key_file_interval
        while live.files.paths:
            try:
                await keyfiles.watch(live.files, live.tell, interval=interval)
            except Exception:
                self._logger.exception("defect", extra={"fields": {"where": "files of keys"}})
                await asyncio.sleep(interval)


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
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names, pool=_Symbols()).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection"):
        served = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
        server.add_generic_rpc_handlers((served,))
