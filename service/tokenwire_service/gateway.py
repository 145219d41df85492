"""The policy: one request becomes attempts becomes one answer.

Before the first message to the caller, a failed attempt may be followed by another, as the
verdict table (errors.py) says, within the attempts, the retry budget and the deadline. After it
nothing is ever retried: the caller would get text twice, so it gets UPSTREAM_STREAM_INTERRUPTED.
OK is only ever said when the upstream proved that its answer is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

from tokenwire.v1 import (
    chat_pb2,
    chat_service_pb2,
    error_reason_pb2,
    model_service_pb2,
)
from tokenwire_service.admission import Admission, FullError
from tokenwire_service.config import Config, Key, Model
from tokenwire_service.errors import (
    TIMER,
    VERDICTS,
    Fault,
    GatewayError,
    RequestAction,
    UpstreamFault,
    Violation,
    reason_name,
)
from tokenwire_service.folding import Fold, unfolded
from tokenwire_service.keyring import (
    COOLDOWN_CAP,
    FIRST_COOLDOWN,
    STATED_OVERLOAD_CAP,
    Lease,
    Unavailable,
)
from tokenwire_service.layouts import estimate, prompt_tokens, so_far
from tokenwire_service.pool import Pool
from tokenwire_service.relay import HEARTBEAT_SECONDS, Outbox, Relayed, Write, text_bytes
from tokenwire_service.retry import Backoff, RetryBudget
from tokenwire_service.secret import Scrubber, Secret
from tokenwire_service.stops import StopFilter, cut
from tokenwire_service.telemetry import ABANDONED, AttemptEvent, Observer
from tokenwire_service.tokens import tokenizer_for
from tokenwire_service.upstream.client import Progress
from tokenwire_service.upstream.dialect import Encoded, Route
from tokenwire_service.wording import SAYINGS, printable, proto_path, said, trail, usage_facts

T = TypeVar("T")
StreamChatResponse = chat_service_pb2.StreamChatResponse

_MOST_ROUTES = 1024  # of names that pass through

_SHORTEST_ACCOUNT = 8  # characters; a shorter organization may be a plain word

_LAST_WORDS = 1.0  # seconds after the deadline for the last snapshots, if the caller reads

# How an upstream says that it has no list of its models.
_NO_LIST = frozenset(
    {
        error_reason_pb2.ERROR_REASON_INVALID_REQUEST,
        error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND,
    }
)


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

    @cached_property
    def prompt_tokens(self) -> int:
        """Estimated: what the limits of callers and of keys count beforehand."""
        return prompt_tokens(self.chat)


@dataclass
class Plan:
    """One way to answer a call: a route, its pool, and the request as that upstream wants it."""

    route: Route
    pool: Pool
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

    @property
    def committed(self) -> bool:
        """True once a message went to the caller: nothing may be retried from then on."""
        return self.outbox is not None and self.outbox.committed


class _Sink(Protocol):
    """Where a stream goes: an Outbox to a caller, or together."""

    @property
    def wake_at(self) -> float:
        """When to call `tick` though nothing arrived."""

    @property
    def delivered_bytes(self) -> int:
        """Of text, reasoning and tool calls so far."""

    async def tick(self) -> None:
        """Called at `wake_at`."""

    async def send(self, events: Sequence[StreamChatResponse]) -> None:
        """What arrived, without the end."""

    async def finish(self, events: Sequence[StreamChatResponse]) -> None:
        """The finishes and the trailer, after everything else."""


class _Gathered:
    """Keeps a stream for a caller who wants a whole answer; bounded as whole answers are."""

    wake_at = math.inf

    def __init__(self, limit: int) -> None:
        self.fold = Fold()
        self.delivered_bytes = 0
        self._limit = limit

    async def tick(self) -> None:
        """Nothing is sent before the end."""

    async def send(self, events: Sequence[StreamChatResponse]) -> None:
        """Keeps them. Raises UpstreamFault if they are too many."""
        self.delivered_bytes += sum(text_bytes(e.delta) for e in events if e.HasField("delta"))
        self.fold.add(events)
        if self.fold.size > self._limit:
            raise UpstreamFault(Fault.PROTOCOL, f"the answer exceeds {self._limit} bytes")

    async def finish(self, events: Sequence[StreamChatResponse]) -> None:
        """Keeps the end."""
        self.fold.add(events)


class Gateway:
    """Routes calls, makes attempts, keeps the promises above.

    `now` is the running loop's time in seconds and `sleep` asyncio's: tests run both in virtual
    time.
    """

    def __init__(
        self,
        config: Config,
        pools: Mapping[str, Pool],
        observer: Observer,
        *,
        backoff: Backoff,
        heartbeat: float = HEARTBEAT_SECONDS,
        relayed: Relayed | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._config = config
        self._pools = pools
        self._observer = observer
        self._backoff = backoff
        self._heartbeat = heartbeat
        self._relayed = relayed
        self._now = now
        self._sleep = sleep
        self._budget = RetryBudget(config.retries.budget, config.retries.budget_floor, now)
        self._admission = Admission(config.limits.in_flight, config.limits.queue, now)
        self._models: dict[str, Model] = {}
        self._routes: dict[str, Route] = {}
        for model in config.models:
            route = Route(pools[model.upstream].upstream, model, model.upstream_model)
            for name in (model.name, *model.aliases):
                self._models[name], self._routes[name] = model, route
        self._passthrough = next((u for u in config.upstreams if u.passthrough), None)
        # Routes remember what is spoken there. Callers choose the names, so they have no end.
        self._passed: dict[str, Route] = {}
        # Of each upstream, with the keys it was made for: to make one takes a while.
        self._scrubbers: dict[str, tuple[tuple[Key, ...], Scrubber]] = {}
        self.draining = False
        self._closed = False
        self._timers: set[asyncio.Timeout] = set()  # of the calls that run

    @property
    def in_flight(self) -> int:
        """Calls being served, streams until their end."""
        return self._admission.in_flight

    @property
    def waiting(self) -> int:
        """Calls that wait for a slot here; those of one upstream wait in its bulkhead."""
        return self._admission.waiting

    @property
    def retry_budget(self) -> float:
        """Retries that may be made now, over all calls."""
        return self._budget.balance

    # --- calls --------------------------------------------------------------------------

    async def chat(self, call: Call) -> chat_service_pb2.ChatResponse:
        """The whole answer. Raises GatewayError."""

        async def use(attempt: Attempt) -> chat_service_pb2.ChatResponse:
            if not attempt.plan.streams:
                return await self._fetched(call, attempt)
            gathered = _Gathered(self._config.limits.upstream_answer_bytes)
            await self._read(call, attempt, gathered)
            return gathered.fold.response()

        async with self._admitted(call):
            return await self._answer(call, use, stream=False)

    async def stream(
        self, call: Call, write: Write, *, cumulative: bool = False, max_delay: float = 0.0
    ) -> None:
        """Writes the answer's events as they arrive. Raises GatewayError; returning means OK."""
        outbox = Outbox(
            write,
            cumulative=cumulative,
            max_delay=max_delay,
            write_timeout=self._config.timeouts.write,
            started=call.started,
            now=self._now,
            heartbeat=self._heartbeat,
            relayed=self._relayed,
        )

        async def use(attempt: Attempt) -> None:
            attempt.outbox = outbox
            if attempt.plan.streams:
                await self._read(call, attempt, outbox)
                return
            events = unfolded(await self._fetched(call, attempt))
            ended = next(i for i, e in enumerate(events) if e.WhichOneof("event") == "finish")
            await outbox.send(events[:ended])
            await outbox.finish(events[ended:])

        try:
            async with self._admitted(call):
                await self._answer(call, use, stream=True, outbox=outbox)
        except GatewayError as error:
            if outbox.committed:
                call.usage = call.usage or estimate(call.chat, outbox.delivered_bytes)
                error.metadata = {**error.metadata, **usage_facts(call.usage)}
                if error.reason == error_reason_pb2.ERROR_REASON_UPSTREAM_TIMEOUT:
                    error.reason = error_reason_pb2.ERROR_REASON_UPSTREAM_STREAM_INTERRUPTED
                error.retry_helps, error.retry_after = False, None  # it would repeat the text
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(_LAST_WORDS, call.deadline - self._now())):
                    await outbox.fail(error)
            raise
        finally:
            call.first_token_at = outbox.first_delta_at
            if outbox.committed:
                call.usage = call.usage or estimate(call.chat, outbox.delivered_bytes)

    async def _fetched(self, call: Call, attempt: Attempt) -> chat_service_pb2.ChatResponse:
        """The upstream's answer, asked for and come as a whole."""
        plan = attempt.plan
        response = await plan.pool.client.fetch(plan.encoded, attempt.lease, attempt.progress)
        self._fill(response.header, call, attempt)
        cut(response, plan.encoded.stop)
        if response.HasField("usage"):
            call.usage = attempt.progress.usage = response.usage
        return response

    async def _read(self, call: Call, attempt: Attempt, sink: _Sink) -> None:
        """Hands over the upstream's stream as it comes. The end is handed over only of an answer
        that is proven complete."""
        plan = attempt.plan
        stops = StopFilter(plan.encoded.stop)
        complete = False
        async with plan.pool.client.open(plan.encoded, attempt.lease, attempt.progress) as answer:
            try:
                while (events := await answer.read(sink.wake_at)) is not None:
                    if not events:
                        await sink.tick()
                        continue
                    if events[0].WhichOneof("event") == "header":
                        self._fill(events[0].header, call, attempt)
                        # What waits on a probe waits no more.
                        self._accepted(attempt)
                        plan.pool.look()
                    await sink.send(stops.apply(events))
                tail = answer.finish()
                complete = True
                if tail[0].WhichOneof("event") == "header":
                    self._fill(tail[0].header, call, attempt)
                await sink.finish(stops.apply(tail))
            finally:
                usage = answer.usage
                if usage is not None and not complete:
                    usage = so_far(usage, sink.delivered_bytes)
                call.usage = attempt.progress.usage = usage

    async def models(self, call: Call) -> list[model_service_pb2.Model]:
        """Configured models, then what the pass-through upstream says it serves."""
        models = [self._describe(model) for model in self._config.models]
        upstream = self._passthrough
        if upstream is None:
            return models
        pool = self._pools[upstream.name]
        route = Route(upstream, None, "")
        encoded = pool.client.dialect(route).list_models(upstream)
        if encoded is None:
            return models
        plan = Plan(route, pool, encoded)

        async def ask(attempt: Attempt) -> list[model_service_pb2.Model]:
            return await pool.client.models(plan.encoded, attempt.lease, attempt.progress)

        try:
            async with self._admitted(call):
                listed = await self._held(call, plan, ask)
        except GatewayError as error:
            if error.reason not in _NO_LIST:
                raise
            listed = []
        known = set(self._models)
        for model in listed:
            if model.name not in known:
                model.upstream = upstream.name
                models.append(model)
        return models

    @asynccontextmanager
    async def _admitted(self, call: Call) -> AsyncIterator[None]:
        """Refuses calls while draining; ends the call at its deadline, whatever it is doing; adds
        to what went wrong what was tried."""
        if self._closed or not call.accepted:
            self.refuse_if_draining()
        seconds = call.deadline - self._now()
        if seconds <= 0:
            raise self._out_of_time(call)
        timer = asyncio.timeout(seconds)
        try:
            async with timer:
                self._timers.add(timer)
                try:
                    yield
                finally:
                    self._timers.discard(timer)
        except GatewayError as error:
            error.metadata = {**error.metadata, **trail(call.attempts)}
            raise
        except TimeoutError:
            if not timer.expired():
                raise
            raise self._out_of_time(call) from None

    def close(self) -> None:
        """Ends every call that still runs, now, with GATEWAY_DRAINING: their grace is over. What
        was accepted but has not begun, as the next item of a batch, does not begin."""
        self.draining = self._closed = True
        for timer in self._timers:
            if not timer.expired():  # at its deadline already, at this very moment
                timer.reschedule(asyncio.get_running_loop().time())

    def refuse_if_draining(self) -> None:
        """Raises GATEWAY_DRAINING once this instance takes nothing new."""
        if self.draining:
            raise _shutting_down({})

    def _out_of_time(self, call: Call) -> GatewayError:
        metadata = trail(call.attempts)
        if self._closed:
            return _shutting_down(metadata)
        if call.deadline_is_callers:
            return GatewayError(
                error_reason_pb2.ERROR_REASON_DEADLINE_EXCEEDED,
                "the caller's deadline passed",
                metadata={TIMER: "deadline", **metadata},
            )
        maximum = f"within the server's maximum of {self._config.timeouts.total:g} s"
        if not call.attempts:  # no upstream is to blame
            return GatewayError(
                error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED,
                f"no turn {maximum}",
                retry_after=FIRST_COOLDOWN,
                retry_helps=True,
                metadata={TIMER: "total", **metadata},
            )
        return GatewayError(
            error_reason_pb2.ERROR_REASON_UPSTREAM_TIMEOUT,
            f"no complete answer {maximum}",
            metadata={TIMER: "total", "upstream": call.attempts[-1].upstream, **metadata},
        )

    def route(self, name: str) -> Route:
        """Where a model's name leads. Raises MODEL_NOT_FOUND."""
        configured = self._routes.get(name) or self._passed.get(name)
        if configured is not None:
            return configured
        if self._passthrough is not None:
            if len(self._passed) >= _MOST_ROUTES:
                self._passed.clear()
            return self._passed.setdefault(name, Route(self._passthrough, None, name))
        raise GatewayError(
            error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND,
            f"no model {name[:80]!r} is configured, and no upstream passes names through",
            resource=("model", name[:200]),
        )

    def configured(self, name: str) -> model_service_pb2.Model | None:
        """The configured model of this name or alias."""
        model = self._models.get(name)
        return None if model is None else self._describe(model)

    def _describe(self, model: Model) -> model_service_pb2.Model:
        return model_service_pb2.Model(
            name=model.name,
            aliases=model.aliases,
            upstream=model.upstream,
            upstream_model=model.upstream_model,
            context_window_tokens=model.context_window_tokens or 0,
            max_completion_tokens=model.max_completion_tokens or 0,
            capabilities=model.capabilities,
            tokenizer=tokenizer_for(model.upstream_model, model).name,
        )

    # --- attempts -----------------------------------------------------------------------

    async def _answer(
        self,
        call: Call,
        use: Callable[[Attempt], Awaitable[T]],
        *,
        stream: bool,
        outbox: Outbox | None = None,
    ) -> T:
        """Asks the model's upstream, then those of its fallbacks, until one answers. If none does,
        waits for those that only cool, the soonest first; else the caller hears of the model it
        asked for. `outbox`: where a stream goes."""
        route = self.route(call.chat.model)
        names = route.model.fallbacks if route.model is not None else ()
        errors: list[GatewayError] = []
        told_at = self._now()  # when the first of them was
        cooling: list[tuple[float, int, Plan]] = []
        for index, name in enumerate((call.chat.model, *names)):
            plan = None
            try:
                plan = self._plan(call, self.route(name), stream=stream)
                plan.patient = not names
                return await self._held(call, plan, use)
            except GatewayError as error:
                passing = _FALL_OVER | _UNSUITED if errors else _FALL_OVER
                # Too large for this account's rate: another's may be higher.
                over_tier = plan is not None and plan.over_tier
                if outbox is not None and outbox.committed:
                    raise
                if error.reason not in passing and not over_tier:
                    raise
                if not errors:
                    told_at = self._now()
                errors.append(error)
                if plan is None or plan.patient:
                    continue
                if error.reason in _COOLING and error.retry_helps:
                    cooling.append((self._now() + (error.retry_after or 0.0), index, plan))
        for until, index, plan in sorted(cooling, key=lambda each: each[0]):
            if until >= call.deadline:
                break
            if plan.unpaid and not self._budget.withdraw():
                continue
            plan.patient = True
            try:
                return await self._held(call, plan, use)
            except GatewayError as error:
                passing = _FALL_OVER | _UNSUITED if index else _FALL_OVER
                if outbox is not None and outbox.committed:
                    raise
                if error.reason not in passing and not plan.over_tier:
                    raise
                if index == 0:
                    errors[0], told_at = error, self._now()
        told = errors[0]
        if names and told.retry_after is not None:  # others were asked meanwhile
            told.retry_after = max(0.0, told.retry_after - (self._now() - told_at))
        raise told

    def _plan(self, call: Call, route: Route, *, stream: bool) -> Plan:
        """`stream`: what the caller asked for; the upstream may have to be asked otherwise."""
        pool = self._pools[route.upstream.name]
        streams = {"always": True, "never": False}.get(route.streaming, stream)
        encoded = pool.client.dialect(route).encode(call.chat, route, stream=streams)
        return Plan(route, pool, encoded, streams)

    async def _held(self, call: Call, plan: Plan, use: Callable[[Attempt], Awaitable[T]]) -> T:
        """Holds a slot of the upstream, then one of the gateway, while the plan is tried: who
        waits for a slow upstream takes no slot from the others."""
        queued = _Stopwatch(self._now)
        try:
            async with (
                plan.pool.bulkhead.slot(call.deadline),
                self._admission.slot(call.deadline),
            ):
                queued.stop()
                return await self._attempts(call, plan, use)
        except FullError as full:
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED,
                "every slot and every place in the queue is taken",
                retry_after=full.retry_after,
                retry_helps=True,
            ) from None
        finally:
            call.queue_seconds += queued.stop()

    async def _attempts(self, call: Call, plan: Plan, use: Callable[[Attempt], Awaitable[T]]) -> T:
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
            try:
                answer = await use(attempt)
                self._succeeded(call, attempt)
                return answer
            except UpstreamFault as fault:
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
                slept = _Stopwatch(self._now)
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
        if sum(seen.values()) - seen[Fault.STALE_CONNECTION] >= self._config.retries.max_attempts:
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
        waited = _Stopwatch(self._now)
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
        made_for, scrub = self._scrubbers.get(name, ((), Scrubber(())))
        if made_for != keys:
            organizations = {*pool.upstream.organizations, *(each.organization for each in keys)}
            accounts = (
                Secret(each)
                for each in organizations
                if each is not None and len(each) >= _SHORTEST_ACCOUNT
            )
            scrub = Scrubber((*(each.secret for each in keys), *accounts))
            self._scrubbers[name] = keys, scrub
        return scrub

    # --- records ------------------------------------------------------------------------

    def _fill(self, header: chat_service_pb2.ResponseHeader, call: Call, attempt: Attempt) -> None:
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

    def _accepted(self, attempt: Attempt) -> None:
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
        self._accepted(attempt)
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
        self._observer.attempt(
            AttemptEvent(
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
            )
        )


class _Stopwatch:
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


def _shutting_down(metadata: Mapping[str, str]) -> GatewayError:
    return GatewayError(
        error_reason_pb2.ERROR_REASON_GATEWAY_DRAINING,
        "this gateway is shutting down",
        retry_after=0.0,
        retry_helps=True,
        metadata=metadata,
    )


# Errors that another model's upstream may not share. A caller's own mistake is none of them.
_FALL_OVER = frozenset(
    {
        error_reason_pb2.ERROR_REASON_RATE_LIMITED,
        error_reason_pb2.ERROR_REASON_UPSTREAM_QUOTA_EXHAUSTED,
        error_reason_pb2.ERROR_REASON_UPSTREAM_CREDENTIALS_REJECTED,
        error_reason_pb2.ERROR_REASON_UPSTREAM_ACCESS_DENIED,
        error_reason_pb2.ERROR_REASON_UPSTREAM_UNREACHABLE,
        error_reason_pb2.ERROR_REASON_UPSTREAM_TIMEOUT,
        error_reason_pb2.ERROR_REASON_UPSTREAM_OVERLOADED,
        error_reason_pb2.ERROR_REASON_UPSTREAM_ERROR,
        error_reason_pb2.ERROR_REASON_UPSTREAM_PROTOCOL_ERROR,
        error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND,  # configured here, unknown there
        error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED,
    }
)

# What passes by itself: worth waiting for where nobody else can serve.
_COOLING = frozenset(
    {
        error_reason_pb2.ERROR_REASON_RATE_LIMITED,
        error_reason_pb2.ERROR_REASON_UPSTREAM_OVERLOADED,
    }
)

# What a fallback may object to in a request that suits the model it was made for.
_UNSUITED = frozenset(
    {
        error_reason_pb2.ERROR_REASON_INVALID_REQUEST,
        error_reason_pb2.ERROR_REASON_UNSUPPORTED_PARAMETER,
        error_reason_pb2.ERROR_REASON_UNKNOWN_ROLE,
        error_reason_pb2.ERROR_REASON_CONTEXT_LENGTH_EXCEEDED,
        error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE,
    }
)

# Faults that are told with a QuotaFailure.
_QUOTAS = frozenset(
    {Fault.RATE_LIMITED, Fault.DAILY_QUOTA, Fault.QUOTA_EXHAUSTED, Fault.CREDIT_TOO_SMALL}
)

# Another key is another account: it need not be given time.
_AT_ONCE = frozenset({RequestAction.OTHER_KEY, RequestAction.OTHER_GROUP, RequestAction.KNOWN_KEY})
