"""Traces and metrics by OpenTelemetry's conventions, sent by OTLP.

One server span for each RPC and one client span for each attempt. Conventions: rpc 1.45, gen_ai as
of their move to a repository of their own (docs/metrics.md). No prompt, no answer, no key.

Nothing waits for the collector: what is to be sent stands in a bounded queue, which a thread of
its own empties.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service import __version__
from tokenwire_service.labels import Labels
from tokenwire_service.secret import Scrubber
from tokenwire_service.settings import Otlp as Settings
from tokenwire_service.telemetry import ABANDONED, AttemptEvent, CallEvent
from tokenwire_service.upstream.dialect import Encoded, Route

SCHEMA = "https://opentelemetry.io/schemas/1.45.0"
_SEND_SECONDS = 10.0  # for one batch; then it is lost
_FLUSH_SECONDS = 5.0  # for what waits, when the gateway ends
_BATCH = 128  # spans: to encode more at once would keep the event loop from the processor too long

# A server span with another code is the caller's affair.
_SERVER_ERRORS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
# `gen_ai.provider.name` where it differs from our name of the profile, or of the dialect that has
# no profiles.
_PROVIDERS = {
    "compatible": "openai",
    "openai-reasoning": "openai",
    "openai-hybrid": "openai",
    "azure": "azure.ai.openai",
    "azure-reasoning": "azure.ai.openai",
    "azure-hybrid": "azure.ai.openai",
    "qwen": "dashscope",
    "mistral": "mistral_ai",
    "xai": "x_ai",
    "gemini": "gcp.gemini",
}
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "choice_count": "choice.count",
}
_RPC_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_OPERATION_SECONDS = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
_FIRST_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
_TOKENS = tuple(4**n for n in range(14))

Attributes = dict[str, Any]


def provider(route: Route) -> str:
    """`gen_ai.provider.name`: a well-known one, or what we call it."""
    name = route.profile_name or route.dialect_name
    return _PROVIDERS.get(name, name)


def _server(route: Route) -> Attributes:
    """Where an upstream is."""
    url = urlsplit(route.upstream.base_url)
    port = url.port or (443 if url.scheme == "https" else 80)
    return {"server.address": url.hostname or "", "server.port": port}


class Otlp:
    """The collector's side: tracer and observer of one gateway. `close` sends what waits."""

    def __init__(
        self, settings: Settings, labels: Labels, scrub: Scrubber, logger: logging.Logger
    ) -> None:
        endpoint = settings.endpoint
        assert endpoint is not None
        resource = Resource.create(
            {
                "service.name": "tokenwire",
                "service.version": __version__,
                "service.instance.id": str(uuid.uuid4()),
            },
            SCHEMA,
        )
        self._logger = logger
        self.tracer: Tracer | None = None
        self.observer: Meter | None = None
        self._closers: list[Callable[[], object]] = []
        self._exporter: _Counting | None = None
        self._queue: _Bounded | None = None
        if settings.traces:
            sender = OTLPSpanExporter(endpoint, timeout=_SEND_SECONDS)
            self._exporter = _Counting(sender)
            self._queue = _Bounded(self._exporter, settings.queue)
            spans = TracerProvider(
                sampler=ParentBasedTraceIdRatio(settings.sampling),
                resource=resource,
                shutdown_on_exit=False,
            )
            spans.add_span_processor(self._queue)
            self._closers.append(spans.shutdown)
            self.tracer = Tracer(spans, settings.propagate, scrub)
        if settings.metrics:
            reader = PeriodicExportingMetricReader(
                OTLPMetricExporter(endpoint, timeout=_SEND_SECONDS),
                export_interval_millis=settings.interval * 1000,
                export_timeout_millis=_SEND_SECONDS * 1000,
            )
            meters = MeterProvider((reader,), resource=resource, shutdown_on_exit=False)
            self._closers.append(meters.shutdown)
            self.observer = Meter(meters, labels)

    def spans(self) -> Mapping[str, int]:
        """What became of the spans that have ended: as telemetry.SPANS."""
        if self._exporter is None or self._queue is None:
            return {}
        exporter = self._exporter
        return {
            "sent": exporter.sent,
            "failed": exporter.failed,
            "dropped": self._queue.dropped,
        }

    async def close(self) -> None:
        """Sends what waits, for a few seconds at most: a collector that is away keeps nobody. Says
        what was lost since the start."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def work() -> None:
            for close in self._closers:
                close()
            loop.call_soon_threadsafe(done.set)

        # Not of an executor: the process would wait for it in the end.
        threading.Thread(target=work, name="otlp-close", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                await done.wait()
        counts = self.spans()
        if self._queue is not None and self._queue.ended > counts["sent"]:
            fields = {"ended": self._queue.ended, **counts}
            self._logger.warning("spans lost", extra={"fields": fields})


class _Counting(SpanExporter):
    """Counts what was sent. Only the one thread that sends comes here."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.taken = self.sent = self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends a batch."""
        self.taken += len(spans)
        try:
            result = self._exporter.export(spans)
        except Exception:
            self.failed += len(spans)
            raise
        if result is SpanExportResult.SUCCESS:
            self.sent += len(spans)
        else:
            self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _Bounded(BatchSpanProcessor):
    """A queue that counts what it has no room for. Only the event loop puts in."""

    def __init__(self, exporter: _Counting, most: int) -> None:
        # One more than may wait, so that the library's own queue never drops without counting.
        batch = min(_BATCH, most)
        super().__init__(exporter, max_queue_size=most + 1, max_export_batch_size=batch)
        self._counting = exporter
        self._room = most
        self._put = 0
        self.ended = self.dropped = 0

    def on_end(self, span: ReadableSpan) -> None:
        """A span has ended."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        self.ended += 1
        if self._put - self._counting.taken >= self._room:
            self.dropped += 1
            return
        self._put += 1
        super().on_end(span)


class Tracer:
    """Makes spans; as telemetry.Tracer."""

    def __init__(self, provider: TracerProvider, propagate: bool, scrub: Scrubber) -> None:
        self._spans = provider.get_tracer("tokenwire", __version__, schema_url=SCHEMA)
        self._propagator = TraceContextTextMapPropagator()
        self._propagate = propagate
        self._scrub = scrub

    def call(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> CallSpan:
        """A server span, within the caller's trace if it brings one that is well-formed."""
        found: dict[str, list[str]] = {"traceparent": [], "tracestate": []}
        for name, value in metadata:
            if name in found:
                found[name].append(str(value))
        parent = Context()
        if len(found["traceparent"]) == 1:
            parent = self._propagator.extract(
                {
                    "traceparent": found["traceparent"][0],
                    "tracestate": ",".join(found["tracestate"]),
                },
                parent,
            )
        span = self._spans.start_span(
            method,
            parent,
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method},
            record_exception=False,
        )
        return CallSpan(span, self)

    def attempt(
        self, parent: Span, route: Route, encoded: Encoded, chat: Any, streams: bool
    ) -> AttemptSpan:
        """A client span within that of its RPC."""
        operation = "chat" if route.model_name else "list_models"
        attributes: Attributes = {}
        if parent.is_recording():
            attributes = {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": provider(route),
                **_server(route),
            }
            if route.model_name:
                attributes["gen_ai.request.model"] = self.clean(route.model_name)
                attributes["gen_ai.request.stream"] = streams
            if encoded.max_completion_tokens:
                attributes["gen_ai.request.max_tokens"] = encoded.max_completion_tokens
            for name, convention in _PARAMETERS.items():
                if route.model_name and chat.params.HasField(name):
                    attributes[f"gen_ai.request.{convention}"] = getattr(chat.params, name)
        model = attributes.get("gen_ai.request.model", "")
        span = self._spans.start_span(
            f"{operation} {model}".rstrip(),
            set_span_in_context(parent, Context()),
            SpanKind.CLIENT,
            attributes,
            record_exception=False,
        )
        headers: dict[str, str] = {}
        if self._propagate:
            self._propagator.inject(headers, set_span_in_context(span, Context()))
        return AttemptSpan(span, headers, self)

    def clean(self, text: str) -> str:
        """Without what looks like a secret: callers and upstreams wrote it."""
        return self._scrub(text)[:200]


class CallSpan:
    """As telemetry.CallSpan."""

    def __init__(self, span: Span, tracer: Tracer) -> None:
        self._span = span
        self._tracer = tracer
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def attempt(
        self, route: Route, encoded: Encoded, chat: chat_service_pb2.ChatRequest, streams: bool
    ) -> AttemptSpan:
        """An attempt begins."""
        return self._tracer.attempt(self._span, route, encoded, chat, streams)

    def end(self, event: CallEvent) -> None:
        """It ended."""
        span = self._span
        if span.is_recording():
            attributes: Attributes = {
                "rpc.status_code": event.code,
                "tokenwire.request_id": event.request_id,
                "tokenwire.attempts": event.attempts,
                "tokenwire.retries": event.retries,
                "tokenwire.queue_seconds": event.queue_seconds,
                "tokenwire.key_seconds": event.key_seconds,
                "tokenwire.backoff_seconds": event.backoff_seconds,
            }
            if event.caller:
                attributes["tokenwire.caller"] = event.caller
            if event.reason:
                attributes["tokenwire.reason"] = event.reason
            if event.model:
                attributes["gen_ai.request.model"] = self._tracer.clean(event.model)
            if event.attempts:
                attributes["tokenwire.upstream"] = event.upstream
                attributes["tokenwire.key_id"] = event.key_id
            if event.first_token_seconds is not None:
                attributes["tokenwire.first_token_seconds"] = event.first_token_seconds
            span.set_attributes(attributes | _usage(event))
            if event.code in _SERVER_ERRORS:
                span.set_attribute("error.type", event.code)
                span.set_status(StatusCode.ERROR)
        span.end()


class AttemptSpan:
    """As telemetry.AttemptSpan."""

    def __init__(self, span: Span, headers: Mapping[str, str], tracer: Tracer) -> None:
        self._span = span
        self._tracer = tracer
        self.headers = headers

    def answered(self, header: chat_service_pb2.ResponseHeader) -> None:
        """The upstream has begun to answer."""
        if self._span.is_recording():
            if header.id:
                self._span.set_attribute("gen_ai.response.id", self._tracer.clean(header.id))
            self._span.set_attribute("gen_ai.response.model", self._tracer.clean(header.model))

    def finished(self, reasons: Iterable[chat_pb2.FinishReason.ValueType]) -> None:
        """Why each choice ended."""
        if self._span.is_recording():
            names = [chat_pb2.FinishReason.Name(reason) for reason in reasons]
            words = [name.removeprefix("FINISH_REASON_").lower() for name in names]
            self._span.set_attribute("gen_ai.response.finish_reasons", words)

    def end(self, event: AttemptEvent) -> None:
        """It ended."""
        span = self._span
        if span.is_recording():
            attributes: Attributes = {
                "tokenwire.request_id": event.request_id,
                "tokenwire.upstream": event.upstream,
                "tokenwire.key_id": event.key_id,
                "tokenwire.attempt": event.number,
                "tokenwire.key_seconds": event.key_seconds,
            }
            if event.http_status:
                attributes["http.response.status_code"] = event.http_status
            if event.first_token_seconds is not None:
                attributes["gen_ai.response.time_to_first_chunk"] = event.first_token_seconds
            if event.upstream_code:
                attributes["tokenwire.upstream_code"] = self._tracer.clean(event.upstream_code)
            if event.fault == ABANDONED:
                attributes["tokenwire.abandoned"] = True
            elif event.fault:
                attributes["error.type"] = event.fault
                span.set_status(StatusCode.ERROR)
            span.set_attributes(attributes | _usage(event))
        span.end()


def _usage(event: AttemptEvent | CallEvent) -> Attributes:
    if not event.prompt_tokens and not event.completion_tokens:
        return {}
    return {
        "gen_ai.usage.input_tokens": event.prompt_tokens,
        "gen_ai.usage.output_tokens": event.completion_tokens,
        "tokenwire.usage_estimated": event.usage_estimated,
    }


class Meter:
    """An observer that records the conventions' histograms."""

    def __init__(self, provider: MeterProvider, labels: Labels) -> None:
        meter = provider.get_meter("tokenwire", __version__, schema_url=SCHEMA)

        def histogram(name: str, unit: str, told: str, bounds: Sequence[float]) -> Any:
            return meter.create_histogram(
                name, unit, told, explicit_bucket_boundaries_advisory=bounds
            )

        self._rpc_seconds = histogram(
            "rpc.server.call.duration", "s", "Duration of an incoming RPC.", _RPC_SECONDS
        )
        self._operation_seconds = histogram(
            "gen_ai.client.operation.duration",
            "s",
            "Duration of a request to an upstream.",
            _OPERATION_SECONDS,
        )
        self._first_chunk = histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            "s",
            "From a request to an upstream to the first text of its stream.",
            _FIRST_SECONDS,
        )
        self._tokens = histogram(
            "gen_ai.client.token.usage", "{token}", "Tokens of a request.", _TOKENS
        )
        self._labels = labels
        self._made_for = labels.config
        self._routes: dict[tuple[str, str], Attributes] = {}  # bounded as the names are

    def attempt(self, event: AttemptEvent) -> None:
        """Records it."""
        name = self._labels.sent.label(event.model, answered=not event.fault)
        known = self._route(event.upstream, name)
        attributes = known
        if event.fault:
            attributes = {**known, "error.type": event.fault}
        self._operation_seconds.record(event.seconds, attributes)
        if event.first_token_seconds is not None:
            self._first_chunk.record(event.first_token_seconds, known)
        if event.prompt_tokens:
            self._tokens.record(event.prompt_tokens, {**known, "gen_ai.token.type": "input"})
        if event.completion_tokens:
            self._tokens.record(event.completion_tokens, {**known, "gen_ai.token.type": "output"})

    def call(self, event: CallEvent) -> None:
        """Records it."""
        attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": event.method,
            "rpc.status_code": event.code,
        }
        if event.code in _SERVER_ERRORS:
            attributes["error.type"] = event.code
        self._rpc_seconds.record(event.seconds, attributes)

    def _route(self, upstream: str, name: str) -> Attributes:
        config = self._labels.config
        if config is not self._made_for:
            self._made_for, self._routes = config, {}
        known = self._routes.get((upstream, name))
        if known is None:
            known = {"gen_ai.operation.name": "chat" if name else "list_models"}
            if name:
                known["gen_ai.request.model"] = name
            for found in config.upstreams:
                if found.name == upstream:  # else it has left while this attempt ran
                    models = (m for m in config.models if m.upstream == upstream)
                    model = next((m for m in models if m.upstream_model == name), None)
                    route = Route(found, model, name)
                    known |= {"gen_ai.provider.name": provider(route), **_server(route)}
            self._routes[upstream, name] = known
        return known
