"""The gateway in Prometheus' terms: events are counted as they come, state is read at each scrape.

Labels are bounded: callers, upstreams and keys are those of the configuration, and labels.py says
which names of models there are. docs/metrics.md lists every metric.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import accumulate
from typing import Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from tokenwire_service import __version__
from tokenwire_service.counters import Counters
from tokenwire_service.gateway import Gateway
from tokenwire_service.keyfiles import KeyFiles
from tokenwire_service.labels import Labels
from tokenwire_service.pool import Pool
from tokenwire_service.snapshot import RingView, State
from tokenwire_service.telemetry import ABANDONED, SPANS, AttemptEvent, CallEvent

_OK = "ok"  # the outcome of an attempt that was answered

# Upper bounds in seconds: those that OpenTelemetry's conventions for gen_ai advise, and longer
# ones, as models that think take.
_DURATIONS = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
)
_LONG = (*_DURATIONS, 163.84, 327.68, 655.36)
_FIRST = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10)
_WAITS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# Of these methods one RPC is one chat, so that its times are those of one answer.
_CHATS = frozenset({"tokenwire.v1.ChatService/Chat", "tokenwire.v1.ChatService/StreamChat"})


class Observed:
    """An observer that counts what happens. What it costs is per attempt and per call; of streams
    while they run only `relayed`."""

    def __init__(self, labels: Labels) -> None:
        # The time of its creation would be a second series beside each.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._labels = labels
        self.registry = registry = CollectorRegistry()
        # Kept by their labels in a `cache`: the library would look a series up under a lock.
        self._rpcs = cache(
            Counter(
                "tokenwire_rpcs",
                "RPCs that have ended.",
                ("method", "code", "reason", "caller"),
                registry=registry,
            ).labels
        )
        self._rpc_seconds = cache(
            Histogram(
                "tokenwire_rpc_duration_seconds",
                "From the arrival of an RPC to its status.",
                ("method",),
                buckets=_LONG,
                registry=registry,
            ).labels
        )
        self._first_token = cache(
            Histogram(
                "tokenwire_time_to_first_token_seconds",
                "From the arrival of a StreamChat to its first text.",
                ("upstream", "model"),
                buckets=_FIRST,
                registry=registry,
            ).labels
        )
        self._queue_seconds = Histogram(
            "tokenwire_queue_wait_seconds",
            "What a chat waited for slots.",
            buckets=_WAITS,
            registry=registry,
        )
        self._key_seconds = Histogram(
            "tokenwire_key_wait_seconds",
            "What a chat waited for keys.",
            buckets=_WAITS,
            registry=registry,
        )
        self._backoff_seconds = Counter(
            "tokenwire_backoff_seconds",
            "What calls slept between attempts.",
            registry=registry,
        )
        self._caller_tokens = cache(
            Counter(
                "tokenwire_caller_tokens",
                "Tokens of answers, delivered or cut off, by who asked.",
                ("caller", "type"),
                registry=registry,
            ).labels
        )
        self._attempts = cache(
            Counter(
                "tokenwire_attempts",
                "Requests to upstreams that have ended.",
                ("upstream", "model", "outcome"),
                registry=registry,
            ).labels
        )
        self._attempt_seconds = cache(
            Histogram(
                "tokenwire_attempt_duration_seconds",
                "From a request sent to an upstream to the end of its answer.",
                ("upstream",),
                buckets=_LONG,
                registry=registry,
            ).labels
        )
        self._upstream_first_token = cache(
            Histogram(
                "tokenwire_upstream_first_token_seconds",
                "From a request sent to an upstream to the first text of its stream.",
                ("upstream", "model"),
                buckets=_FIRST,
                registry=registry,
            ).labels
        )
        self._retries = cache(
            Counter(
                "tokenwire_retries",
                "Attempts that were not the first of their call, fallbacks included.",
                ("upstream",),
                registry=registry,
            ).labels
        )
        self._tokens = cache(
            Counter(
                "tokenwire_tokens",
                "Tokens of attempts, as upstreams told them or estimated.",
                ("upstream", "model", "type"),
                registry=registry,
            ).labels
        )
        self._deltas = 0
        self._gap_counts = [0] * (len(_GAPS) + 1)
        self._gap_seconds = 0.0
        registry.register(self)

    def attempt(self, event: AttemptEvent) -> None:
        """Counts it."""
        answered = not event.fault
        model = self._labels.sent.label(event.model, answered=answered)
        upstream = event.upstream
        self._attempts(upstream, model, event.fault or _OK).inc()
        self._attempt_seconds(upstream).observe(event.seconds)
        if event.number > 1:
            self._retries(upstream).inc()
        if event.first_token_seconds is not None:
            times = self._upstream_first_token(upstream, model)
            times.observe(event.first_token_seconds)
        if event.prompt_tokens:
            self._tokens(upstream, model, "prompt").inc(event.prompt_tokens)
        if event.completion_tokens:
            self._tokens(upstream, model, "completion").inc(event.completion_tokens)

    def call(self, event: CallEvent) -> None:
        """Counts it."""
        self._rpcs(event.method, event.code, event.reason, event.caller).inc()
        self._rpc_seconds(event.method).observe(event.seconds)
        # Who was refused before it could wait says nothing of waits.
        if event.method in _CHATS and (event.queue_seconds or event.attempts):
            self._queue_seconds.observe(event.queue_seconds)
            self._key_seconds.observe(event.key_seconds)
        self._backoff_seconds.inc(event.backoff_seconds)
        if event.first_token_seconds is not None:
            model = self._labels.asked.label(event.model, answered=event.code == "OK")
            self._first_token(event.upstream, model).observe(event.first_token_seconds)
        if event.prompt_tokens:
            self._caller_tokens(event.caller, "prompt").inc(event.prompt_tokens)
        if event.completion_tokens:
            self._caller_tokens(event.caller, "completion").inc(event.completion_tokens)

    def relayed(self, deltas: int, gap: float | None) -> None:
        """A stream has sent so many deltas at once, `gap` seconds after those before; None for its
        first. On the path of every token: no lock, no name, nothing made."""
        self._deltas += deltas
        if gap is not None:
            self._gap_counts[bisect_left(_GAPS, gap)] += 1
            self._gap_seconds += gap

    def collect(self) -> Iterator[Metric]:
        """What `relayed` counts."""
        deltas = CounterMetricFamily(
            "tokenwire_deltas", "Pieces of answers that streams have sent.", value=self._deltas
        )
        bounds = (*map(str, map(float, _GAPS)), "+Inf")
        counts = accumulate(self._gap_counts)
        gaps = HistogramMetricFamily(
            "tokenwire_inter_token_gap_seconds",
            "Between a delta of a stream and the next one.",
            list(zip(bounds, counts, strict=True)),
            self._gap_seconds,
        )
        yield from (deltas, gaps)


class ConfigState(Protocol):
    """Which configuration is in force."""

    @property
    def generation(self) -> int:
        """1 for that of the start; one more with each that was taken."""

    @property
    def failures(self) -> int:
        """How many were not taken since the start."""

    @property
    def problem(self) -> str:
        """Why the file, as it was read last, is not in force; empty where it is."""


class Pending(Protocol):
    """What of backlog.Backlog matters here."""

    @property
    def waiting(self) -> int:
        """Calls that have come and not begun."""

    @property
    def refused(self) -> int:
        """Calls that were refused for it since the start."""


class Standing:
    """A collector: how the gateway stands at the moment of a scrape. Read in the event loop and
    without an await, so that what it tells belongs together. `spans`: how many were sent, failed
    to be, and were dropped. `now`: monotonic seconds."""

    def __init__(
        self,
        gateway: Gateway,
        pools: Mapping[str, Pool],
        counters: Counters,
        files: KeyFiles,
        revision: ConfigState,
        *,
        backlog: Pending,
        spans: Callable[[], Mapping[str, int]] = dict,
        redis_away: Callable[[], bool] = bool,
        certificates_refused: Callable[[], bool] = bool,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateway = gateway
        self._pools = pools
        self._counters = counters
        self._files = files
        self._revision = revision
        self._spans = spans
        self._backlog = backlog
        self._redis_away = redis_away
        self._certificates_refused = certificates_refused
        self._now = now

    def collect(self) -> Iterator[Metric]:
        """Every family."""
        yield from self._whole()
        now = self._now()
        rings = {name: pool.ring.snapshot(now) for name, pool in self._pools.items()}
        yield from self._upstreams(rings)
        yield from self._keys(rings, now)

    def _whole(self) -> Iterator[Metric]:
        gateway = self._gateway
        yield InfoMetricFamily(
            "tokenwire_build", "The gateway's version.", {"version": __version__}
        )
        for name, told, value in (
            ("in_flight_calls", "Slots in use: chats, streams until their end.", gateway.in_flight),
            ("slots", "Chats that may run at once.", gateway.slots),
            ("pending_calls", "Calls that have come and not begun.", self._backlog.waiting),
            ("queued_calls", "Chats that wait for a slot of the gateway.", gateway.waiting),
            ("retry_budget", "Retries that may be made now.", gateway.retry_budget),
            ("loop_lag_seconds", "How late the event loop runs, on average.", gateway.lag.seconds),
            (
                "flush_hold_seconds",
                "For how long streams rest after a message; 0 while the event loop keeps up.",
                gateway.lag.hold,
            ),
            ("draining", "1 while new calls are refused, for good.", gateway.draining),
            (
                "key_files_unusable",
                "Files of keys with a problem; their last good keys are in force.",
                sum(bool(file.problem) for file in self._files.states),
            ),
            (
                "certificates_refused",
                "1 while the port's certificate files have a problem; the last good ones serve.",
                self._certificates_refused(),
            ),
            ("redis_away", "1 while a Redis that is configured is not there.", self._redis_away()),
            ("config_generation", "Which configuration is in force.", self._revision.generation),
            (
                "config_refused",
                "1 while the configuration file has a problem; the last good one is in force.",
                bool(self._revision.problem),
            ),
        ):
            yield GaugeMetricFamily(f"tokenwire_{name}", told, value=value)
        yield CounterMetricFamily(
            "tokenwire_config_reload_failures",
            "Configurations that were not taken.",
            value=self._revision.failures,
        )
        spans = CounterMetricFamily(
            "tokenwire_otlp_spans", "Spans for the OTLP collector.", labels=("outcome",)
        )
        for outcome, count in {**dict.fromkeys(SPANS, 0), **self._spans()}.items():
            spans.add_metric((outcome,), count)
        yield spans

    def _upstreams(self, rings: Mapping[str, RingView]) -> Iterator[Metric]:
        drops = CounterMetricFamily(
            "tokenwire_drops",
            "Calls refused because there is too much to do already.",
            labels=("cause", "upstream"),
        )
        drops.add_metric(("gateway", ""), self._gateway.dropped)
        drops.add_metric(("loop_lag", ""), self._gateway.refused_late)
        drops.add_metric(("pending", ""), self._backlog.refused)
        for name, pool in self._pools.items():
            drops.add_metric(("upstream", name), pool.bulkhead.dropped)
        yield drops
        for name, told, read in _OF_UPSTREAMS:
            family = GaugeMetricFamily(f"tokenwire_{name}", told, labels=("upstream",))
            for upstream, pool in self._pools.items():
                family.add_metric((upstream,), read(pool))
            yield family
        closures = GaugeMetricFamily(
            "tokenwire_closures",
            "What is closed: each key for itself or with its group, or an upstream as a whole.",
            labels=("upstream", "scope", "state", "fault"),
        )
        for upstream, ring in rings.items():
            found = Tally(
                (each.scope.value, each.state.value, each.fault.value if each.fault else "")
                for each in (*ring.closures, *(c for key in ring.keys for c in key.closures))
            )
            for why, count in sorted(found.items()):
                closures.add_metric((upstream, *why), count)
        yield closures

    def _keys(self, rings: Mapping[str, RingView], now: float) -> Iterator[Metric]:
        number = GaugeMetricFamily(
            "tokenwire_keys", "Keys, by what they can do now.", labels=("upstream", "state")
        )
        state = GaugeMetricFamily(
            "tokenwire_key_state",
            "1 for the state in which a key is, 0 for the others.",
            labels=("upstream", "key", "state"),
        )
        in_flight = GaugeMetricFamily(
            "tokenwire_key_in_flight_requests",
            "Requests with a key now.",
            labels=("upstream", "key"),
        )
        opens = GaugeMetricFamily(
            "tokenwire_key_opens_seconds",
            "Until a key that is closed for all models opens: 0 if it is open, +Inf if never.",
            labels=("upstream", "key"),
        )
        attempts = CounterMetricFamily(
            "tokenwire_key_attempts",
            "Requests with a key that have ended.",
            labels=("upstream", "key", "outcome"),
        )
        tokens = CounterMetricFamily(
            "tokenwire_key_tokens",
            "Tokens of these requests.",
            labels=("upstream", "key", "type"),
        )
        for upstream, ring in rings.items():
            states = Tally(key.state for key in ring.keys)
            for each in State:
                number.add_metric((upstream, each.value), states[each])
            for key in ring.keys:
                whose = (upstream, key.id)
                for each in State:
                    state.add_metric((*whose, each.value), key.state is each)
                in_flight.add_metric(whose, key.in_flight)
                closed = (c.until for c in (*key.closures, *ring.closures) if c.model is None)
                opens.add_metric(whose, max(0.0, max(closed, default=-math.inf) - now))
                count = self._counters.key(upstream, key.id)
                attempts.add_metric((*whose, _OK), count.successes)
                attempts.add_metric((*whose, ABANDONED), count.abandoned)
                for fault, times in sorted(count.faults.items()):
                    attempts.add_metric((*whose, fault), times)
                tokens.add_metric((*whose, "prompt"), count.prompt_tokens)
                tokens.add_metric((*whose, "completion"), count.completion_tokens)
        yield from (number, state, in_flight, opens, attempts, tokens)


_OF_UPSTREAMS: tuple[tuple[str, str, Callable[[Pool], float]], ...] = (
    (
        "upstream_in_flight_calls",
        "Slots of an upstream in use.",
        lambda pool: pool.bulkhead.in_flight,
    ),
    ("upstream_slots", "Chats that may run at once there.", lambda pool: pool.bulkhead.slots),
    (
        "upstream_queued_calls",
        "Chats that wait for a slot of an upstream.",
        lambda pool: pool.bulkhead.waiting,
    ),
    ("key_waiting_calls", "Chats that wait for a key of an upstream.", lambda pool: pool.waiting),
    (
        "keys_generation",
        "How often the keys of an upstream were set.",
        lambda pool: pool.ring.generation,
    ),
)


def exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The page that Prometheus reads, and its content type: as text, or in OpenMetrics where the
    header `accept` asks for it."""
    encode, kind = choose_encoder(accept)
    return encode(registry), kind


def watch_process(registry: CollectorRegistry) -> None:
    """Adds what the system tells of this process: memory, processor time, open files, start."""
    ProcessCollector(registry=registry)
