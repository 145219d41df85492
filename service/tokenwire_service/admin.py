"""The RPCs of tokenwire.admin.v1: what the gateway holds, read out. It changes nothing."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NoReturn, Protocol

import grpc
from google.protobuf.duration_pb2 import Duration

from tokenwire.admin.v1 import admin_service_pb2
from tokenwire_service import __version__
from tokenwire_service.counters import Counters, KeyCount
from tokenwire_service.gateway import Gateway
from tokenwire_service.keyfiles import KeyFiles
from tokenwire_service.pool import Pool
from tokenwire_service.recent import Recent, Second
from tokenwire_service.reload import Revision
from tokenwire_service.secret import Scrubber
from tokenwire_service.snapshot import Closure, KeyView, Scope, State

_INTERVALS = (0.1, 60.0)  # seconds: the range of WatchStatusRequest.interval
_INTERVAL = 1.0  # seconds, where none is asked for


class _Context(Protocol):
    """What of gRPC's context is used here."""

    async def write(self, message: admin_service_pb2.WatchStatusResponse) -> None: ...

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn: ...


class AdminServicer:
    """Each answer is made at once, without an await, so that what it tells belongs together.

    Model names and codes are what callers and providers wrote: `scrub` takes keys out of them.
    """

    def __init__(
        self,
        gateway: Gateway,
        pools: Mapping[str, Pool],
        counters: Counters,
        recent: Recent,
        files: KeyFiles,
        revision: Revision,
        scrub: Scrubber,
        logger: logging.Logger,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._gateway = gateway
        self._pools = pools
        self._counters = counters
        self._recent = recent
        self._files = files
        self._revision = revision
        self._scrub = scrub
        self._logger = logger
        self._now = now
        self._sleep = sleep
        self._started = now()
        self._version = __version__

    async def ListKeys(  # noqa: N802  # the contract's name
        self, request: admin_service_pb2.ListKeysRequest, context: object
    ) -> admin_service_pb2.ListKeysResponse:
        """Every key as it stands."""
        try:
            return self._listing(self._now())
        except Exception:
            # gRPC would send the text of the exception, whatever that holds.
            self._logger.exception("defect", extra={"fields": {"method": "ListKeys"}})
        raise _DefectError

    async def WatchStatus(  # noqa: N802  # the contract's name
        self, request: admin_service_pb2.WatchStatusRequest, context: _Context
    ) -> None:
        """How it stands, again and again."""
        interval = _INTERVAL
        if request.HasField("interval"):
            interval = request.interval.ToNanoseconds() / 1e9
        least, most = _INTERVALS
        if not least <= interval <= most:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"interval: got {interval:g} s, expected {least:g} to {most:g} s",
            )
        number = 0
        while True:
            try:
                status = self.status(number)
            except Exception:
                self._logger.exception("defect", extra={"fields": {"method": "WatchStatus"}})
                raise _DefectError from None
            if status.seconds:
                number = status.seconds[-1].number + 1
            await context.write(status)
            await self._sleep(interval)

    def status(self, number: int) -> admin_service_pb2.WatchStatusResponse:
        """How it stands, with the seconds from `number` on, counted from the start."""
        return admin_service_pb2.WatchStatusResponse(
            listing=self._listing(self._now()),
            seconds=[self._second(each) for each in self._recent.since(number)],
        )

    def _second(self, second: Second) -> admin_service_pb2.Second:
        times = sorted(second.first_texts)
        return admin_service_pb2.Second(
            number=second.number,
            in_flight=second.in_flight,
            succeeded=second.succeeded,
            left=second.left,
            failed=[
                admin_service_pb2.ReasonCount(reason=reason, count=count)
                for reason, count in sorted(second.failed.items())
            ],
            attempts=second.attempts,
            retries=second.retries,
            faults=_faults(second.faults),
            prompt_tokens=second.prompt_tokens,
            completion_tokens=second.completion_tokens,
            deltas=second.deltas,
            first_text_p50=_quantile(times, 0.5),
            first_text_p99=_quantile(times, 0.99),
        )

    def _listing(self, now: float) -> admin_service_pb2.ListKeysResponse:
        gateway = self._gateway
        return admin_service_pb2.ListKeysResponse(
            gateway=admin_service_pb2.Gateway(
                version=self._version,
                uptime=_duration(now - self._started),
                in_flight=gateway.in_flight,
                queued=gateway.waiting,
                slots=gateway.slots,
                retry_budget=gateway.retry_budget,
                draining=gateway.draining,
                config_generation=self._revision.generation,
                config_failures=self._revision.failures,
                config_problem=self._text(self._revision.problem),
                calls=[
                    admin_service_pb2.CallCount(method=method, code=code, count=count)
                    for (method, code), count in sorted(self._counters.calls.items())
                ],
            ),
            upstreams=[self._upstream(name, pool, now) for name, pool in self._pools.items()],
            key_files=[
                admin_service_pb2.KeyFile(
                    path=self._text(str(file.path)), upstreams=file.upstreams, problem=file.problem
                )
                for file in self._files.states
            ],
        )

    def _upstream(self, name: str, pool: Pool, now: float) -> admin_service_pb2.Upstream:
        ring = pool.ring.snapshot(now)
        return admin_service_pb2.Upstream(
            name=name,
            keys_generation=ring.generation,
            waiting=pool.waiting,
            in_flight=pool.bulkhead.in_flight,
            queued=pool.bulkhead.waiting,
            slots=pool.bulkhead.slots,
            keys=[self._key(name, key, now) for key in ring.keys],
            closures=[self._closure(each, now) for each in ring.closures],
            quota_groups=[
                admin_service_pb2.QuotaGroup(
                    quota_group=group.quota_group,
                    model=self._text(group.model),
                    in_flight=group.in_flight,
                    concurrency_limit=None if math.isinf(group.limit) else group.limit,
                )
                for group in ring.groups
            ],
        )

    def _key(self, upstream: str, key: KeyView, now: float) -> admin_service_pb2.Key:
        return admin_service_pb2.Key(
            id=key.id,
            quota_group=key.quota_group,
            weight=key.weight,
            state=_STATES[key.state],
            in_flight=key.in_flight,
            closures=[self._closure(each, now) for each in key.closures],
            counters=self._counts(self._counters.key(upstream, key.id), now),
        )

    def _closure(self, closure: Closure, now: float) -> admin_service_pb2.Closure:
        return admin_service_pb2.Closure(
            scope=_SCOPES[closure.scope],
            model=self._text(closure.model or ""),
            state=_STATES[closure.state],
            fault=closure.fault.value if closure.fault is not None else "",
            opens_in=None if math.isinf(closure.until) else _duration(closure.until - now),
        )

    def _counts(self, count: KeyCount, now: float) -> admin_service_pb2.KeyCounters:
        last = None
        if count.error:
            last = admin_service_pb2.LastFault(
                fault=count.error,
                http_status=count.error_status,
                upstream_code=self._text(count.error_code),
                ago=_duration(now - count.error_at),
            )
        return admin_service_pb2.KeyCounters(
            attempts=count.attempts,
            successes=count.successes,
            abandoned=count.abandoned,
            faults=_faults(count.faults),
            prompt_tokens=count.prompt_tokens,
            completion_tokens=count.completion_tokens,
            last_used_ago=_duration(now - count.at) if count.attempts else None,
            last_fault=last,
        )

    def _text(self, text: str) -> str:
        """Lone surrogates, as in the name of a file that is not UTF-8, fit no message."""
        return self._scrub(text).encode(errors="replace").decode()


class _DefectError(Exception):
    def __str__(self) -> str:
        return "the gateway failed; its log tells more"


def _faults(faults: Mapping[str, int]) -> list[admin_service_pb2.FaultCount]:
    return [
        admin_service_pb2.FaultCount(fault=fault, count=count)
        for fault, count in sorted(faults.items())
    ]


def _quantile(ordered: Sequence[float], share: float) -> Duration | None:
    """The least of them that `share` of all do not exceed; None of none."""
    if not ordered:
        return None
    return _duration(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(int(max(0.0, seconds) * 1e9))
    return found


_STATES = {
    State.READY: admin_service_pb2.KEY_STATE_READY,
    State.PARTLY: admin_service_pb2.KEY_STATE_PARTLY,
    State.LIMITED: admin_service_pb2.KEY_STATE_LIMITED,
    State.PROBE_DUE: admin_service_pb2.KEY_STATE_PROBE_DUE,
    State.PROBING: admin_service_pb2.KEY_STATE_PROBING,
    State.COOLING: admin_service_pb2.KEY_STATE_COOLING,
    State.RETIRED: admin_service_pb2.KEY_STATE_RETIRED,
    State.LEAVING: admin_service_pb2.KEY_STATE_LEAVING,
}
_SCOPES = {
    Scope.KEY: admin_service_pb2.CLOSURE_SCOPE_KEY,
    Scope.KEY_MODEL: admin_service_pb2.CLOSURE_SCOPE_KEY_MODEL,
    Scope.GROUP: admin_service_pb2.CLOSURE_SCOPE_GROUP,
    Scope.GROUP_MODEL: admin_service_pb2.CLOSURE_SCOPE_GROUP_MODEL,
    Scope.UPSTREAM: admin_service_pb2.CLOSURE_SCOPE_UPSTREAM,
    Scope.UPSTREAM_MODEL: admin_service_pb2.CLOSURE_SCOPE_UPSTREAM_MODEL,
}
