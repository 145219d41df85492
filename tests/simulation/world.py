"""A world for the gateway: providers that fail in every way, callers that leave at any time, all
from one seed and in virtual time; and a history, from which the invariants are judged.

The invariants are those of docs/invariants.md, by the same numbers.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.admission import Admission
from tokenwire_service.config import Config, Key, Limits, Model, Retries, Timeouts, Upstream
from tokenwire_service.errors import Fault, GatewayError, UpstreamFault
from tokenwire_service.gateway import Call, Gateway
from tokenwire_service.keyring import COOLDOWN_CAP, KeyRing, Lease
from tokenwire_service.pool import Pool
from tokenwire_service.retry import Backoff
from tokenwire_service.secret import Secret
from tokenwire_service.telemetry import AttemptEvent, CallEvent
from tokenwire_service.upstream.client import Progress
from tokenwire_service.upstream.dialect import Encoded, Route

Event = chat_service_pb2.StreamChatResponse
EPSILON = 1e-6
SERVER_MAXIMUM = 120.0
WRITE_TIMEOUT = 20.0
OK = "OK"


@dataclass
class Sent:
    """One request as a provider saw it."""

    call: str
    upstream: str
    key: str
    group: str
    model: str
    at: float


@dataclass
class Ended:
    """One call as its caller saw it."""

    call: str
    began: float
    deadline: float
    ended: float
    outcome: str  # OK, CANCELLED, or the reason
    text: str
    whole: str | None  # what the provider meant to say in the attempt that answered last
    complete: bool  # whether the provider said all of it
    first_delta: float | None
    attempts: int
    error: str


@dataclass
class History:
    """What happened, in order."""

    sent: list[Sent] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    faults: list[tuple[float, Sent, UpstreamFault]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def violation(self, rule: str, what: str) -> None:
        if len(self.broken) < 20:
            self.broken.append(f"{rule}: {what}")


class Observer:
    """The gateway's events are not needed here: the world sees more."""

    def attempt(self, event: AttemptEvent) -> None:
        pass

    def call(self, event: CallEvent) -> None:
        pass


class Dialect:
    """Requests need no encoding in this world; the call's name travels in their body."""

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        return Encoded(self, "/chat", chat.end_user_id.encode(), 0)


# What a provider may do to a request, with its weight when it is in a bad mood.
MOODS: dict[Fault, float] = {
    Fault.RATE_LIMITED: 8,
    Fault.SERVER_ERROR: 8,
    Fault.UNREACHABLE: 4,
    Fault.OVERLOADED: 5,
    Fault.TIMEOUT: 3,
    Fault.PROTOCOL: 2,
    Fault.TRUNCATED: 4,
    Fault.STALE_CONNECTION: 3,
    Fault.QUOTA_EXHAUSTED: 0.3,
    Fault.KEY_REJECTED: 0.05,
    Fault.ACCOUNT_DEAD: 0.02,
    Fault.ACCESS_DENIED: 0.1,
    Fault.CREDIT_TOO_SMALL: 0.5,
    Fault.OVER_TIER: 0.5,
    Fault.OUTPUT_INVALID: 1,
    Fault.CONTEXT_TOO_LONG: 1,
    Fault.CONTENT_FILTERED: 1,
    Fault.MODEL_NOT_FOUND: 0.3,
    Fault.REFUSED: 1,
    Fault.TOO_LARGE: 0.5,
}


class Provider:
    """One upstream of the world; stands where UpstreamClient stands in the gateway."""

    def __init__(self, world: World, upstream: Upstream) -> None:
        self.upstream = upstream
        self.dialect = lambda route: Dialect()
        self.open_answers = 0
        self._world = world
        self._random = world.random
        self._outage_until = 0.0
        self._outage_fault = Fault.SERVER_ERROR
        self._next_outage = self._random.expovariate(1 / 300)
        # How often a request goes wrong out of an outage.
        self._misery = self._random.choice([0.0, 0.01, 0.05, 0.3])

    async def fetch(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> chat_service_pb2.ChatResponse:
        async with self._request(encoded, lease, progress) as (words, fault):
            await asyncio.sleep(self._random.expovariate(2.0))
            if fault is not None:
                raise fault
            self._world.said[encoded.body.decode()] = ("".join(words), True)
            response = chat_service_pb2.ChatResponse()
            response.choices.add().message.content = "".join(words)
            return response

    @asynccontextmanager
    async def open(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> AsyncIterator[Answer]:
        async with self._request(encoded, lease, progress) as (words, fault):
            yield Answer(self._world, encoded.body.decode(), words, fault)

    @asynccontextmanager
    async def _request(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> AsyncIterator[tuple[list[str], UpstreamFault | None]]:
        """The request is sent; gives what will be said, and how it goes wrong before the end."""
        world, now = self._world, self._world.now()
        call = encoded.body.decode()
        sent = Sent(call, self.upstream.name, lease.key.id, lease.key.quota_group, lease.model, now)
        world.before(sent, lease)
        world.history.sent.append(sent)
        self.open_answers += 1
        try:
            await asyncio.sleep(self._random.expovariate(20.0))
            fault = self._mood()
            late = fault is not None and fault.fault in (Fault.TRUNCATED, Fault.TIMEOUT)
            if fault is not None:
                world.history.faults.append((world.now(), sent, fault))
            if fault is not None and not (late and self._random.random() < 0.7):
                raise fault
            progress.http_status = 200
            progress.first_byte_at = world.now()
            if self._random.random() < 0.2:
                progress.remaining_requests = self._random.choice([0, 1, 5, 1000])
            yield [f"{call}.{i} " for i in range(self._random.randint(1, 8))], fault
        finally:
            self.open_answers -= 1

    def _mood(self) -> UpstreamFault | None:
        now = self._world.now()
        if now >= self._next_outage:
            self._next_outage = now + self._random.expovariate(1 / 300)
            self._outage_until = now + self._random.expovariate(1 / 20)
            self._outage_fault = self._random.choice(
                [Fault.SERVER_ERROR, Fault.UNREACHABLE, Fault.OVERLOADED, Fault.RATE_LIMITED]
            )
        if now < self._outage_until:
            kind = self._outage_fault
        elif self._random.random() < self._misery:
            kind = self._random.choices(list(MOODS), list(MOODS.values()))[0]
        else:
            return None
        stated = None
        if kind in (Fault.RATE_LIMITED, Fault.OVERLOADED) and self._random.random() < 0.5:
            stated = self._random.choice([0.05, 1.0, 5.0, 30.0, 1e6])
        # Real providers echo keys: the gateway must not pass them on.
        echo = self._random.choice(self.upstream.keys).secret.reveal()
        return UpstreamFault(
            kind,
            f"failed with {echo}",
            http_status=500,
            retry_after=stated,
            should_retry=self._random.choice([None] * 18 + [True, False]),
        )


class Answer:
    """One stream of the world; stands where upstream.client.Answer stands."""

    def __init__(
        self, world: World, call: str, words: list[str], fault: UpstreamFault | None
    ) -> None:
        self._world = world
        self._call = call
        self._words = words
        self._fault = fault
        self._cut = len(words) if fault is None else world.random.randint(0, len(words))
        self._at = 0
        self._next = world.now() + world.random.expovariate(4.0)
        self.usage: chat_pb2.Usage | None = None
        world.said[call] = ("".join(words), fault is None)

    async def read(self, wake_at: float) -> list[Event] | None:
        now = self._world.now()
        if wake_at < self._next:
            await asyncio.sleep(max(0.0, wake_at - now))
            return []
        await asyncio.sleep(max(0.0, self._next - now))
        self._next = self._world.now() + self._world.random.expovariate(4.0)
        if self._at >= self._cut:
            if self._fault is not None:
                raise self._fault
            return None
        events = [] if self._at else [Event(header=chat_service_pb2.ResponseHeader(id=self._call))]
        delta = chat_service_pb2.Delta(content=self._words[self._at])
        self._at += 1
        return [*events, Event(delta=delta)]

    def finish(self) -> list[Event]:
        self.usage = chat_pb2.Usage(completion_tokens=self._at, total_tokens=self._at)
        return [
            Event(finish=chat_service_pb2.Finish(finish_reason_raw="stop")),
            Event(trailer=chat_service_pb2.StreamTrailer(usage=self.usage)),
        ]


class World:
    """One seed's world. `run` lets `calls` calls happen and returns the history."""

    def __init__(self, seed: int, calls: int) -> None:
        self.random = random.Random(seed)
        self.calls = calls
        self.history = History()
        self.said: dict[str, tuple[str, bool]] = {}
        self.rejected: dict[tuple[str, str], float] = {}
        self.removed: set[tuple[str, str]] = set()
        self.secrets: set[str] = set()
        self._generation = 0

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> History:
        upstreams = [self._upstream(name) for name in ("u1", "u2")]
        self.config = Config(
            upstreams=tuple(upstreams),
            models=(
                Model(name="a", upstream="u1", fallbacks=("b",)),
                Model(name="b", upstream="u2"),
                Model(name="c", upstream="u2"),
            ),
            limits=Limits(in_flight=self.random.choice([5, 50, 500]), queue=50),
            timeouts=Timeouts(total=SERVER_MAXIMUM, write=WRITE_TIMEOUT),
            retries=Retries(max_attempts=self.random.randint(1, 6)),
        )
        self.providers = {u.name: Provider(self, u) for u in upstreams}
        self.rings = {u.name: KeyRing(u, random=self.random.random) for u in upstreams}
        pools: dict[str, Any] = {
            name: Pool(
                provider,  # type: ignore[arg-type]  # it stands where UpstreamClient stands
                self.rings[name],
                Admission(max(1, self.config.limits.in_flight * 3 // 4), 50, self.now),
                now=self.now,
            )
            for name, provider in self.providers.items()
        }
        self.gateway = Gateway(
            self.config,
            pools,
            Observer(),
            backoff=Backoff(0.25, 8.0, self.random.random),
            now=self.now,
        )
        rate = self.random.choice([1.0, 5.0, 30.0])  # calls per second
        async with asyncio.TaskGroup() as group:
            for number in range(self.calls):
                await asyncio.sleep(self.random.expovariate(rate))
                group.create_task(self._caller(f"c{number}"))
                if self.random.random() < 0.002:
                    self._reload()
        self._at_rest(pools)
        return self.history

    # --- callers ------------------------------------------------------------------------

    async def _caller(self, name: str) -> None:
        began = self.now()
        wanted = self.random.choice([None, 0.001, 0.5, 3.0, 30.0, 1000.0])
        allowed = min(SERVER_MAXIMUM, wanted if wanted is not None else math.inf)
        chat = chat_service_pb2.ChatRequest(
            model=self.random.choice("aabc"),
            end_user_id=name,
            prompt_cache_key=self.random.choice(["", "", "s1", "s2"]),
        )
        call = Call(chat, name, began, began + allowed, wanted is not None)
        received: list[str] = []
        first: list[float] = []
        finished: list[bool] = []
        slow = self.random.random() < 0.05

        async def write(message: Event) -> None:
            if message.WhichOneof("event") == "delta":
                first.append(self.now())
                received.append(message.delta.content)
            elif message.WhichOneof("event") == "trailer":
                finished.append(True)
            if slow:
                await asyncio.sleep(self.random.choice([0.1, 5.0, 100.0]))

        async def work() -> None:
            if self.random.random() < 0.5:
                await self.gateway.stream(call, write)
                if not finished:
                    self.history.violation("I2", f"{name} is OK without a trailer")
            else:
                response = await self.gateway.chat(call)
                received.append(response.choices[0].message.content)

        task = asyncio.ensure_future(work())
        leaves = None
        if self.random.random() < 0.15:
            leaves = asyncio.get_running_loop().call_later(
                self.random.expovariate(1.0), task.cancel
            )
        outcome, text = OK, ""
        try:
            await task
        except GatewayError as error:
            outcome, text = error.reason_name, f"{error} {error.metadata} {error.quota}"
            self._judge_error(name, error)
        except asyncio.CancelledError:
            outcome = "CANCELLED"
        except Exception as error:  # a defect of the gateway: the worst outcome of all
            outcome = "DEFECT"
            self.history.violation("I1", f"{name}: {type(error).__name__}: {error}")
        finally:
            if leaves is not None:
                leaves.cancel()
        whole, complete = self.said.pop(name, (None, False))
        self.history.ended.append(
            Ended(
                name, began, began + allowed, self.now(), outcome, "".join(received), whole,
                complete, first[0] if first else None, len(call.attempts), text,
            )
        )  # fmt: skip

    def _judge_error(self, name: str, error: GatewayError) -> None:
        seen = f"{error!r} {error} {error.metadata}"
        if any(secret in seen for secret in self.secrets):
            self.history.violation("I16", f"{name}: a key shows in {error.reason_name}")
        waits = error.retry_after
        if waits is not None and waits < 0:
            self.history.violation("I14", f"{name}: a negative delay")

    # --- keys ---------------------------------------------------------------------------

    def _upstream(self, name: str) -> Upstream:
        keys = tuple(self._key(name, i) for i in range(self.random.randint(1, 6)))
        return Upstream(name=name, base_url=f"http://{name}/v1", keys=keys)

    def _key(self, upstream: str, number: int) -> Key:
        self._generation += 1
        secret = f"sk-secret-{upstream}-{self._generation}-{self.random.random()}"
        self.secrets.add(secret)
        return Key(
            id=f"k{number}",
            secret=Secret(secret),
            weight=self.random.choice([1.0, 1.0, 3.0]),
            quota_group=f"g{number // 2}",
            in_flight=self.random.choice([None, None, 2]),
            requests_per_minute=self.random.choice([None, None, 30]),
        )

    def _reload(self) -> None:
        """Keys come, go, and are renewed, while requests run (I18)."""
        name = self.random.choice(["u1", "u2"])
        keys = tuple(self._key(name, i) for i in range(self.random.randint(1, 6)))
        old = {key.id: key for key in self.providers[name].upstream.keys}
        keys = tuple(old.get(k.id, k) if self.random.random() < 0.5 else k for k in keys)
        present = {(name, key.id) for key in keys}
        self.removed |= {(name, key_id) for key_id in old} - present
        self.removed -= present
        for key in keys:
            if key.id not in old or old[key.id].secret != key.secret:
                self.rejected.pop((name, key.id), None)
        self.rings[name].replace(keys)
        renewed = Upstream(name=name, base_url=f"http://{name}/v1", keys=keys)
        self.providers[name].upstream = renewed

    def before(self, sent: Sent, lease: Lease) -> None:
        """Judges a request at the moment it is sent."""
        history = self.history
        if (sent.upstream, sent.key) in self.removed:
            history.violation("I18", f"{sent.call} uses {sent.key}, which was removed")

    # --- judgement ----------------------------------------------------------------------

    def _at_rest(self, pools: dict[str, Pool]) -> None:
        for name, pool in pools.items():
            if pool.ring.in_flight:
                self.history.violation("I11", f"{name}: {pool.ring.in_flight} leases at rest")
            if pool.client.open_answers:
                self.history.violation("I12", f"{name}: {pool.client.open_answers} answers open")
            if pool.waiting or pool.bulkhead.in_flight or pool.bulkhead.waiting:
                self.history.violation("I11", f"{name}: somebody still waits or holds a slot")
        if self.gateway.in_flight:
            self.history.violation("I11", f"{self.gateway.in_flight} calls in flight at rest")


def judge(world: World) -> list[str]:
    """The invariants, from the history alone. Empty when all hold."""
    history = world.history
    first_delta = {e.call: e.first_delta for e in history.ended if e.first_delta is not None}
    sent_by_call: dict[str, list[Sent]] = defaultdict(list)
    for sent in history.sent:
        sent_by_call[sent.call].append(sent)
        at = first_delta.get(sent.call)
        if at is not None and sent.at > at:
            history.violation("I4", f"{sent.call} was sent again after its first delta")
    if len(history.ended) != world.calls:
        history.violation("I1", f"{world.calls} calls, {len(history.ended)} ended")
    for ended in history.ended:
        if ended.ended > ended.deadline + EPSILON:
            late = ended.ended - ended.deadline
            history.violation("I1", f"{ended.call} ended {late:g} s after its deadline")
        if ended.outcome == OK:
            if ended.text != ended.whole or not ended.complete:
                history.violation("I2", f"{ended.call}: OK with {ended.text!r} of {ended.whole!r}")
        elif ended.text and not (ended.whole or "").startswith(ended.text):
            history.violation("I3", f"{ended.call}: {ended.text!r} is no prefix")
    _judge_attempts(world, sent_by_call)
    _judge_keys(world)
    return history.broken


def _judge_attempts(world: World, sent_by_call: dict[str, list[Sent]]) -> None:
    """I5: bounded for each call and over all of them."""
    history, retries = world.history, world.config.retries
    stale: Counter[str] = Counter()
    for _, sent, fault in history.faults:
        if fault.fault is Fault.STALE_CONNECTION:
            stale[sent.call] += 1
    extra: list[float] = []
    begun: list[float] = []
    for call, requests in sent_by_call.items():
        by_upstream = Counter(sent.upstream for sent in requests)
        # A stale connection is tried once more beyond the maximum: nothing had been sent.
        allowed = retries.max_attempts + min(stale[call], 2)
        for name, count in by_upstream.items():
            if count > allowed:
                history.violation("I5", f"{call}: {count} requests to {name}")
        seen: set[str] = set()
        for sent in requests:
            (extra if sent.upstream in seen else begun).append(sent.at)
            seen.add(sent.upstream)
    free = sum(stale.values())
    windows = (history.ended[-1].ended - 1000.0) / 10.0 + 1  # of 10 seconds, from the first call
    bound = retries.budget * len(begun) + retries.budget_floor * windows + free
    if len(extra) > bound:
        history.violation("I5", f"{len(extra)} retries, {bound:.0f} allowed")


def _judge_keys(world: World) -> None:
    """I6, I8, I9, I10: who is closed is not used, and only for a reason."""
    closed: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for at, sent, fault in world.history.faults:
        if fault.fault is Fault.RATE_LIMITED and fault.retry_after is not None:
            until = at + min(fault.retry_after, COOLDOWN_CAP)
            closed[(sent.upstream, sent.group, sent.model)].append((at, until))
    for sent in world.history.sent:
        for began, until in closed.get((sent.upstream, sent.group, sent.model), ()):
            if began + EPSILON < sent.at < until - EPSILON:
                world.history.violation(
                    "I6", f"{sent.call} at {sent.at:.3f} uses a group that cools until {until:.3f}"
                )
