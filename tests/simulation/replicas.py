"""Worlds of several gateways that share limits and keys through a Redis which fails in every way,
in virtual time. It judges nothing: it writes down what happens, and sharing_judge.py reads it.

What stands here is the real gateway from the caller's limits on: Callers, Quotas, SharedKeys,
SharedPool, KeyRing, Store, Gateway. Only Redis (engine.py) and the providers are played.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from simulation.engine import EPOCH, Engine, Line

from tokenwire.v1 import chat_service_pb2
from tokenwire_service import quotas, sharedkeys
from tokenwire_service.admission import Admission
from tokenwire_service.attempts import Call
from tokenwire_service.callers import Callers, Tenant
from tokenwire_service.config import Caller, Config, Key, Limits, Model, Redis, Upstream
from tokenwire_service.errors import Fault, GatewayError, UpstreamFault
from tokenwire_service.gateway import Gateway
from tokenwire_service.keyring import Closed, KeyRing, Lease
from tokenwire_service.quotas import Grant, Quotas, Refusal
from tokenwire_service.retry import Backoff
from tokenwire_service.secret import Digest, Secret
from tokenwire_service.servicer import admitted, begin, reserved
from tokenwire_service.sharedkeys import SharedKeys
from tokenwire_service.sharedpool import SharedPool
from tokenwire_service.store import AwayError, Store
from tokenwire_service.telemetry import AttemptEvent, CallEvent
from tokenwire_service.upstream import dialect as dialects
from tokenwire_service.upstream.client import Progress
from tokenwire_service.upstream.dialect import Encoded, Route

OK, CANCELLED, DEFECT = "OK", "CANCELLED", "DEFECT"
TIMEOUT = 0.25  # seconds for an answer of Redis
LEASE = 2.0  # seconds
FREE, CALM = "free", "calm"  # a caller without limits; an upstream whose keys have none, nor faults
FAULTS = (
    *("kill", "forget", "freeze", "slow", "cut", "part", "flush"),
    "fail again in the moment of its return",
)


@dataclass(slots=True, eq=False)
class Rpc:
    """One chat as its caller saw it. Times in seconds."""

    replica: int
    caller: str
    model: str
    began: float
    admitted_at: float = math.inf
    expected: int = 0  # tokens
    real: int = 0
    ended: float = math.inf
    outcome: str = ""
    error: str = ""

    def __str__(self) -> str:
        return (
            f"{self.caller} to {self.model} over {self.replica}, {self.began:.3f} to "
            f"{self.ended:.3f}: {self.outcome} {self.error}"
        )


@dataclass(slots=True, eq=False)
class Sent:
    """One request as its provider saw it."""

    replica: int
    secret: str
    model: str
    at: float
    ended: float = math.inf


@dataclass(slots=True)
class Told:
    """That a replica closed a key, for a model or for all."""

    at: float
    replica: int
    secret: str
    model: str | None
    until: float


@dataclass(slots=True, repr=False)
class Shared:
    """What happened."""

    seed: int
    on_failure: str
    callers: dict[str, Caller] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)  # by secret
    rpcs: list[Rpc] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    # Of each replica: from when until when Redis was away to it.
    away: list[list[tuple[float, float]]] = field(default_factory=list)
    unheard: list[tuple[float, str]] = field(default_factory=list)  # reservations without an answer
    flushes: list[float] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    at_rest: list[str] = field(default_factory=list)


class World:
    """One seed's world. `run` lets so many chats happen."""

    def __init__(self, seed: int, size: int) -> None:
        self.random = random.Random(seed)
        chance = self.random
        self.size = size
        self.history = Shared(seed, chance.choice(["open", "closed"]))
        self._rate = chance.choice([3.0, 10.0, 30.0])  # chats a second
        self._calmness = chance.choice([2.0, 8.0, 40.0])  # seconds between two faults
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Shared:
        """Everything that happens."""
        loop = asyncio.get_running_loop()
        self.now = loop.time
        self.engine = Engine(self.now, self.random)
        self.providers = {name: _Provider(self, name) for name in ("plain", "limited", CALM)}
        history, chance = self.history, self.random
        history.callers = {each.name: each for each in self._callers()}
        self.replicas = [Replica(self, number) for number in range(3)]
        running = [asyncio.ensure_future(each) for one in self.replicas for each in one.runs()]
        for one in self.replicas:
            await one.store.tried()
        failing = asyncio.ensure_future(self._fail())
        for _ in range(self.size):
            await asyncio.sleep(chance.expovariate(self._rate))
            if chance.random() < 0.01:
                self.providers["plain"].misfortune()
            task = asyncio.ensure_future(chance.choice(self.replicas).serve())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if chance.random() < 0.05:
                loop.call_later(chance.choice([0.0, 0.001, 0.3, 3.0]), task.cancel)
        failing.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._at_rest()
        for each in (failing, *running):
            each.cancel()
        await asyncio.gather(failing, *running, return_exceptions=True)
        return history

    def _callers(self) -> list[Caller]:
        chance = self.random
        limits: dict[str, dict[str, int]] = {
            "requests": {"requests_per_minute": chance.choice([5, 30, 100])},
            "running": {"in_flight": chance.choice([1, 3])},
            "tokens": {"tokens_per_minute": chance.choice([1000, 8000])},
            "all": {
                "requests_per_minute": 40,
                "tokens_per_minute": 9000,
                "in_flight": 4,
                "tokens_per_day": chance.choice([5000, 10**9]),
            },
            FREE: {},
        }
        return [Caller(name=n, tokens=(Digest.of(n),), **given) for n, given in limits.items()]

    # --- what fails ---------------------------------------------------------------------

    async def _fail(self) -> None:
        while True:
            await asyncio.sleep(self.random.expovariate(1 / self._calmness))
            await self._fault(self.random.choice(FAULTS))

    async def _fault(self, kind: str) -> None:
        engine, chance = self.engine, self.random
        self.history.faults.append((self.now(), kind))
        seconds = chance.choice([0.02, 0.4, 3.0, 15.0])
        replica = chance.choice(self.replicas)
        match kind:
            case "kill" | "forget" | "fail again in the moment of its return":
                engine.up = False
                if kind == "forget" or (kind == FAULTS[-1] and chance.random() < 0.5):
                    engine.forget()
                await asyncio.sleep(seconds)
                if kind == FAULTS[-1]:
                    for each in self.replicas:
                        each.breaks = chance.choice([0, 1, 1, 2])
                engine.lives += 1
                engine.up = True
            case "freeze":
                engine.frozen_until = self.now() + seconds
                await asyncio.sleep(seconds)
            case "slow":
                engine.latency = chance.choice([0.03, 0.1, 0.4])
                await asyncio.sleep(seconds)
                engine.latency = 0.001
            case "cut":
                for _ in range(chance.choice([1, 4])):
                    replica.cut()
                    await asyncio.sleep(chance.uniform(0.0, 0.1))
            case "part":
                replica.reaches = False
                replica.cut()
                await asyncio.sleep(seconds)
                replica.reaches = True
            case _:
                engine.forget()
                self.history.flushes.append(self.now())

    # --- the end ------------------------------------------------------------------------

    async def _at_rest(self) -> None:
        """Everything is well again, and a lease's time passes."""
        engine, rest = self.engine, self.history.at_rest
        engine.lives += not engine.up
        engine.up, engine.frozen_until, engine.latency = True, 0.0, 0.001
        for one in self.replicas:
            one.reaches, one.breaks = True, 0
        await asyncio.sleep(LEASE + 3.0)
        for one in self.replicas:
            if not one.store.here:
                rest.append(f"{one.number}: Redis is there, and away")
            await one.store.drain()
            for name, pool in one.pools.items():
                if pool.ring.in_flight or pool._grants or pool.waiting:
                    rest.append(f"{one.number}: keys of {name} are held")
            leases = [each for found in one.quotas._subjects.values() for each in found.leases]
            if leases:
                rest.append(f"{one.number}: {leases} are held")
            rest += [f"{each.name} runs" for each in one.callers.tenants() if each._in_flight]
        if held := engine.members(":running"):
            rest.append(f"Redis has {held}")


class Replica:
    """One gateway."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self.number = number
        self.reaches = True
        self.breaks = 0  # how many of its next connections break while it tells what it has to
        self._lines: list[Line] = []
        history, chance = world.history, world.random
        settings = Redis(
            url="redis://u", on_failure=cast(Any, history.on_failure), timeout=TIMEOUT, lease=LEASE
        )
        self.store = _Store(settings, self)
        self.quotas = _Quotas(self.store, world)
        self.keys = SharedKeys(self.store, now=world.now)
        self.callers = _Callers(
            tuple(history.callers.values()),
            quotas=self.quotas,
            now=world.now,
            clock=lambda: EPOCH + world.now(),
        )
        upstreams = tuple(each.upstream for each in world.providers.values())
        config = Config(
            upstreams=upstreams,
            models=tuple(Model(name=u.name, upstream=u.name) for u in upstreams),
            limits=Limits(in_flight=10_000, queue=0),
        )
        self.pools: dict[str, SharedPool] = {}
        for upstream in upstreams:
            ring = KeyRing(upstream, random=chance.random)
            client = cast(Any, _Client(world.providers[upstream.name], self))
            slots = Admission(10_000, 0, world.now)
            pool = SharedPool(client, ring, slots, self.quotas, now=world.now)
            self.pools[upstream.name] = pool
            self.keys.join(upstream.name, ring, pool.look)
            self._listen(ring)
        self.gateway = Gateway(
            config, self.pools, _Nobody(), backoff=Backoff(0.25, 8.0, chance.random), now=world.now
        )

    def runs(self) -> tuple[Any, ...]:
        """What must run."""
        return self.store.run(), self.quotas.run(), self.keys.run()

    def line(self) -> Line:
        """Another connection."""
        line = Line(self._world.engine, lambda: self.reaches)
        self._lines = [line]
        return line

    def cut(self) -> None:
        """Its connection breaks."""
        for each in self._lines:
            each.cut()

    def _listen(self, ring: KeyRing) -> None:
        tell = cast(Callable[[Closed], None], ring.tell)

        def told(closed: Closed) -> None:
            secret = closed.key.secret.reveal()
            self._world.history.told.append(
                Told(self._world.now(), self.number, secret, closed.model, closed.until)
            )
            tell(closed)

        ring.tell = told

    async def serve(self) -> None:
        """One chat, as the servicer serves it."""
        world, chance = self._world, self._world.random
        caller = chance.choice(list(world.history.callers))
        model = chance.choice(list(world.providers))
        rpc = Rpc(self.number, caller, model, world.now())
        chat = chat_service_pb2.ChatRequest(model=model)
        chat.messages.add(role="user").content = "x" * chance.choice([40, 400])
        chat.params.max_completion_tokens = chance.choice([50, 500])
        context = cast(Any, _Context(self.callers.identify([f"Bearer {caller}"], ()), rpc.began))
        try:
            call = begin(chat, context, self.gateway.config, world.now)
            has = await reserved(call, context, self.gateway)
            with admitted(call, context, has):
                rpc.admitted_at, rpc.expected = world.now(), has.tokens
                answer = await self.gateway.chat(call)
            rpc.outcome, rpc.real = OK, answer.usage.total_tokens
        except GatewayError as error:
            rpc.outcome, rpc.error = error.reason_name, error.message
        except asyncio.CancelledError:
            rpc.outcome = CANCELLED
        except Exception as error:
            rpc.outcome, rpc.error = DEFECT, f"{type(error).__name__}: {error}"
        rpc.ended = world.now()
        world.history.rpcs.append(rpc)


# --- the gateway's own parts, watched ---------------------------------------------------


class _Store(Store):
    """Over a line to the engine; tells when Redis is away."""

    def __init__(self, settings: Redis, replica: Replica) -> None:
        world = replica._world
        super().__init__(
            settings,
            (*quotas.SCRIPTS, *sharedkeys.SCRIPTS),
            logging.Logger("simulation", logging.CRITICAL),
            now=world.now,
            random=world.random.random,
        )
        self._replica = replica
        self._away: list[tuple[float, float]] = [(-math.inf, math.inf)]
        world.history.away.append(self._away)
        self.on_return(self._returned)

    def _returned(self, lost: bool) -> tuple[()]:
        self._away[-1] = (self._away[-1][0], self._now())
        if self._replica.breaks:
            self._replica.breaks -= 1
            soon = self._replica._world.random.uniform(0.0, 0.003)
            asyncio.get_running_loop().call_later(soon, self._replica.cut)
        return ()

    def _leave(self, why: str, *, tell: bool = True) -> None:
        if self.here:
            self._away.append((self._now(), math.inf))
        super()._leave(why, tell=tell)

    def _client(self) -> Any:
        return self._replica.line()


class _Quotas(Quotas):
    """Tells which reservations had no answer: they may have been done."""

    def __init__(self, store: Store, world: World) -> None:
        super().__init__(store, now=world.now, clock=lambda: EPOCH + world.now())
        self._world = world

    async def reserve(self, subject: str, limits: quotas.Limits, tokens: int) -> Grant | Refusal:
        asked = self._store.here
        try:
            return await super().reserve(subject, limits, tokens)
        except (AwayError, asyncio.CancelledError):
            if asked:
                self._world.history.unheard.append((self._world.now(), subject))
            raise


class _Callers(Callers):
    def tenants(self) -> list[Tenant]:
        """All of them."""
        return list(self._tenants.values())


class _Context:
    """What an RPC is to the servicer."""

    request_id = ""
    span = None

    def __init__(self, tenant: Tenant, started: float) -> None:
        self.tenant = tenant
        self.started = started

    def time_remaining(self) -> float:
        """Seconds."""
        return 20.0

    def account(self, call: Call) -> None:
        """Nobody looks."""


class _Nobody:
    """An observer."""

    def attempt(self, event: AttemptEvent) -> None:
        """Nobody looks."""

    def call(self, event: CallEvent) -> None:
        """Nobody looks."""


# --- providers --------------------------------------------------------------------------


class _Dialect(dialects.Dialect):
    """Requests need no encoding in this world."""

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        return Encoded(self, "/chat", b"{}", chat.params.max_completion_tokens)


class _Provider:
    """One upstream, the same for every replica."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        chance = world.random
        limits: dict[str, int] = {}
        if name == "limited":
            limits = {"requests_per_minute": chance.choice([10, 60])}
            limits["in_flight"] = chance.choice([1, 3])
        self._keys = [
            Key(id=f"k{i}", secret=Secret(f"sk-{name}-{i}"), quota_group=f"k{i}", **limits)
            for i in range(3)
        ]
        self.upstream = Upstream(name=name, base_url=f"http://{name}/v1", keys=tuple(self._keys))
        world.history.keys |= {key.secret.reveal(): key for key in self._keys}
        self.latency = chance.choice([0.05, 0.5, 3.0])
        self._rejected: set[str] = set()
        self._cools: dict[str, float] = {}

    def misfortune(self) -> None:
        """A key is revoked, or told to wait. One of them serves whatever happens."""
        chance = self._world.random
        secret = chance.choice(self._keys[1:]).secret.reveal()
        if chance.random() < 0.1:
            self._rejected.add(secret)
        else:
            self._cools[secret] = self._world.now() + chance.choice([1.0, 10.0, 100.0])

    async def fetch(self, replica: int, lease: Lease) -> chat_service_pb2.ChatResponse:
        """An answer, after a while."""
        world, secret = self._world, lease.key.secret.reveal()
        sent = Sent(replica, secret, lease.model, world.now())
        world.history.sent.append(sent)
        try:
            if secret in self._rejected:
                raise UpstreamFault(Fault.KEY_REJECTED, "revoked")
            if (left := self._cools.get(secret, 0.0) - world.now()) > 0:
                raise UpstreamFault(Fault.RATE_LIMITED, "wait", retry_after=left)
            await asyncio.sleep(min(10.0, world.random.expovariate(1 / self.latency)))
        finally:
            sent.ended = world.now()
        answer = chat_service_pb2.ChatResponse()
        answer.choices.add().message.content = "yes"
        answer.usage.prompt_tokens = 5
        answer.usage.completion_tokens = world.random.randint(1, 50)
        answer.usage.total_tokens = 5 + answer.usage.completion_tokens
        return answer


class _Client:
    """A provider as one replica's UpstreamClient."""

    def __init__(self, provider: _Provider, replica: Replica) -> None:
        self.upstream = provider.upstream
        self._provider = provider
        self._replica = replica.number
        dialect = _Dialect()
        self.dialect = lambda route: dialect

    async def fetch(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> chat_service_pb2.ChatResponse:
        """As UpstreamClient.fetch."""
        answer = await self._provider.fetch(self._replica, lease)
        progress.http_status = 200
        return answer
