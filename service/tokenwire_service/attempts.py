"""The attempts at one upstream for one call: when a failed one is followed by another.

The verdict table (errors.py) decides, within the number of attempts, the retry budget and the
deadline; nothing follows an attempt of which the caller has been told anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.config import Key
from tokenwire_service.errors import (
    VERDICTS,
    Fault,
    GatewayError,
    RequestAction,
    UpstreamFault,
    Violation,
    bare,
    reason_name,
)
from tokenwire_service.keyring import (
    COOLDOWN_CAP,
    FIRST_COOLDOWN,
    STATED_OVERLOAD_CAP,
    Lease,
    Unavailable,
)
from tokenwire_service.layouts import estimate, prompt_tokens
from tokenwire_service.pool import Pool
from tokenwire_service.relay import Outbox
from tokenwire_service.retry import Backoff, RetryBudget
from tokenwire_service.secret import Scrubber, Secret
from tokenwire_service.telemetry import ABANDONED, AttemptEvent, AttemptSpan, CallSpan, Observer
from tokenwire_service.upstream.client import Progress, UpstreamClient
from tokenwire_service.upstream.dialect import Encoded, Route
from tokenwire_service.wording import SAYINGS, printable, proto_path, said

T = TypeVar("T")

_SHORTEST_ACCOUNT = 8  # characters; a shorter organization may be a plain word


@dataclass
class Call:
    """One request on its way. Times are monotonic seconds."""

    chat: chat_service_pb2.ChatRequest
    request_id: str
    started: float
    deadline: float
    deadline_is_callers: bool
    accepted: bool = False  # before the drain: an item of a batch that runs already
    counted: bool = False  # among the calls of which retries are a share
    attempts: list[chat_service_pb2.UpstreamAttempt] = field(default_factory=list)
    usage: chat_pb2.Usage | None = None  # known at the end; estimated where the upstream was cut
    # Where its time went, seconds; for the record.
    queue_seconds: float = 0.0  # waiting for slots
    key_seconds: float = 0.0  # waiting for keys
    backoff_seconds: float = 0.0  # between attempts
    first_token_at: float | None = None  # of a stream
    span: CallSpan | None = None  # where the RPC is traced

    @cached_property
    def prompt_tokens(self) -> int:
        """Estimated: what the limits of callers and of keys count beforehand."""
        return prompt_tokens(self.chat)


@dataclass
class Plan:
    """One way to answer a call: a route, its pool, the client as it was configured when the call
    began, and the request as that upstream wants it."""

    route: Route
    pool: Pool
    client: UpstreamClient
    encoded: Encoded
    streams: bool = False  # whether the upstream is asked for a stream, whatever the caller gets
    patient: bool = True  # waits for what cools: not while there is another model to ask
    avoid: frozenset[str] = frozenset()  # quota groups that this request is too large for
    unpaid: bool = False  # going back to it is a retry that the budget has not granted yet
    seen: Counter[Fault] = field(default_factory=Counter)  # what its attempts met
    last: UpstreamFault | None = None

    @property
    def over_tier(self) -> bool:
        """Whether its last attempt found the request larger than an account's whole rate."""
        return self.last is not None and self.last.fault is Fault.OVER_TIER


@dataclass
class Attempt:
    """What one attempt needs, and whether the caller has been told anything."""

    plan: Plan
    lease: Lease
    progress: Progress
    started: float
    record: chat_service_pb2.UpstreamAttempt  # its entry in the trail the caller sees
    number: int  # among the attempts of its call, from 1
    waited: float  # seconds for its key
    outbox: Outbox | None = None
    accepted: bool = False  # the upstream has begun to answer
    span: AttemptSpan | None = None

    @property
    def committed(self) -> bool:
        """True once a message went to the caller: nothing may be retried from then on."""
        return self.outbox is not None and self.outbox.committed


class Attempts:
    """Makes attempts, `most` for one call at one upstream, and records each. `now` and `sleep`: as
    Gateway's."""

    def __init__(
        self,
        most: int,
        budget: RetryBudget,
        observer: Observer,
        *,
        backoff: Backoff,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._most = most
        self._budget = budget
        self._observer = observer
        self._backoff = backoff
        self._now = now
        self._sleep = sleep
        # Of each upstream, with the keys and organizations it was made for: to make one takes a
        # while.
        self._scrubbers: dict[str, tuple[tuple[tuple[Key, ...], frozenset[str]], Scrubber]] = {}

    async def run(self, call: Call, plan: Plan, use: Callable[[Attempt], Awaitable[T]]) -> T:
        """Calls `use` until it answers or the verdict table, the budget or time says no."""
        if not call.counted:
            call.counted = True
            self._budget.deposit()
        pool = plan.pool
        while True:
            waited = call.key_seconds
            lease = await self._lease(call, plan)
            waited = call.key_seconds - waited
            record = chat_service_pb2.UpstreamAttempt(
                upstream=pool.upstream.name, key_id=lease.key.id
            )
            call.attempts.append(record)
            number = len(call.attempts)
            # One connection died in the pool; so may have its neighbours.
            progress = Progress(fresh=plan.seen[Fault.STALE_CONNECTION] > 0)
            attempt = Attempt(plan, lease, progress, self._now(), record, number, waited)
            if call.span is not None:
                attempt.span = call.span.attempt(plan.route, plan.encoded, call.chat, plan.streams)
                progress.headers = attempt.span.headers
            try:
                answer = await use(attempt)
                self._succeeded(call, attempt)
                return answer
            except UpstreamFault as fault:
                bare(fault)  # the plan keeps it
                scrub = self._scrubber(pool, lease)
                fault.message = scrub(fault.message)
                fault.code = printable(scrub(fault.code))[:64]
                fault.param = scrub(fault.param)
                # What HTTP said, whatever an error inside a 200 says of itself.
                fault.http_status = attempt.progress.http_status or fault.http_status
                pool.ring.fail(lease, fault, self._now())
                self._failed(call, attempt, fault)
                if attempt.committed:
                    raise self._interrupted(call, attempt, fault) from None
                plan.last = fault
                plan.seen[fault.fault] += 1
                delay = self._delay(call, plan, lease, fault)
            except BaseException:
                self._ended(call, attempt, ABANDONED)
                raise
            finally:
                try:
                    self._settle(call, attempt)
                finally:
                    pool.release(lease)
            if delay > 0:
                slept = Stopwatch(self._now)
                try:
                    await self._sleep(delay)
                finally:
                    call.backoff_seconds += slept.stop()

    def _delay(self, call: Call, plan: Plan, lease: Lease, fault: UpstreamFault) -> float:
        """Seconds until the next attempt, or the error that says why there is none."""
        action, seen = VERDICTS[fault.fault].request, plan.seen
        give_up = self._error(call, plan.pool, plan.route, fault)
        if fault.should_retry is False:
            raise give_up
        if action is RequestAction.FAIL and not fault.should_retry:
            raise give_up
        if action is RequestAction.KNOWN_KEY and not (
            fault.should_retry or plan.pool.ring.served_elsewhere(lease)
        ):
            raise give_up
        if action is RequestAction.ONCE_MORE and seen[fault.fault] > 1:
            raise give_up
        if fault.fault is Fault.STALE_CONNECTION:
            return 0.0  # nothing reached the upstream: neither an attempt nor a retry
        if sum(seen.values()) - seen[Fault.STALE_CONNECTION] >= self._most:
            raise give_up
        if action is RequestAction.OTHER_GROUP:
            plan.avoid |= {lease.key.quota_group}
        if action in _AT_ONCE:
            delay = 0.0  # the key ring says when the next key is ready
        else:
            delay = self._backoff.delay(seen[fault.fault])
            if fault.retry_after is not None:
                delay = max(delay, give_up.retry_after or 0.0)
        asked_to_wait = delay > 0 and fault.retry_after is not None and not plan.patient
        if self._now() + delay >= call.deadline or asked_to_wait:
            give_up.retry_helps = fault.retry_after is not None  # a caller with more time may wait
            plan.unpaid = True
            raise give_up
        if not self._budget.withdraw():
            raise give_up
        return delay

    async def _lease(self, call: Call, plan: Plan) -> Lease:
        """A key, waiting for the soonest one if the deadline allows it and waiting may help."""
        pool, chat = plan.pool, call.chat
        cost = 0
        if pool.ring.counts_tokens:
            choices = max(1, chat.params.choice_count)
            cost = call.prompt_tokens + plan.encoded.max_completion_tokens * choices
        until = call.deadline if plan.patient else self._now()
        waited = Stopwatch(self._now)
        try:
            found = await pool.lease(
                plan.route.model_name,
                until,
                sticky=chat.prompt_cache_key,
                tokens=cost,
                avoid=plan.avoid,
                wait=not plan.over_tier,  # for a key that may refuse it, too
            )
        finally:
            call.key_seconds += waited.stop()
        if isinstance(found, Lease):
            return found
        if plan.last is not None and plan.over_tier:  # no other account is free to be asked
            raise self._error(call, pool, plan.route, plan.last)
        raise self._no_key(call, plan, found)

    # --- errors -------------------------------------------------------------------------

    def _error(self, call: Call, pool: Pool, route: Route, fault: UpstreamFault) -> GatewayError:
        """What the caller hears when this fault ends the request."""
        name = pool.upstream.name
        error = GatewayError(
            VERDICTS[fault.fault].reason,
            printable(f"upstream {name}: {said(fault)}"),
            retry_after=self._retry_after(fault),
            metadata=self._metadata(call, pool, fault),
        )
        if fault.fault is Fault.MODEL_NOT_FOUND:
            if route.model is not None and route.model_name != call.chat.model:
                # The caller's name is right; it is the configuration that leads nowhere.
                error.reason = error_reason_pb2.ERROR_REASON_UPSTREAM_ERROR
            else:
                error.resource = ("model", call.chat.model[:200])
        elif fault.fault is Fault.REFUSED and fault.param:
            path = proto_path(fault.param, call.chat)
            error.violations = (Violation(printable(path)[:100], printable(fault.message)),)
        elif fault.fault in _QUOTAS:
            error.quota = (f"upstream:{name}", SAYINGS[fault.fault])
        return error

    def _retry_after(self, fault: UpstreamFault) -> float | None:
        """What the upstream asked for; where it must be told and was not, the ring's own."""
        if fault.retry_after is None and fault.fault in (Fault.RATE_LIMITED, Fault.OVERLOADED):
            return FIRST_COOLDOWN
        if fault.retry_after is None and fault.fault is Fault.DAILY_QUOTA:
            return COOLDOWN_CAP
        if fault.retry_after is not None and fault.fault is Fault.OVERLOADED:
            return min(fault.retry_after, STATED_OVERLOAD_CAP)  # after that, a probe asks
        return fault.retry_after

    def _interrupted(self, call: Call, attempt: Attempt, fault: UpstreamFault) -> GatewayError:
        """After the commit every fault is this one: what was sent is a prefix, not the answer."""
        pool = attempt.plan.pool
        return GatewayError(
            error_reason_pb2.ERROR_REASON_UPSTREAM_STREAM_INTERRUPTED,
            printable(f"upstream {pool.upstream.name}: the stream ended early: {said(fault)}"),
            metadata=self._metadata(call, pool, fault),
        )

    def _no_key(self, call: Call, plan: Plan, found: Unavailable) -> GatewayError:
        """No key can serve before the deadline."""
        closed_by = found.fault or Fault.KEY_REJECTED
        fault = UpstreamFault(closed_by)
        if plan.last is not None and plan.last.fault is closed_by:
            fault = plan.last
        plan.last = fault  # what the caller hears: it says whether another model has its turn
        error = self._error(call, plan.pool, plan.route, fault)
        if found.worth_waiting(math.inf):
            error.retry_after = max(0.0, found.until - self._now())
            error.retry_helps = True
        return error

    def _metadata(self, call: Call, pool: Pool, fault: UpstreamFault) -> dict[str, str]:
        metadata = {"upstream": pool.upstream.name, "attempts": str(len(call.attempts))}
        if fault.http_status:
            metadata["upstreamStatus"] = str(fault.http_status)
        if fault.code:
            metadata["upstreamCode"] = fault.code
        return {**metadata, **fault.facts}

    def _scrubber(self, pool: Pool, lease: Lease) -> Scrubber:
        """What an upstream must not tell callers: keys, and the organizations behind them."""
        keys = pool.ring.known_keys
        if lease.key not in keys:  # it was removed meanwhile
            keys = (*keys, lease.key)
        name = pool.upstream.name
        organizations = {*pool.upstream.organizations, *(each.organization for each in keys)}
        organizations.add(lease.organization)  # it may be of a configuration before
        wanted = keys, frozenset(each for each in organizations if each)
        made_for, scrub = self._scrubbers.get(name, (None, Scrubber(())))
        if made_for != wanted:
            accounts = (Secret(each) for each in wanted[1] if len(each) >= _SHORTEST_ACCOUNT)
            scrub = Scrubber((*(each.secret for each in keys), *accounts))
            self._scrubbers[name] = wanted, scrub
        return scrub

    # --- records ------------------------------------------------------------------------

    def fill(self, header: chat_service_pb2.ResponseHeader, call: Call, attempt: Attempt) -> None:
        """What the gateway knows about the answer, beside what the upstream said."""
        plan = attempt.plan
        header.model = header.model or plan.route.model_name
        header.upstream = plan.route.upstream.name
        header.max_completion_tokens = plan.encoded.max_completion_tokens
        header.dropped_parameters.extend(plan.encoded.dropped)
        seconds = max(0.0, attempt.progress.first_byte_at - attempt.started)
        attempt.record.http_status = attempt.progress.http_status
        attempt.record.duration.FromNanoseconds(int(seconds * 1e9))
        header.attempts.extend(call.attempts)
        if attempt.span is not None:
            attempt.span.answered(header)

    def accepted(self, attempt: Attempt) -> None:
        """The upstream answers this request, though its stream may go on for long."""
        if attempt.accepted:
            return
        attempt.accepted = True
        ring = attempt.plan.pool.ring
        ring.succeed(attempt.lease)
        progress = attempt.progress
        ring.remaining(
            attempt.lease, progress.remaining_requests, progress.remaining_tokens, self._now()
        )

    def _succeeded(self, call: Call, attempt: Attempt) -> None:
        self.accepted(attempt)
        call.usage = attempt.progress.usage
        self._observe(call, attempt)

    def _usage(self, call: Call, attempt: Attempt) -> chat_pb2.Usage | None:
        """What the attempt cost, estimated where the upstream was cut off; None if unknown."""
        usage = attempt.progress.usage
        if usage is None and attempt.outbox is not None and attempt.committed:
            usage = estimate(call.chat, attempt.outbox.delivered_bytes)
        return usage

    def _settle(self, call: Call, attempt: Attempt) -> None:
        """Corrects what the request was expected to cost, where that is known."""
        ring, usage = attempt.plan.pool.ring, self._usage(call, attempt)
        if usage is not None:
            ring.settle(attempt.lease, usage.total_tokens)
        elif attempt.progress.http_status >= 400:
            ring.settle(attempt.lease, 0)  # it was refused

    def _failed(self, call: Call, attempt: Attempt, fault: UpstreamFault) -> None:
        attempt.record.error_reason = VERDICTS[fault.fault].reason
        self._ended(call, attempt, fault.fault.value, fault.code)

    def _ended(self, call: Call, attempt: Attempt, fault: str, code: str = "") -> None:
        attempt.record.http_status = attempt.progress.http_status
        seconds = self._now() - attempt.started
        attempt.record.duration.FromNanoseconds(int(seconds * 1e9))
        self._observe(call, attempt, fault, code)

    def _observe(self, call: Call, attempt: Attempt, fault: str = "", code: str = "") -> None:
        record, progress, outbox = attempt.record, attempt.progress, attempt.outbox
        usage = self._usage(call, attempt) or chat_pb2.Usage()
        first_token_at = outbox.first_delta_at if outbox is not None else None
        event = AttemptEvent(
            call.request_id,
            record.upstream,
            attempt.plan.route.model_name,
            record.key_id,
            record.http_status or progress.http_status,
            fault,
            code,
            self._now() - attempt.started,
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.estimated,
            number=attempt.number,
            reason=reason_name(record.error_reason),
            committed=attempt.committed,
            reused_connection=progress.reused_connection,
            key_seconds=attempt.waited,
            first_byte_seconds=_since(attempt.started, progress.first_byte_at or None),
            first_token_seconds=_since(attempt.started, first_token_at),
            trace_id="" if call.span is None else call.span.trace_id,
        )
        self._observer.attempt(event)
        if attempt.span is not None:
            attempt.span.end(event)


class Stopwatch:
    """Measures one span of time, until it is stopped for the first time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._began = now()
        self._seconds: float | None = None

    def stop(self) -> float:
        """Seconds from the beginning to the first stop."""
        if self._seconds is None:
            self._seconds = max(0.0, self._now() - self._began)
        return self._seconds


def _since(began: float, at: float | None) -> float | None:
    return None if at is None else max(0.0, at - began)


# Faults that are told with a QuotaFailure.
_QUOTAS = frozenset(
    {Fault.RATE_LIMITED, Fault.DAILY_QUOTA, Fault.QUOTA_EXHAUSTED, Fault.CREDIT_TOO_SMALL}
)

# Another key is another account: it need not be given time.
_AT_ONCE = frozenset({RequestAction.OTHER_KEY, RequestAction.OTHER_GROUP, RequestAction.KNOWN_KEY})
