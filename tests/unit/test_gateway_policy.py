"""The gateway's policy in virtual time: fallbacks, bulkheads, queues, estimates, the trail."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from simulation.vtime import run

from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.admission import Admission
from tokenwire_service.attempts import Call
from tokenwire_service.config import Config, Key, Limits, Model, Retries, Timeouts, Upstream
from tokenwire_service.errors import Fault, GatewayError, UpstreamFault
from tokenwire_service.gateway import Gateway
from tokenwire_service.keyring import KeyRing, Lease, Unavailable
from tokenwire_service.layouts import estimate, so_far
from tokenwire_service.pool import Pool
from tokenwire_service.retry import Backoff
from tokenwire_service.secret import Secret
from tokenwire_service.telemetry import ABANDONED, AttemptEvent, CallEvent
from tokenwire_service.upstream.client import Progress
from tokenwire_service.upstream.dialect import Encoded
from tokenwire_service.upstream.openai import OpenAI
from tokenwire_service.wording import proto_path

Event = chat_service_pb2.StreamChatResponse
Deed = str | float | Fault | UpstreamFault  # says it, is silent for so many seconds, meets it
Script = Sequence[Deed]

OVERLOADED = error_reason_pb2.ERROR_REASON_GATEWAY_OVERLOADED


def now() -> float:
    return asyncio.get_running_loop().time()


class Provider:
    """A scripted upstream that stands where UpstreamClient does: the n-th request gets the n-th
    script, the last one for ever. A fault that is met first is the answer's status."""

    def __init__(self, upstream: Upstream, *scripts: Script) -> None:
        self.upstream = upstream
        self.dialect = lambda route: OpenAI()
        self.asked: list[tuple[str, str]] = []  # (key, model)
        self.running = 0
        self.usage: chat_pb2.Usage | None = None  # told at the end
        self.usage_so_far: chat_pb2.Usage | None = None  # told at the beginning
        self.remaining: int | None = None  # requests in its window
        self._scripts = scripts

    async def fetch(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> chat_service_pb2.ChatResponse:
        response = chat_service_pb2.ChatResponse()
        message = response.choices.add().message
        async with self._request(lease, progress) as script:
            for deed in script:
                message.content += await _done(deed)
        if self.usage is not None:
            response.usage.CopyFrom(self.usage)
        return response

    @asynccontextmanager
    async def open(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> AsyncIterator[Answer]:
        async with self._request(lease, progress) as script:
            yield Answer(script, self)

    @asynccontextmanager
    async def _request(self, lease: Lease, progress: Progress) -> AsyncIterator[Script]:
        self.asked.append((lease.key.id, lease.model))
        script = self._scripts[min(len(self.asked), len(self._scripts)) - 1]
        self.running += 1
        try:
            first = script[0] if script else ""
            if isinstance(first, Fault | UpstreamFault):
                await _done(first)
            progress.http_status = 200
            if self.remaining is not None:
                self.remaining = max(0, self.remaining - 1)
            progress.remaining_requests = self.remaining
            yield script
        except UpstreamFault as fault:
            progress.http_status = progress.http_status or fault.http_status
            raise
        finally:
            self.running -= 1


async def _done(deed: Deed) -> str:
    """Does it; what it says."""
    match deed:
        case float():
            await asyncio.sleep(deed)
            return ""
        case Fault():
            raise UpstreamFault(deed, f"secret-1 met {deed.value}", http_status=500)
        case UpstreamFault():
            raise replace(deed)
        case _:
            return deed


class Answer:
    """One stream of a Provider; stands where upstream.client.Answer does."""

    def __init__(self, script: Script, provider: Provider) -> None:
        self._script = list(script)
        self._provider = provider
        self._begun = False
        self.usage: chat_pb2.Usage | None = provider.usage_so_far
        self.pieces = 1

    async def read(self, wake_at: float) -> list[Event] | None:
        while self._script:
            deed = self._script.pop(0)
            if isinstance(deed, float) and now() + deed > wake_at:
                self._script.insert(0, now() + deed - wake_at)
                await asyncio.sleep(max(0.0, wake_at - now()))
                return []
            if text := await _done(deed):
                header = [] if self._begun else [Event(header=chat_service_pb2.ResponseHeader())]
                self._begun = True
                return [*header, Event(delta=chat_service_pb2.Delta(content=text))]
        return None

    def finish(self) -> list[Event]:
        self.usage = self._provider.usage
        return [
            Event(finish=chat_service_pb2.Finish(finish_reason_raw="stop")),
            Event(trailer=chat_service_pb2.StreamTrailer()),
        ]


class Observer:
    """Keeps the events of attempts."""

    def __init__(self) -> None:
        self.attempts: list[AttemptEvent] = []

    def attempt(self, event: AttemptEvent) -> None:
        self.attempts.append(event)

    def call(self, event: CallEvent) -> None:
        raise AssertionError("the gateway leaves these to the boundary")


@dataclass
class World:
    """A gateway in front of scripted upstreams a, b, c, ...; model `a` falls back to the others."""

    gateway: Gateway
    providers: dict[str, Provider]
    pools: dict[str, Pool]
    observer: Observer
    calls: list[Call] = field(default_factory=list)

    def call(
        self, model: str = "a", *, seconds: float = 600.0, callers: bool = True, **fields: Any
    ) -> Call:
        chat = chat_service_pb2.ChatRequest(model=model, **fields)
        chat.messages.add(role="user", content="hello")
        call = Call(chat, f"call {len(self.calls)}", now(), now() + seconds, callers)
        self.calls.append(call)
        return call

    async def chat(self, model: str = "a", **wanted: Any) -> chat_service_pb2.ChatResponse:
        return await self.gateway.chat(self.call(model, **wanted))

    async def stream(self, call: Call, *, pause: float = 0.0, **wanted: Any) -> list[Event]:
        """All messages of a stream whose caller takes so long for each."""
        received: list[Event] = []

        async def write(event: Event) -> None:
            received.append(event)
            await asyncio.sleep(pause)

        await self.gateway.stream(call, write, **wanted)
        return received

    @property
    def asked(self) -> list[str]:
        """Which upstreams the last call's requests went to, in order."""
        return [attempt.upstream for attempt in self.calls[-1].attempts]

    def at_rest(self) -> None:
        assert self.gateway.in_flight == 0
        for name, pool in self.pools.items():
            assert pool.ring.in_flight == pool.waiting == pool.bulkhead.in_flight == 0
            assert self.providers[name].running == 0


async def failure(work: Coroutine[Any, Any, Any]) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        await work
    return caught.value


def world(
    limits: Limits | None = None,
    retries: Retries | None = None,
    timeouts: Timeouts | None = None,
    upstreams: dict[str, dict[str, Any]] | None = None,
    fallbacks: bool = True,
    backoff: float = 0.25,
    **scripts: Sequence[Script],
) -> World:
    limits = limits or Limits()
    keys = (Key(id="k1", secret=Secret("secret-1")), Key(id="k2", secret=Secret("secret-2")))
    built = tuple(
        Upstream(
            name=name,
            base_url=f"http://{name}/v1",
            **({"keys": keys} | (upstreams or {}).get(name, {})),
        )
        for name in scripts
    )
    names = tuple(scripts)
    others = {names[0]: names[1:]} if fallbacks else {}
    config = Config(
        upstreams=built,
        models=tuple(
            Model(name=name, upstream=name, fallbacks=others.get(name, ())) for name in names
        ),
        limits=limits,
        retries=retries or Retries(budget_floor=1000),
        timeouts=timeouts or Timeouts(),
    )
    providers = {u.name: Provider(u, *scripts[u.name]) for u in built}
    pools = {
        name: Pool(
            cast(Any, provider),
            KeyRing(provider.upstream, random=lambda: 0.0),
            Admission(provider.upstream.in_flight or limits.in_flight, limits.queue, now),
            now=now,
        )
        for name, provider in providers.items()
    }
    observer = Observer()
    gateway = Gateway(config, pools, observer, backoff=Backoff(backoff, 8.0, lambda: 1.0), now=now)
    return World(gateway, providers, pools, observer)


# --- fallbacks --------------------------------------------------------------------------

# Whether the next model is asked when this is what the first one's upstream meets every time.
FALLS_OVER = {
    Fault.KEY_REJECTED: True,
    Fault.ACCOUNT_DEAD: True,
    Fault.ACCESS_DENIED: True,
    Fault.RATE_LIMITED: True,
    Fault.DAILY_QUOTA: True,
    Fault.QUOTA_EXHAUSTED: True,
    Fault.CREDIT_TOO_SMALL: True,
    Fault.OVER_TIER: True,
    Fault.OVERLOADED: True,
    Fault.SERVER_ERROR: True,
    Fault.UNREACHABLE: True,
    Fault.STALE_CONNECTION: True,
    Fault.TIMEOUT: True,
    Fault.CONTEXT_TOO_LONG: False,
    Fault.CONTENT_FILTERED: False,
    Fault.MODEL_NOT_FOUND: True,
    Fault.REFUSED: False,
    Fault.OUTPUT_INVALID: True,
    Fault.TOO_LARGE: False,
    Fault.PROTOCOL: True,
    Fault.TRUNCATED: True,
}


def test_every_fault_has_its_row() -> None:
    assert set(FALLS_OVER) == set(Fault)


@pytest.mark.parametrize("method", ["chat", "stream"])
@pytest.mark.parametrize("kind", Fault)
def test_only_what_is_the_upstreams_own_leads_to_the_next_model(kind: Fault, method: str) -> None:
    async def main() -> None:
        of = world(a=[[kind]], b=[["hello"]])
        call = of.call()
        work = of.gateway.chat(call) if method == "chat" else of.stream(call)
        if FALLS_OVER[kind]:
            await work
            assert of.asked[-1] == "b"
            assert set(of.asked[:-1]) == {"a"}
        else:
            assert not (await failure(work)).metadata["trail"].count("b/")
            assert of.providers["b"].asked == []
        assert 1 <= len(of.providers["a"].asked) <= 5
        of.at_rest()

    run(main())


def test_models_are_asked_in_order_and_the_answer_tells_all_of_it() -> None:
    async def main() -> None:
        of = world(a=[[Fault.KEY_REJECTED]], b=[[Fault.PROTOCOL]], c=[["hello"]], d=[["no"]])
        header = (await of.chat()).header
        assert (header.model, header.upstream) == ("c", "c")
        trail = [(each.upstream, each.key_id, each.error_reason) for each in header.attempts]
        rejected = error_reason_pb2.ERROR_REASON_UPSTREAM_CREDENTIALS_REJECTED
        protocol = error_reason_pb2.ERROR_REASON_UPSTREAM_PROTOCOL_ERROR
        assert trail == [
            ("a", "k1", rejected),
            ("a", "k2", rejected),
            ("b", "k1", protocol),
            ("b", "k2", protocol),
            ("c", "k1", 0),
        ]
        assert of.providers["d"].asked == []
        (header_event, *_) = await of.stream(of.call())
        assert header_event.header.upstream == "c"
        assert [each.upstream for each in header_event.header.attempts] == ["b", "b", "c"]

    run(main())


def test_the_name_that_the_fallbacks_provider_knows_is_the_one_it_is_asked_for() -> None:
    async def main() -> None:
        of = world(a=[[Fault.KEY_REJECTED]], b=[["hello"]])
        await of.chat()
        assert of.providers["b"].asked == [("k1", "b")]

    run(main())


def test_each_upstream_has_its_own_number_of_attempts() -> None:
    async def main() -> None:
        bad = [[Fault.SERVER_ERROR]]
        of = world(retries=Retries(max_attempts=3, budget_floor=1000), a=bad, b=bad, c=bad)
        await failure(of.chat())
        assert of.asked == ["a"] * 3 + ["b"] * 3 + ["c"] * 3

    run(main())


def test_after_the_first_text_no_other_model_is_asked() -> None:
    async def main() -> None:
        of = world(a=[["a beginning", Fault.SERVER_ERROR]], b=[["hello"]])
        error = await failure(of.stream(of.call()))
        assert error.reason_name == "UPSTREAM_STREAM_INTERRUPTED"
        assert of.providers["b"].asked == []
        assert len(of.providers["a"].asked) == 1

    run(main())


def test_no_other_model_is_asked_for_a_text_that_cannot_be_written() -> None:
    """Too large for one message, and said by a fallback: it does not suit the caller, but part of
    it has been sent."""

    async def main() -> None:
        of = world(a=[[Fault.SERVER_ERROR]], b=[["small", "large"]], c=[["hello"]])

        async def write(event: Event) -> None:
            if event.delta.content == "large":
                raise GatewayError(error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE, "too large")

        error = await failure(of.gateway.stream(of.call(), write))
        assert error.reason_name == "REQUEST_TOO_LARGE"
        assert of.providers["c"].asked == []

    run(main())


def test_if_all_fail_the_caller_hears_of_the_model_it_asked_for() -> None:
    async def main() -> None:
        of = world(a=[[Fault.KEY_REJECTED]], b=[[Fault.PROTOCOL]], c=[[Fault.SERVER_ERROR]])
        error = await failure(of.chat())
        assert error.reason_name == "UPSTREAM_CREDENTIALS_REJECTED"
        assert error.metadata["upstream"] == "a"
        assert error.metadata["attempts"] == str(2 + 2 + 5)
        of.at_rest()

    run(main())


@pytest.mark.parametrize(
    "kind", [Fault.REFUSED, Fault.CONTEXT_TOO_LONG, Fault.TOO_LARGE, Fault.OVER_TIER]
)
def test_a_fallback_that_the_request_does_not_suit_hides_nothing_and_the_next_is_asked(
    kind: Fault,
) -> None:
    async def main() -> None:
        of = world(a=[[Fault.SERVER_ERROR]], b=[[kind]], c=[[Fault.SERVER_ERROR], ["hello"]])
        assert (await of.chat()).header.upstream == "c"
        of = world(a=[[Fault.SERVER_ERROR]], b=[[kind]])
        assert (await failure(of.chat())).reason_name == "UPSTREAM_ERROR"

    run(main())


def test_a_fallback_without_a_parameter_hides_nothing_and_the_next_is_asked() -> None:
    async def main() -> None:
        lacks = {"b": {"unsupported_parameters": frozenset({"top_k"})}}
        wanted = {"params": chat_pb2.GenerationParams(top_k=3)}
        of = world(a=[[Fault.SERVER_ERROR]], b=[["hello"]], c=[["hello"]], upstreams=lacks)
        assert (await of.chat(**wanted)).header.upstream == "c"
        of = world(a=[[Fault.SERVER_ERROR]], b=[["hello"]], upstreams=lacks)
        assert (await failure(of.chat(**wanted))).reason_name == "UPSTREAM_ERROR"
        assert of.providers["b"].asked == []

    run(main())


def limited(seconds: float, kind: Fault = Fault.RATE_LIMITED) -> Script:
    return [UpstreamFault(kind, http_status=429, retry_after=seconds)]


@pytest.mark.parametrize("kind", [Fault.RATE_LIMITED, Fault.OVERLOADED])
def test_while_another_model_can_answer_nobody_waits_for_a_key_that_cools(kind: Fault) -> None:
    async def main() -> None:
        of = world(a=[limited(20.0, kind)], b=[["hello"]])
        start = now()
        for _ in range(3):
            assert (await of.chat()).header.upstream == "b"
        assert now() == start

    run(main())


@pytest.mark.parametrize("kind", [Fault.RATE_LIMITED, Fault.OVERLOADED])
def test_if_all_models_cool_the_soonest_is_waited_for(kind: Fault) -> None:
    async def main() -> None:
        keys = 2 if kind is Fault.RATE_LIMITED else 1  # that must meet it before all are closed
        slow, soon = [limited(20.0, kind)] * keys, [limited(5.0, kind)] * keys
        of = world(a=[*slow, ["hello"]], b=[*soon, ["hello"]])
        start = now()
        assert (await of.chat()).header.upstream == "b"
        assert now() == start + 5.0
        of.at_rest()

    run(main())


def test_if_all_models_cool_beyond_the_deadline_that_is_told_at_once() -> None:
    async def main() -> None:
        of = world(a=[limited(20.0)], b=[limited(15.0)])
        start = now()
        error = await failure(of.chat(seconds=10.0))
        assert now() == start
        assert error.reason_name == "RATE_LIMITED"
        assert (error.metadata["upstream"], error.retry_after) == ("a", 20.0)
        assert error.retry_helps

    run(main())


def test_going_back_to_a_model_does_not_give_it_more_attempts() -> None:
    async def main() -> None:
        often = Retries(max_attempts=3, budget_floor=1000)
        of = world(retries=often, a=[limited(1.0)], b=[[Fault.KEY_REJECTED]])
        error = await failure(of.chat(seconds=100.0))
        assert error.reason_name == "RATE_LIMITED"
        assert of.asked.count("a") == 3

    run(main())


def test_after_a_wait_in_vain_the_caller_still_hears_of_the_model_it_asked_for() -> None:
    async def main() -> None:
        a, b = [limited(50.0)] * 2, [*[limited(5.0)] * 2, [Fault.KEY_REJECTED]]
        of = world(a=a, b=b)
        start = now()
        error = await failure(of.chat(seconds=30.0))
        assert of.asked == ["a", "a", "b", "b", "b", "b"]
        assert (error.reason_name, error.metadata["upstream"]) == ("RATE_LIMITED", "a")
        assert error.retry_after == start + 50.0 - now() == 45.0
        of.at_rest()

    run(main())


def test_after_a_wait_in_vain_the_next_model_that_cools_is_waited_for() -> None:
    async def main() -> None:
        a = [*[limited(20.0)] * 2, ["hello"]]
        b = [*[limited(5.0)] * 2, [Fault.KEY_REJECTED]]
        of = world(a=a, b=b)
        start = now()
        assert (await of.chat(seconds=30.0)).header.upstream == "a"
        assert now() == start + 20.0
        of.at_rest()

    run(main())


def test_going_back_to_a_model_is_a_retry_that_the_budget_must_grant() -> None:
    async def main() -> None:
        full = limited(1.0, Fault.OVERLOADED)
        for budget, asked in ((0, ["a", "b"]), (1, ["a", "b", "a"])):
            of = world(
                retries=Retries(budget=0.0, budget_floor=budget),
                a=[full, ["hello"]],
                b=[limited(9.0, Fault.OVERLOADED)],
            )
            with contextlib.suppress(GatewayError):
                await of.chat()
            assert of.asked == asked
            of.at_rest()

    run(main())


def test_a_call_counts_once_for_the_budget_however_many_models_it_asks() -> None:
    async def main() -> None:
        quarter = Retries(budget=0.25, budget_floor=0)
        of = world(retries=quarter, a=[[Fault.KEY_REJECTED]], b=[["hello"]], c=[["hello"]])
        for pool in of.pools.values():
            pool.ring.replace(())
        for _ in range(3):  # nobody can be asked: three calls, whatever they fall over to
            await failure(of.chat())
        of.pools["c"].ring.replace(of.providers["c"].upstream.keys)
        of.providers["c"]._scripts = [[Fault.SERVER_ERROR]]
        await failure(of.chat())
        assert of.asked == ["c", "c"]  # the fourth of them has earned one retry
        of.at_rest()

    run(main())


def test_a_full_bulkhead_leads_to_the_next_model() -> None:
    async def main() -> None:
        small = {"a": {"in_flight": 1}}
        of = world(Limits(queue=0), upstreams=small, a=[[100.0, "slow"]], b=[["hello"]])
        slow = asyncio.ensure_future(of.chat())
        await asyncio.sleep(0.1)
        assert (await of.chat()).header.upstream == "b"
        await slow

    run(main())


# --- slots ------------------------------------------------------------------------------


def test_a_stalled_upstream_with_all_its_slots_taken_leaves_the_others_alone() -> None:
    async def main() -> None:
        of = world(
            Limits(in_flight=4, queue=100),
            upstreams={"a": {"in_flight": 3}},
            fallbacks=False,
            a=[[500.0, "slow"]],
            b=[["hello"]],
        )
        stuck = [asyncio.ensure_future(of.chat()) for _ in range(50)]
        await asyncio.sleep(1.0)
        start = now()
        for _ in range(20):
            await of.chat("b")
        assert now() == start
        assert of.pools["a"].bulkhead.waiting == 47
        for each in stuck:
            each.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        of.at_rest()

    run(main())


def test_an_item_that_has_not_begun_when_the_grace_of_a_drain_ends_does_not_begin() -> None:
    async def main() -> None:
        of = world(a=[[5.0, "hello"]])
        items = [of.call(), of.call()]
        for item in items:
            item.accepted = True
        of.gateway.draining = True
        running = asyncio.ensure_future(of.gateway.chat(items[0]))
        await asyncio.sleep(1.0)
        began = now()
        of.gateway.close()
        assert (await failure(running)).reason_name == "GATEWAY_DRAINING"
        assert (await failure(of.gateway.chat(items[1]))).reason_name == "GATEWAY_DRAINING"
        assert now() == began
        assert len(of.providers["a"].asked) == 1
        of.at_rest()

    run(main())


def test_a_full_queue_is_told_at_once_with_a_time_to_come_back() -> None:
    async def main() -> None:
        of = world(Limits(in_flight=2, queue=3), a=[[10.0, "slow"]])
        await of.chat()
        calls = [asyncio.ensure_future(of.chat()) for _ in range(5)]
        await asyncio.sleep(0.1)
        start = now()
        error = await failure(of.chat())
        assert now() == start
        assert error.reason == OVERLOADED
        assert error.retry_after == pytest.approx(10.0 * 4 / 2)
        assert error.retry_helps
        assert error.metadata["attempts"] == "0"
        await asyncio.gather(*calls)
        assert len(of.providers["a"].asked) == 6
        of.at_rest()

    run(main())


@pytest.mark.parametrize("method", ["chat", "stream"])
@pytest.mark.parametrize("callers", [True, False])
def test_a_deadline_in_the_queue_ends_a_call_that_no_upstream_has_seen(
    method: str, callers: bool
) -> None:
    async def main() -> None:
        of = world(Limits(in_flight=1, queue=10), a=[[10.0, "slow"]])
        first = asyncio.ensure_future(of.chat())
        await asyncio.sleep(0.1)
        call, start = of.call(seconds=5.0, callers=callers), now()
        error = await failure(of.gateway.chat(call) if method == "chat" else of.stream(call))
        assert now() == start + 5.0
        assert error.reason_name == ("DEADLINE_EXCEEDED" if callers else "GATEWAY_OVERLOADED")
        assert error.metadata["attempts"] == "0"
        await first
        assert len(of.providers["a"].asked) == 1
        of.at_rest()

    run(main())


def test_a_deadline_that_has_passed_already_asks_nobody() -> None:
    async def main() -> None:
        of = world(a=[["hello"]])
        error = await failure(of.chat(seconds=0.0))
        assert error.reason_name == "DEADLINE_EXCEEDED"
        assert of.providers["a"].asked == []

    run(main())


# Where a call may be when its deadline comes: (first script, settings).
PLACES: dict[str, tuple[list[Script], dict[str, Any]]] = {
    "headers": ([[100.0, "hello"]], {}),
    "within the text": ([["a", 100.0, "b"]], {}),
    "backoff": ([[Fault.SERVER_ERROR]], {}),
    "a key that another one has": ([[100.0, "hello"]], {"in_flight": 1}),
    "a key that another one probes": ([limited(1.0), [100.0, "hello"]], {}),
}


@pytest.mark.parametrize("method", ["chat", "stream"])
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_call_is_its_deadline_ends_it_on_time(place: str, method: str) -> None:
    async def main() -> None:
        scripts, limits = PLACES[place]
        one = {"a": {"keys": (Key(id="k1", secret=Secret("secret-1"), **limits),)}}
        of = world(upstreams=one, backoff=3.0, a=scripts)
        calls = [of.call(seconds=5.0) for _ in range(2)]
        start = now()
        outcomes = await asyncio.gather(
            *(failure(of.gateway.chat(c) if method == "chat" else of.stream(c)) for c in calls)
        )
        assert now() <= start + 5.0
        for outcome in outcomes:
            late = outcome.reason_name == "DEADLINE_EXCEEDED"
            assert late or outcome.reason_name in ("UPSTREAM_ERROR", "RATE_LIMITED")
        of.at_rest()

    run(main())


# --- what it cost -----------------------------------------------------------------------


def tokens(usage: chat_pb2.Usage | None) -> tuple[int, int, bool] | None:
    return usage and (usage.prompt_tokens, usage.completion_tokens, usage.estimated)


TEXT = "\u6587" * 40  # 120 bytes in UTF-8
PROMPT = 3 + 3 + (4 + 5) // 4  # of `user` and `hello`, and what stands between


async def cut_off(of: World, how: str, **wanted: Any) -> tuple[Call, GatewayError | None]:
    """A stream that ends after its first text."""
    call = of.call(seconds=5.0, callers=how == "deadline")
    stream = asyncio.ensure_future(
        of.stream(call, pause=100.0 if how == "stalled" else 0.0, **wanted)
    )
    if how == "cancel":
        await asyncio.sleep(1.0)
        stream.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream
        return call, None
    return call, await failure(cast(Any, stream))


CUTS = {
    "cancel": "",
    "deadline": "DEADLINE_EXCEEDED",
    "maximum": "UPSTREAM_STREAM_INTERRUPTED",
    "upstream": "UPSTREAM_STREAM_INTERRUPTED",
    "stalled": "CALLER_STALLED",
}


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize("how", CUTS)
def test_a_stream_that_is_cut_off_cost_what_was_delivered(how: str, cumulative: bool) -> None:
    async def main() -> None:
        script = [TEXT[:10], TEXT[10:], Fault.SERVER_ERROR if how == "upstream" else 1000.0]
        of = world(timeouts=Timeouts(total=5.0, write=2.0), a=[script])
        call, error = await cut_off(of, how, cumulative=cumulative)
        delivered = 30 if how == "stalled" else 120
        assert tokens(call.usage) == (PROMPT, math.ceil(delivered / 4), True)
        if error is not None:
            assert error.reason_name == CUTS[how]
            assert error.metadata["usageEstimated"] == "true"
            assert error.metadata["promptTokens"] == str(PROMPT)
            assert error.metadata["completionTokens"] == str(math.ceil(delivered / 4))
        of.at_rest()

    run(main())


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
@pytest.mark.parametrize("how", ["cancel", "upstream"])
def test_what_an_upstream_says_before_its_text_is_not_what_the_text_cost(
    how: str, method: str
) -> None:
    """Anthropic begins with the tokens of the prompt and the first of the answer."""

    async def main() -> None:
        script = [TEXT, Fault.REFUSED if how == "upstream" else 1000.0]
        always = {"a": {"streaming": "always"}}
        of = world(a=[script], upstreams=always)
        of.providers["a"].usage_so_far = chat_pb2.Usage(
            prompt_tokens=700, completion_tokens=1, total_tokens=701
        )
        call = of.call()
        work = of.stream(call) if method == "StreamChat" else of.gateway.chat(call)
        task = asyncio.ensure_future(cast(Any, work))
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, GatewayError)):
            await task
        assert tokens(call.usage) == (700, 30, True)
        assert call.usage is not None
        assert call.usage.total_tokens == 730
        [attempt] = of.observer.attempts
        assert (attempt.prompt_tokens, attempt.completion_tokens) == (700, 30)
        assert attempt.usage_estimated
        of.at_rest()

    run(main())


def test_no_count_that_an_upstream_tells_breaks_the_sum() -> None:
    most = 2**31 - 1
    told = chat_pb2.Usage(prompt_tokens=most, completion_tokens=1, total_tokens=most)
    assert so_far(told, 400).total_tokens == most


def test_what_the_upstream_says_of_its_tokens_is_no_estimate() -> None:
    async def main() -> None:
        of = world(a=[[TEXT]])
        of.providers["a"].usage = chat_pb2.Usage(
            prompt_tokens=7, completion_tokens=8, total_tokens=15
        )
        call = of.call()
        await of.stream(call)
        assert tokens(call.usage) == (7, 8, False)
        call = of.call()
        await of.gateway.chat(call)
        assert tokens(call.usage) == (7, 8, False)

    run(main())


@pytest.mark.parametrize("how", ["nothing was said", "the call was refused"])
def test_a_call_that_was_told_nothing_cost_nothing(how: str) -> None:
    async def main() -> None:
        of = world(a=[[Fault.REFUSED if how == "the call was refused" else 1000.0]])
        call = of.call(seconds=1.0)
        await failure(of.stream(call))
        assert call.usage is None

    run(main())


def test_an_estimate_counts_text_and_no_pictures() -> None:
    chat = chat_service_pb2.ChatRequest()
    message = chat.messages.add(role="user")
    message.parts.add(text="x" * 400)
    message.parts.add().image.data = b"x" * 1_000_000
    assert 100 < estimate(chat, 0).prompt_tokens < 110
    assert estimate(chat, 9).completion_tokens == 3
    assert estimate(chat, 9).total_tokens == estimate(chat, 0).prompt_tokens + 3


BOUND = {"keys": (Key(id="k1", secret=Secret("secret-1"), tokens_per_minute=1000),)}


# What the window of a key holds after a request: (script, usage told, tokens; None as expected).
COSTS: dict[str, tuple[Script, bool, int | None]] = {
    "told": ([TEXT], True, 15),
    "never told": ([TEXT], False, None),
    "refused": ([Fault.REFUSED], False, 0),
    "interrupted": ([TEXT, Fault.SERVER_ERROR], False, PROMPT + 30),
    "no answer": ([1000.0], False, None),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_keys_tokens_per_minute_count_what_is_known(name: str) -> None:
    async def main() -> None:
        script, told, cost = COSTS[name]
        of = world(upstreams={"a": BOUND}, a=[script])
        if told:
            of.providers["a"].usage = chat_pb2.Usage(total_tokens=15)
        params = chat_pb2.GenerationParams(max_completion_tokens=50, choice_count=2)
        call = of.call(seconds=5.0, params=params)
        with contextlib.suppress(GatewayError):
            await of.stream(call)
        spent = PROMPT + 100 if cost is None else cost
        if name == "never told":
            spent = PROMPT + 30  # from what was delivered
        ring = of.pools["a"].ring
        if spent:  # else even one above the limit is served
            assert isinstance(ring.lease("m", now(), tokens=1001 - spent), Unavailable)
        assert isinstance(ring.lease("m", now(), tokens=1000 - spent), Lease)

    run(main())


# --- what is told -----------------------------------------------------------------------


def test_the_trail_tells_what_was_tried_and_why() -> None:
    async def main() -> None:
        of = world(
            a=[limited(20.0), [UpstreamFault(Fault.KEY_REJECTED, http_status=401)]],
            b=[[UpstreamFault(Fault.UNREACHABLE)], [Fault.SERVER_ERROR]],
            retries=Retries(max_attempts=2, budget_floor=1000),
        )
        error = await failure(of.chat(seconds=5.0))
        assert error.metadata["trail"] == (
            "a/k1 429 RATE_LIMITED, a/k2 401 UPSTREAM_CREDENTIALS_REJECTED, "
            "b/k1 UPSTREAM_UNREACHABLE, b/k2 500 UPSTREAM_ERROR"
        )
        assert error.metadata["attempts"] == "4"

    run(main())


@pytest.mark.parametrize(
    ("script", "step"),
    [
        ([1000.0], "a/k1 200 unfinished"),
        (["text", 1000.0], "a/k1 200 unfinished"),
        (["text", Fault.TRUNCATED], "a/k1 200 UPSTREAM_ERROR"),
    ],
)
@pytest.mark.parametrize("callers", [True, False])
def test_the_trail_tells_of_an_attempt_that_was_cut_off(
    script: Script, step: str, callers: bool
) -> None:
    async def main() -> None:
        of = world(a=[script])
        error = await failure(of.stream(of.call(seconds=5.0, callers=callers)))
        assert error.metadata["trail"] == step

    run(main())


def test_a_long_trail_keeps_the_latest_attempts_in_300_characters() -> None:
    async def main() -> None:
        keys = tuple(Key(id=f"{n:02d}{'k' * 60}", secret=Secret(f"s{n}")) for n in range(20))
        of = world(
            upstreams={"a": {"keys": keys}},
            retries=Retries(max_attempts=20, budget_floor=1000),
            a=[[UpstreamFault(Fault.KEY_REJECTED, http_status=401)]],
        )
        error = await failure(of.chat())
        trail = error.metadata["trail"]
        assert error.metadata["attempts"] == "20"
        assert 200 < len(trail) <= 300
        assert trail.startswith("..., a/")
        assert trail.endswith(" 401 UPSTREAM_CREDENTIALS_REJECTED")
        assert f"a/{of.calls[-1].attempts[-1].key_id} " in trail

    run(main())


def test_nobody_who_was_not_asked_is_in_the_trail() -> None:
    async def main() -> None:
        of = world(a=[[Fault.KEY_REJECTED]])
        await failure(of.chat())
        error = await failure(of.chat())
        assert error.metadata["attempts"] == "0"
        assert "trail" not in error.metadata

    run(main())


def test_no_key_shows_though_an_upstream_quotes_it_and_the_keys_changed_meanwhile() -> None:
    async def main() -> None:
        of = world(a=[[1.0, Fault.SERVER_ERROR]], retries=Retries(max_attempts=1))
        task = asyncio.ensure_future(failure(of.chat()))
        await asyncio.sleep(0.5)
        of.pools["a"].ring.replace([Key(id="k1", secret=Secret("another"))])
        error = await task
        assert "secret-1" not in f"{error} {error.metadata}"
        assert "*** met" in error.message

    run(main())


ENDS: dict[str, tuple[Script, str]] = {
    "answered": (["hello"], ""),
    "failed": (["hello", Fault.SERVER_ERROR], "server_error"),
    "cancel": (["hello", 1000.0], ABANDONED),
    "deadline": (["hello", 1000.0], ABANDONED),
    "stalled": (["hello", "world"], ABANDONED),
}


@pytest.mark.parametrize("how", ENDS)
def test_every_attempt_is_told_once_however_it_ends(how: str) -> None:
    async def main() -> None:
        script, told = ENDS[how]
        of = world(timeouts=Timeouts(write=2.0), a=[script])
        if how == "answered":
            await of.stream(of.call())
        else:
            await cut_off(of, how)
        assert [(each.fault, each.http_status) for each in of.observer.attempts] == [(told, 200)]

    run(main())


def test_few_requests_left_hold_back_others_before_there_is_a_429() -> None:
    async def main() -> None:
        of = world(upstreams={"a": BOUND}, a=[["hello", 10.0, "world"]])
        of.providers["a"].remaining = 3
        first = asyncio.ensure_future(of.stream(of.call()))
        await asyncio.sleep(0.5)
        others = [asyncio.ensure_future(of.stream(of.call())) for _ in range(5)]
        await asyncio.sleep(0.1)
        assert of.providers["a"].running == 3
        await asyncio.gather(first, *others)
        of.at_rest()

    run(main())


def test_the_end_of_the_grace_reaches_all_though_a_deadline_passes_at_that_moment() -> None:
    async def main() -> None:
        of = world(a=[[1000.0]], fallbacks=False)
        late, running = of.call(seconds=5.0), of.call(seconds=500.0)
        calls = [asyncio.ensure_future(failure(of.gateway.chat(c))) for c in (late, running)]
        await asyncio.sleep(0.0)
        await asyncio.sleep(0.0)
        # Behind the call's own timer, before the call has noticed.
        asyncio.get_running_loop().call_at(late.deadline, of.gateway.close)
        await asyncio.sleep(6.0)
        assert [c.done() for c in calls] == [True, True]
        assert calls[1].result().reason_name == "GATEWAY_DRAINING"
        of.at_rest()

    run(main())


def test_what_was_accepted_before_the_drain_begins_nothing_after_the_grace() -> None:
    async def main() -> None:
        of = world(a=[["hello"]])
        call = of.call()
        call.accepted = True
        of.gateway.close()
        assert (await failure(of.gateway.chat(call))).reason_name == "GATEWAY_DRAINING"
        assert of.providers["a"].asked == []

    run(main())


def test_last_snapshots_do_not_hold_a_call_long_after_its_deadline() -> None:
    async def main() -> None:
        of = world(timeouts=Timeouts(total=5.0, write=60.0), a=[["hello", 1000.0]])
        call, start = of.call(seconds=5.0, callers=False), now()
        taken = 0

        async def write(event: Event) -> None:
            nonlocal taken
            taken += 1
            await asyncio.sleep(0.0 if taken <= 2 else 1000.0)

        error = await failure(of.gateway.stream(call, write, cumulative=True))
        assert error.reason_name == "UPSTREAM_STREAM_INTERRUPTED"
        assert now() <= start + 6.0
        assert taken == 3

    run(main())


# --- another key, where that may help ---------------------------------------------------

FULL_GROUP = UpstreamFault(Fault.RATE_LIMITED, retry_after=5.0)


def test_a_request_too_large_for_one_account_is_offered_to_another() -> None:
    async def main() -> None:
        of = world(a=[[Fault.OVER_TIER], ["hello"]])
        assert [a.key_id for a in (await of.chat()).header.attempts] == ["k1", "k2"]
        assert [a.key_id for a in (await of.chat()).header.attempts] == ["k1"], "no key is blamed"
        of.at_rest()

    run(main())


def test_a_request_too_large_for_every_account_fails_after_one_offer_to_each() -> None:
    async def main() -> None:
        of = world(a=[[Fault.OVER_TIER]])
        began = now()
        error = await failure(of.chat())
        assert (error.reason_name, error.metadata["attempts"]) == ("REQUEST_TOO_LARGE", "2")
        assert not error.retry_helps
        assert now() == began
        of.at_rest()

    run(main())


def test_an_account_that_cools_is_not_waited_for_to_offer_it_what_is_too_large() -> None:
    async def main() -> None:
        of = world(a=[[FULL_GROUP], ["hello"], [Fault.OVER_TIER]])
        await of.chat()
        began = now()
        error = await failure(of.chat())
        assert error.reason_name == "REQUEST_TOO_LARGE"
        assert not error.retry_helps
        assert now() == began
        of.at_rest()

    run(main())


def test_an_account_that_is_busy_is_not_waited_for_to_offer_it_what_is_too_large() -> None:
    async def main() -> None:
        keys = (
            Key(id="k1", secret=Secret("secret-1")),
            Key(id="k2", secret=Secret("secret-2"), in_flight=1),
        )
        slow = [100.0, "hello"]
        of = world(upstreams={"a": {"keys": keys}}, a=[slow, slow, [Fault.OVER_TIER]])
        others = [asyncio.ensure_future(of.chat()) for _ in keys]
        await asyncio.sleep(1.0)
        began = now()
        error = await failure(of.chat())
        assert (error.reason_name, error.metadata["attempts"]) == ("REQUEST_TOO_LARGE", "1")
        assert now() == began
        await asyncio.gather(*others)
        of.at_rest()

    run(main())


def test_too_large_for_one_account_and_refused_by_the_other_leads_to_the_next_model() -> None:
    async def main() -> None:
        of = world(a=[[Fault.OVER_TIER], [Fault.KEY_REJECTED]], b=[["hello"]])
        assert (await of.chat()).header.upstream == "b"
        assert of.asked == ["a", "a", "b"]
        of.at_rest()

    run(main())


def test_who_met_a_rate_limit_beyond_its_tier_waits_for_that_account_alone() -> None:
    async def main() -> None:
        of = world(a=[[Fault.OVER_TIER], [FULL_GROUP], ["hello"]])
        began = now()
        answered = await of.chat()
        assert [a.key_id for a in answered.header.attempts] == ["k1", "k2", "k2"]
        assert now() == began + 5.0
        of.at_rest()

    run(main())


def test_a_model_that_one_key_lacks_is_answered_by_one_that_serves_it() -> None:
    async def main() -> None:
        of = world(a=[["hello"], [Fault.MODEL_NOT_FOUND], ["hello"]])
        await of.chat()
        assert [a.key_id for a in (await of.chat()).header.attempts] == ["k2", "k1"]
        assert [a.key_id for a in (await of.chat()).header.attempts] == ["k1"]
        of.at_rest()

    run(main())


def test_a_model_that_no_other_key_is_known_to_serve_is_not_asked_for_twice() -> None:
    async def main() -> None:
        of = world(a=[[Fault.MODEL_NOT_FOUND]])
        for _ in range(3):
            error = await failure(of.chat())
            assert (error.reason_name, error.metadata["attempts"]) == ("MODEL_NOT_FOUND", "1")
        assert {key for key, _ in of.providers["a"].asked} == {"k1", "k2"}, "no key is blamed"
        of.at_rest()

    run(main())


# --- which timer it was -----------------------------------------------------------------


@pytest.mark.parametrize(("callers", "timer"), [(True, "deadline"), (False, "total")])
@pytest.mark.parametrize("script", [[99.0, "late"], ["early", 99.0, "late"]])
def test_an_error_names_the_timer_that_ended_the_call(
    script: Script, callers: bool, timer: str
) -> None:
    async def main() -> None:
        of = world(a=[script])
        error = await failure(of.stream(of.call(seconds=5.0, callers=callers)))
        assert error.metadata["timer"] == timer
        of.at_rest()

    run(main())


def test_a_caller_who_does_not_read_is_told_by_which_timer() -> None:
    async def main() -> None:
        of = world(a=[["hello"]], timeouts=Timeouts(write=2.0))
        error = await failure(of.stream(of.call(), pause=3.0))
        assert (error.reason_name, error.metadata["timer"]) == ("CALLER_STALLED", "write")
        of.at_rest()

    run(main())


# --- where the time went ----------------------------------------------------------------


def test_each_attempt_is_recorded_with_its_number_and_what_it_waited_for() -> None:
    async def main() -> None:
        of = world(
            a=[[Fault.SERVER_ERROR], [UpstreamFault(Fault.RATE_LIMITED, retry_after=3.0)]],
            upstreams={"a": {"keys": (Key(id="k1", secret=Secret("secret-1")),)}},
        )
        call = of.call(seconds=4.0)
        await failure(of.stream(call))
        first, second, third = of.observer.attempts
        assert [e.number for e in (first, second, third)] == [1, 2, 3]
        assert [e.reason for e in (first, second)] == ["UPSTREAM_ERROR", "RATE_LIMITED"]
        assert (first.key_seconds, second.key_seconds, third.key_seconds) == (0.0, 0.0, 3.0)
        assert call.backoff_seconds == 0.25
        assert not any(e.committed or e.first_token_seconds for e in of.observer.attempts)
        of.at_rest()

    run(main())


def test_a_stream_is_recorded_with_its_first_token_and_what_it_cost() -> None:
    async def main() -> None:
        of = world(a=[[0.5, "12345678", 1.0, "1234", Fault.SERVER_ERROR]])
        call = of.call()
        await failure(of.stream(call))
        (event,) = of.observer.attempts
        assert event.committed
        assert (event.first_token_seconds, event.seconds) == (0.5, 1.5)
        assert (event.completion_tokens, event.usage_estimated) == (3, True)
        assert call.first_token_at == call.started + 0.5
        of.at_rest()

    run(main())


def test_a_call_knows_how_long_it_queued_also_if_it_was_refused_in_the_end() -> None:
    async def main() -> None:
        of = world(Limits(in_flight=1), a=[[2.0, "hello"]])
        first, second, third = of.call(), of.call(), of.call(seconds=3.0)
        running = [
            asyncio.ensure_future(of.gateway.chat(first)),
            asyncio.ensure_future(of.gateway.chat(second)),
            asyncio.ensure_future(of.gateway.chat(third)),
        ]
        await asyncio.gather(*running, return_exceptions=True)
        assert [c.queue_seconds for c in (first, second, third)] == [0.0, 2.0, 3.0]
        of.at_rest()

    run(main())


# --- what an upstream calls a field -----------------------------------------------------

PATHS = {
    "temperature": "params.temperature",
    "max_tokens": "params.max_completion_tokens",
    "max_completion_tokens": "params.max_completion_tokens",
    "n": "params.choice_count",
    "stop": "params.stop",
    "stop[4]": "params.stop[4]",
    "stop.4": "params.stop[4]",
    "logit_bias.50256": "params.logit_bias[50256]",
    "user": "end_user_id",
    "model": "model",
    "messages": "messages",
    "messages[0].role": "messages[0].role",
    "messages.[0].role": "messages[0].role",
    "messages.0.role": "messages[0].role",
    "messages.[12].content.[3].image_url.url": "messages[12].parts[3]",
    "messages[1].content": "messages[1].content",
    "messages[1].tool_calls[0].function.arguments": (
        "messages[1].tool_calls[0].function.arguments_json"
    ),
    "tools[0].parameters": "tools[0].function.parameters_schema_json",
    "tools.0.function.parameters.properties": "tools[0].function.parameters_schema_json",
    "tools[0].function.name": "tools[0].function.name",
    "tool_choice": "tool_choice",
    "response_format.json_schema.schema": "response_format.json_schema.schema_json",
    "web_search_options": "extra_body_json",
    "web_search_options.user_location": "extra_body_json",
    "something else": "something else",
    "": "",
}


@pytest.mark.parametrize("param", PATHS)
def test_a_parameter_that_an_upstream_names_is_told_as_the_callers_own_field(param: str) -> None:
    chat = chat_service_pb2.ChatRequest(extra_body_json='{"web_search_options": {}}')
    assert proto_path(param, chat) == PATHS[param]


def test_a_parameter_of_any_length_is_read_in_linear_time() -> None:
    for unit in (".1", "[1]", ".content[1]", "messages", "]", ".function.arguments", "1"):
        proto_path(unit * 200_000, chat_service_pb2.ChatRequest())
