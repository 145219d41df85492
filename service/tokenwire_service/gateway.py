"""The policy: one request becomes one answer, of whichever upstream can give it.

Before the first message to the caller, a failed attempt may be followed by another (attempts.py),
and an upstream by that of a fallback. After it nothing is ever retried: the caller would get text
twice, so it gets UPSTREAM_STREAM_INTERRUPTED.
OK is only ever said when the upstream proved that its answer is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

from tokenwire.v1 import chat_service_pb2, error_reason_pb2, model_service_pb2
from tokenwire_service.admission import Admission, FullError
from tokenwire_service.attempts import Attempt, Attempts, Call, Plan, Stopwatch
from tokenwire_service.config import Config, Model
from tokenwire_service.errors import TIMER, Fault, GatewayError, UpstreamFault, bare
from tokenwire_service.folding import Fold, unfolded
from tokenwire_service.keyring import FIRST_COOLDOWN
from tokenwire_service.layouts import estimate, so_far
from tokenwire_service.looplag import LoopLag
from tokenwire_service.pool import Pool
from tokenwire_service.relay import HEARTBEAT_SECONDS, Outbox, Relayed, Write, text_bytes
from tokenwire_service.retry import Backoff, RetryBudget
from tokenwire_service.stops import StopFilter, cut
from tokenwire_service.telemetry import Observer
from tokenwire_service.tokens import tokenizer_for
from tokenwire_service.upstream.dialect import Route
from tokenwire_service.wording import trail, usage_facts

T = TypeVar("T")
StreamChatResponse = chat_service_pb2.StreamChatResponse

_MOST_ROUTES = 1024  # of names that pass through

_LAST_WORDS = 1.0  # seconds after the deadline for the last snapshots, if the caller reads

# How an upstream says that it has no list of its models.
_NO_LIST = frozenset(
    {
        error_reason_pb2.ERROR_REASON_INVALID_REQUEST,
        error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND,
    }
)


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

    async def send(self, events: Sequence[StreamChatResponse], pieces: int = 1) -> None:
        """What arrived, without the end; of how many pieces of the upstream's."""

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

    async def send(self, events: Sequence[StreamChatResponse], pieces: int = 1) -> None:
        """Keeps them. Raises UpstreamFault if they are too many."""
        self.delivered_bytes += sum(text_bytes(e.delta) for e in events if e.HasField("delta"))
        self.fold.add(events)
        if self.fold.size > self._limit:
            raise UpstreamFault(Fault.PROTOCOL, f"the answer exceeds {self._limit} bytes")

    async def finish(self, events: Sequence[StreamChatResponse]) -> None:
        """Keeps the end."""
        self.fold.add(events)


class _Running:
    """The calls that run, and whether more may begin; of a gateway and those it was before."""

    def __init__(self) -> None:
        self.draining = False
        self.closed = False
        self.refused_late = 0  # calls, since the start
        self.timers: set[asyncio.Timeout] = set()


class Gateway:
    """Routes calls, makes attempts, keeps the promises above.

    `now` is the running loop's time in seconds and `sleep` asyncio's: tests run both in virtual
    time. A configuration holds for one gateway. Where another takes its place, the new one is told
    what was `before`: calls that run there go on there, and both share slots, the retry budget and
    the drain.
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
        lag: LoopLag | None = None,
        before: Gateway | None = None,
    ) -> None:
        self.config = config
        self._pools = dict(pools)
        self._clients = {name: pool.client for name, pool in pools.items()}
        self._heartbeat = heartbeat
        self._relayed = relayed
        self.lag = lag or LoopLag(now)
        self._now = now
        retries, limits = config.retries, config.limits
        if before is None:
            self._budget = RetryBudget(retries.budget, retries.budget_floor, now)
            self._admission = Admission(limits.in_flight, limits.queue, now)
            self._running = _Running()
        else:
            self._budget, self._admission = before._budget, before._admission
            self._running = before._running
            self._budget.change(retries.budget, retries.budget_floor)
            self._admission.resize(limits.in_flight, limits.queue)
        self._attempts = Attempts(
            retries.max_attempts,
            self._budget,
            observer,
            backoff=backoff,
            now=now,
            sleep=sleep,
        )
        self._models: dict[str, Model] = {}
        # Routes remember what is spoken there. Those that pass are apart: callers choose the names,
        # so they have no end.
        self._routes: dict[str, Route] = {}
        self._passed: dict[str, Route] = {}
        for model in config.models:
            route = Route(self._clients[model.upstream].upstream, model, model.upstream_model)
            for name in (model.name, *model.aliases):
                self._models[name], self._routes[name] = model, route
        self._passthrough = next((u for u in config.upstreams if u.passthrough), None)

    @property
    def draining(self) -> bool:
        """Whether new calls are refused."""
        return self._running.draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._running.draining = draining

    @property
    def slots(self) -> int:
        """Calls that may be served at once."""
        return self._admission.slots

    @property
    def in_flight(self) -> int:
        """Calls being served, streams until their end."""
        return self._admission.in_flight

    @property
    def waiting(self) -> int:
        """Calls that wait for a slot here; those of one upstream wait in its bulkhead."""
        return self._admission.waiting

    @property
    def dropped(self) -> int:
        """Calls refused for want of a slot here and of a place to wait for one."""
        return self._admission.dropped

    @property
    def refused_late(self) -> int:
        """Calls refused because the event loop ran late."""
        return self._running.refused_late

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
            gathered = _Gathered(self.config.limits.upstream_answer_bytes)
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
            write_timeout=self.config.timeouts.write,
            started=call.started,
            now=self._now,
            heartbeat=self._heartbeat,
            relayed=self._relayed,
        )

        def use(attempt: Attempt) -> Awaitable[None]:
            attempt.outbox = outbox
            # Not awaited here: each coroutine on the way is woken for each token.
            return self._read(call, attempt, outbox) if attempt.plan.streams else whole(attempt)

        async def whole(attempt: Attempt) -> None:
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
            outbox.close()
            call.first_token_at = outbox.first_delta_at
            if outbox.committed:
                call.usage = call.usage or estimate(call.chat, outbox.delivered_bytes)

    async def _fetched(self, call: Call, attempt: Attempt) -> chat_service_pb2.ChatResponse:
        """The upstream's answer, asked for and come as a whole."""
        plan = attempt.plan
        response = await plan.client.fetch(plan.encoded, attempt.lease, attempt.progress)
        self._attempts.fill(response.header, call, attempt)
        cut(response, plan.encoded.stop)
        if attempt.span is not None:
            attempt.span.finished(choice.finish_reason for choice in response.choices)
        if response.HasField("usage"):
            call.usage = attempt.progress.usage = response.usage
        return response

    async def _read(self, call: Call, attempt: Attempt, sink: _Sink) -> None:
        """Hands over the upstream's stream as it comes. The end is handed over only of an answer
        that is proven complete."""
        plan = attempt.plan
        stops = StopFilter(plan.encoded.stop)
        complete = False
        async with plan.client.open(plan.encoded, attempt.lease, attempt.progress) as answer:
            try:
                while (events := await answer.read(sink.wake_at)) is not None:
                    if not events:
                        await sink.tick()
                        continue
                    if events[0].WhichOneof("event") == "header":
                        self._attempts.fill(events[0].header, call, attempt)
                        # What waits on a probe waits no more.
                        self._attempts.accepted(attempt)
                        plan.pool.look()
                    hold = self.lag.hold
                    if hold:
                        answer.pause(hold)
                    await sink.send(stops.apply(events), answer.pieces)
                    if hold:
                        await answer.rest()
                tail = answer.finish()
                complete = True
                if tail[0].WhichOneof("event") == "header":
                    self._attempts.fill(tail[0].header, call, attempt)
                if attempt.span is not None:
                    ends = (e.finish for e in tail if e.HasField("finish"))
                    attempt.span.finished(end.finish_reason for end in ends)
                await sink.finish(stops.apply(tail))
            finally:
                usage = answer.usage
                if usage is not None and not complete:
                    usage = so_far(usage, sink.delivered_bytes)
                call.usage = attempt.progress.usage = usage

    async def models(self, call: Call) -> list[model_service_pb2.Model]:
        """Configured models, then what the pass-through upstream says it serves."""
        models = [self._describe(model) for model in self.config.models]
        upstream = self._passthrough
        if upstream is None:
            return models
        pool = self._pools[upstream.name]
        route = Route(upstream, None, "")
        client = self._clients[upstream.name]
        encoded = client.dialect(route).list_models(upstream)
        if encoded is None:
            return models
        plan = Plan(route, pool, client, encoded)

        async def ask(attempt: Attempt) -> list[model_service_pb2.Model]:
            return await plan.client.models(plan.encoded, attempt.lease, attempt.progress)

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
        if self._running.closed or not call.accepted:
            self.refuse_if_draining()
        if not call.accepted:
            self.refuse_if_late()
        seconds = call.deadline - self._now()
        if seconds <= 0:
            raise self._out_of_time(call)
        timer = asyncio.timeout(seconds)
        try:
            async with timer:
                self._running.timers.add(timer)
                try:
                    yield
                finally:
                    self._running.timers.discard(timer)
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
        self._running.draining = self._running.closed = True
        for timer in self._running.timers:
            if not timer.expired():  # at its deadline already, at this very moment
                timer.reschedule(asyncio.get_running_loop().time())

    def refuse_if_late(self) -> None:
        """Raises GATEWAY_OVERLOADED while the event loop runs so late that one call more would
        slow down all that run."""
        if self.lag.seconds > self.config.limits.loop_lag:
            self._running.refused_late += 1
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED,
                f"this instance runs {self.lag.seconds * 1000:.0f} ms late",
                retry_after=FIRST_COOLDOWN,
                retry_helps=True,
            )

    def refuse_if_draining(self) -> None:
        """Raises GATEWAY_DRAINING once this instance takes nothing new."""
        if self.draining:
            raise _shutting_down({})

    def _out_of_time(self, call: Call) -> GatewayError:
        metadata = trail(call.attempts)
        if self._running.closed:
            return _shutting_down(metadata)
        if call.deadline_is_callers:
            return GatewayError(
                error_reason_pb2.ERROR_REASON_DEADLINE_EXCEEDED,
                "the caller's deadline passed",
                metadata={TIMER: "deadline", **metadata},
            )
        maximum = f"within the server's maximum of {self.config.timeouts.total:g} s"
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
        known = self._routes.get(name) or self._passed.get(name)
        if known is not None:
            return known
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

    # --- who answers -----------------------------------------------------------------------

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
                errors.append(bare(error))
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
                    errors[0], told_at = bare(error), self._now()
        told = errors[0]
        if names and told.retry_after is not None:  # others were asked meanwhile
            told.retry_after = max(0.0, told.retry_after - (self._now() - told_at))
        raise told

    def _plan(self, call: Call, route: Route, *, stream: bool) -> Plan:
        """`stream`: what the caller asked for; the upstream may have to be asked otherwise."""
        name = route.upstream.name
        pool, client = self._pools[name], self._clients[name]
        streams = {"always": True, "never": False}.get(route.streaming, stream)
        encoded = client.dialect(route).encode(call.chat, route, stream=streams)
        return Plan(route, pool, client, encoded, streams)

    async def _held(self, call: Call, plan: Plan, use: Callable[[Attempt], Awaitable[T]]) -> T:
        """Holds a slot of the upstream, then one of the gateway, while the plan is tried: who
        waits for a slow upstream takes no slot from the others."""
        queued = Stopwatch(self._now)
        try:
            async with (
                plan.pool.bulkhead.slot(call.deadline),
                self._admission.slot(call.deadline),
            ):
                queued.stop()
                return await self._attempts.run(call, plan, use)
        except FullError as full:
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED,
                "every slot and every place in the queue is taken",
                retry_after=full.retry_after,
                retry_helps=True,
            ) from None
        finally:
            call.queue_seconds += queued.stop()


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
