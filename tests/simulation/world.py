"""A world for the gateway: providers, callers and operators that do anything at any time, all from
one seed and in virtual time. It judges nothing: it writes down what happens (history.py).

What stands here is the real gateway: Gateway, Pool, KeyRing, Admission, RetryBudget, Backoff, and
for batches the servicer. Only the sockets on both sides are played, by Provider and by `_Caller`.
Key rings, pools and slots are watched by subclasses that add nothing but a line in the history.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

from google.rpc import error_details_pb2
from simulation.history import (
    BACKOFF,
    BULKHEAD,
    CANCELLED,
    DEFECT,
    FINISH,
    OK,
    PLACES,
    QUEUE,
    WAITING,
    WRITE,
    CallRecord,
    Changes,
    Denied,
    Failed,
    History,
    Leased,
    Released,
    Replaced,
    Request,
    Succeeded,
    Told,
)
from simulation.judge import at_a_glance
from simulation.provider import MISTAKES, UNSUITED, Account, Provider
from simulation.vtime import VirtualLoop

from tokenwire.v1 import chat_service_pb2, error_reason_pb2
from tokenwire_service.admission import Admission, FullError
from tokenwire_service.attempts import Call
from tokenwire_service.callers import Tenant
from tokenwire_service.config import Config, Key, Limits, Model, Retries, Timeouts, Upstream
from tokenwire_service.errors import GatewayError, UpstreamFault
from tokenwire_service.gateway import Gateway
from tokenwire_service.keyring import KeyRing, Lease, Unavailable
from tokenwire_service.pool import Pool
from tokenwire_service.retry import Backoff
from tokenwire_service.secret import Secret
from tokenwire_service.servicer import ChatServicer
from tokenwire_service.settings import UpstreamTimeouts
from tokenwire_service.telemetry import AttemptEvent, CallEvent

Event = chat_service_pb2.StreamChatResponse

SERVER_MAXIMUM = 120.0  # seconds of one call
WRITE_TIMEOUT = 20.0
FIRST_BYTE_TIMEOUT = 30.0
IDLE_TIMEOUT = 15.0
QUANTUM = 0.25  # seconds: in some worlds much happens at the very same moment
SECRET = "sk-secret-"  # how each begins
ORGANIZATION = "org-account-"  # likewise
NOWHERE = "nowhere"  # a model that nobody configured

# Models, each with its upstream and its fallbacks.
MODELS = (
    ("a", "u1", ("b",)),
    ("b", "u2", ()),
    ("c", "u2", ()),
    ("d", "u3", ("a", "c")),
    ("e", "u1", ()),
)
STREAMING = (None, None, None, "always", "never")
# Of snapshots. Any other is that of an error.
_STATES = {
    chat_service_pb2.Snapshot.STATE_READY: "r",
    chat_service_pb2.Snapshot.STATE_STREAMING: "s",
    chat_service_pb2.Snapshot.STATE_ENDED: "e",
}


class World:
    """One seed's world. `run` lets about `size` calls happen and returns the history.

    `clock_jumps`: whether the clocks on the wall jump about meanwhile. It must not matter.
    """

    def __init__(self, seed: int, size: int, *, clock_jumps: bool = True) -> None:
        self.random = random.Random(seed)
        self.size = size
        self.history = History(seed, {name: upstream for name, upstream, _ in MODELS})
        self.running: dict[str, CallRecord] = {}
        self.mistakes: dict[tuple[str, str], Any] = {}  # (call, upstream): a fault, or UNSUITED
        self.names = [name for name, _, _ in MODELS]
        self.now: Callable[[], float] = time.monotonic
        self._clock_jumps = clock_jumps
        self.leavers: dict[str, tuple[str, Callable[[], object]]] = {}  # where, and how
        self._by_task: dict[Any, CallRecord] = {}
        self._generation = 0
        self._tasks: set[asyncio.Task[None]] = set()
        chance = self.random
        self._quantum = chance.random() < 0.25
        self._rate = chance.choice([0.5, 3.0, 8.0, 20.0])  # calls per second
        self._hurry = chance.choice([0.02, 0.1, 0.3])  # share of callers that leave
        self._slow = chance.choice([0.0, 0.03, 0.2])  # share of callers that read slowly
        self._one_account = chance.random() < 0.2  # quota groups are declared wrongly
        self._grace = chance.choice([0.5, 5.0, 30.0, 1e9])  # seconds of a drain

    async def run(self) -> History:
        """Everything that happens."""
        loop = cast(VirtualLoop, asyncio.get_running_loop())
        self._loop = loop
        self.now = loop.time
        self.history.began = self.now()
        with self._clocks():
            self._build()
            number = 0
            while number < self.size:
                await asyncio.sleep(self.moment(1.0 / self._rate))
                number += self._arrival(number)
                self._operate()
                if not self.gateway.draining and number > 0.98 * self.size:
                    self.gateway.draining = True
                    self.history.drained_at = self.now()
                    loop.call_later(self.moment(self._grace), self._close)
            while self._tasks:
                await asyncio.wait(self._tasks)
        self._at_rest()
        self.history.rounds = loop.rounds
        return self.history

    def _close(self) -> None:
        """The grace of the drain is over."""
        if self._tasks:
            self.history.closed_at = self.now()
            self.gateway.close()

    def moment(self, mean: float) -> float:
        """A random time, seconds."""
        seconds = self.random.expovariate(1.0 / mean)
        return math.ceil(seconds / QUANTUM) * QUANTUM if self._quantum else seconds

    # --- the gateway --------------------------------------------------------------------

    def _build(self) -> None:
        chance = self.random
        self.providers: dict[str, Provider] = {}
        self.pools: dict[str, _Pool] = {}
        in_flight = chance.choice([8, 100, 500])
        config = Config(
            upstreams=tuple(self._upstream(name) for name in ("u1", "u2", "u3")),
            models=tuple(
                Model(name=n, upstream=u, fallbacks=f, streaming=chance.choice(STREAMING))
                for n, u, f in MODELS
            ),
            limits=Limits(in_flight=in_flight, queue=chance.choice([0, 10, 50])),
            timeouts=Timeouts(total=SERVER_MAXIMUM, write=WRITE_TIMEOUT),
            retries=Retries(
                max_attempts=chance.randint(1, 6),
                budget=chance.choice([0.0, 0.2, 0.2, 1.0]),
                budget_floor=chance.choice([0, 10, 10, 100]),
            ),
        )
        self.config = config
        history = self.history
        history.max_attempts = config.retries.max_attempts
        history.budget, history.budget_floor = config.retries.budget, config.retries.budget_floor
        for upstream in config.upstreams:
            self._meet(upstream)
        self.gateway = Gateway(
            config,
            self.pools,
            _Observer(self),
            backoff=Backoff(0.25, 8.0, chance.random),
            now=self.now,
            sleep=self._backs_off,
        )
        # The gateway makes its own slots; here they are watched.
        self.gateway._admission = _Slots(self, QUEUE, in_flight, config.limits.queue)
        self.servicer = ChatServicer(
            lambda: self.gateway, logging.getLogger("simulation"), now=self.now
        )

    def _meet(self, upstream: Upstream) -> None:
        config = self.config
        provider = Provider(self, upstream)
        for key in upstream.keys:
            self._open_account(provider, key)
        ring = _Ring(upstream, self)
        self.providers[upstream.name] = provider
        self.pools[upstream.name] = _Pool(
            cast(Any, provider),  # it stands where UpstreamClient stands
            ring,
            _Slots(self, BULKHEAD, max(1, config.limits.in_flight * 3 // 4), config.limits.queue),
            now=self.now,
        )
        self.pools[upstream.name].world = self

    async def _backs_off(self, seconds: float) -> None:
        call = self.here()
        self.at(call, BACKOFF)
        await asyncio.sleep(seconds)

    # --- what the parts of the world tell each other -------------------------------------

    def here(self) -> CallRecord:
        """The call that the running task serves."""
        return self._by_task[asyncio.current_task()]

    def at(self, call: CallRecord, place: str) -> None:
        """The call is about to wait there. Some callers leave just then."""
        call.place = place
        leaves = self.leavers.get(call.name)
        if leaves is not None and leaves[0] == place:
            del self.leavers[call.name]
            self._loop.call_later(self.random.choice([0.0, 0.0, 0.01]), leaves[1])

    def enters(self, name: str, model: str, stream: bool) -> None:
        """The call has been routed; its upstream is to be asked for a stream, or for a whole."""
        call = self.running[name]
        call.place = "entering"
        call.tried.append(model)
        call.folded = stream != (call.method in ("stream", "cumulative"))

    def sends(self, call: CallRecord, upstream: str, lease: Lease, fresh: bool) -> Request:
        """A request for the call reaches its provider."""
        request = Request(call.name, upstream, lease, self.now(), fresh=fresh)
        call.requests.append(request)
        return request

    # --- callers ------------------------------------------------------------------------

    def _arrival(self, number: int) -> int:
        """One caller comes, with one call or a batch; how many calls."""
        chance = self.random
        batch = chance.randint(2, 8) if chance.random() < 0.02 else 0
        task = _Caller(self, number, batch).begin()
        self._tasks.add(task)
        task.add_done_callback(self._gone)
        return batch or 1

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._by_task.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # a mistake of this world's

    def begins(self, call: CallRecord) -> None:
        """The call is served by the running task from now on."""
        call.began = self.now()
        call.while_draining = self.gateway.draining
        self.running[call.name] = call
        self._by_task[asyncio.current_task()] = call
        if self.random.random() < 0.04:
            upstream = self.random.choice(list(self.providers))
            self.mistakes[(call.name, upstream)] = self.random.choice([*MISTAKES, *UNSUITED])

    def ends(self, call: CallRecord) -> None:
        """The call has its outcome."""
        self.running.pop(call.name, None)
        self.leavers.pop(call.name, None)
        if self.mistakes:
            for upstream in self.providers:
                self.mistakes.pop((call.name, upstream), None)
        self.history.calls.append(call)

    # --- operators ----------------------------------------------------------------------

    def _operate(self) -> None:
        """After each arrival: what may happen from outside, some time soon."""
        chance, loop = self.random, self._loop
        dice = chance.random()
        if dice < 0.003:
            loop.call_later(self.moment(0.5), self._reload)
        elif dice < 0.008:
            loop.call_later(
                self.moment(0.5), chance.choice(list(self.providers.values())).misfortune
            )
        elif dice < 0.010:
            loop.call_later(self.moment(0.5), self._stall)
        elif dice < 0.2:
            # Off every quantum, so that nothing else happens at the same moment.
            at = self.now() + chance.random() + 1e-4
            loop.call_at(at, self._glance, at)

    def _stall(self) -> None:
        began = self.now()
        self._loop.stall(self.random.choice([0.05, 2.0, 2.0, 10.0]))
        self.history.stalls.append((began, self.now()))

    def _glance(self, due: float) -> None:
        if self.now() > due + QUANTUM / 100:
            return  # the process stood still: what was due meanwhile comes now
        admission = self.gateway._admission
        self.history.seen += at_a_glance(self.now(), list(self.pools.values()), admission)

    def _upstream(self, name: str) -> Upstream:
        keys = tuple(self._key(name, i) for i in range(self.random.randint(1, 6)))
        return Upstream(
            name=name,
            base_url=f"http://{name}/v1",
            keys=keys,
            passthrough=name == "u3" and self.random.random() < 0.5,
            streaming=self.random.choice(["as_asked", "as_asked", "always", "never"]),
            organizations=tuple(
                f"{ORGANIZATION}{name}-{i}" for i in range(self.random.choice([0, 0, 1, 2]))
            ),
            timeouts=UpstreamTimeouts(first_byte=FIRST_BYTE_TIMEOUT, idle=IDLE_TIMEOUT),
        )

    def _key(self, upstream: str, number: int) -> Key:
        chance = self.random
        self._generation += 1
        return Key(
            id=f"k{number}",
            secret=Secret(f"{SECRET}{upstream}-{self._generation}-{chance.random()}"),
            weight=chance.choice([1.0, 1.0, 3.0]),
            quota_group=f"k{number}" if self._one_account else f"g{number // 2}",
            in_flight=chance.choice([None, None, None, 2]),
            requests_per_minute=chance.choice([None, None, None, 30]),
            tokens_per_minute=chance.choice([None, None, None, 20_000]),
        )

    def _open_account(self, provider: Provider, key: Key) -> None:
        name = f"account {int(key.id[1:]) // 2}"
        provider.account_of[key.id] = name
        if name in provider.accounts:
            return
        chance = self.random
        if chance.random() < 0.1:  # fine-tuned models and previews belong to accounts
            provider.lacks.add((key.id, chance.choice(self.names)))
        provider.accounts[name] = Account(
            at_once=chance.choice([math.inf, math.inf, 3, 20]),
            requests=chance.choice([math.inf, math.inf, 20, 200]),
            tokens=chance.choice([math.inf, math.inf, 20_000]),
            tells=chance.random() < 0.5,
            tells_remaining=chance.random() < 0.5,
            largest=chance.choice([math.inf, math.inf, 300]),
        )

    def _reload(self) -> None:
        """Keys come, go, and are changed in every way, while requests run."""
        chance = self.random
        provider = chance.choice(list(self.providers.values()))
        name = provider.upstream.name
        old = {key.id: key for key in provider.keys}
        keys: list[Key] = []
        for number in range(chance.randint(0 if chance.random() < 0.1 else 1, 6)):
            new = self._key(name, number)
            before = old.get(new.id)
            match chance.randrange(3):
                case 0:
                    pass  # another secret, too
                case 1:
                    new = before or new
                case _ if before is not None:  # only its limits
                    new = Key(
                        id=new.id,
                        secret=before.secret,
                        weight=new.weight,
                        quota_group=new.quota_group,
                        in_flight=new.in_flight,
                        requests_per_minute=new.requests_per_minute,
                        tokens_per_minute=new.tokens_per_minute,
                    )
            keys.append(new)
            self._open_account(provider, new)
        provider.keys = tuple(keys)
        self.history.reloads += 1
        self.pools[name].replace(keys)

    @contextmanager
    def _clocks(self) -> Iterator[None]:
        """Clocks on the wall that jump at every look, forwards and back."""
        if not self._clock_jumps:
            yield
            return
        wild = random.Random(self.history.seed)
        real = time.time, time.monotonic
        time.time = time.monotonic = lambda: wild.uniform(0.0, 4e9)
        try:
            yield
        finally:
            time.time, time.monotonic = real

    # --- the end ------------------------------------------------------------------------

    def _at_rest(self) -> None:
        rest = self.history.at_rest
        for name, pool in self.pools.items():
            if pool.ring.in_flight:
                rest.append(f"{name}: {pool.ring.in_flight} leases")
            if pool.client.open_answers:
                rest.append(f"{name}: {pool.client.open_answers} answers are open")
            if pool.waiting or pool.bulkhead.waiting or pool.bulkhead.in_flight:
                rest.append(f"{name}: somebody waits or has a slot")
        if self.gateway.in_flight or self.gateway._admission.waiting:
            rest.append(f"{self.gateway.in_flight} calls are in flight")
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left or self.running:
            rest.append(f"tasks or calls are left: {left} {list(self.running)}")


class _Caller:
    """One caller, with one call or one batch of them."""

    def __init__(self, world: World, number: int, batch: int) -> None:
        chance = world.random
        self._world = world
        now = world.now()
        # Deadlines from 1 ms to beyond the server's maximum, or none.
        dice = chance.random()
        shortest = -3.0 if dice < 0.15 else -0.5
        wanted = None if dice > 0.6 else 10 ** chance.uniform(shortest, 2.5)
        self._until = math.inf if wanted is None else now + wanted
        self._batch = batch
        self.span = None  # nothing is traced
        method = "item" if batch else chance.choice(["chat", "stream", "stream", "cumulative"])
        self._records: list[CallRecord] = []
        self._chats: list[chat_service_pb2.ChatRequest] = []
        for index in range(batch or 1):
            model = chance.choice("aabccdde") if chance.random() < 0.98 else NOWHERE
            record = CallRecord(
                f"c{number + index}",
                method,
                _chain(model),
                now,
                min(self._until, now + SERVER_MAXIMUM),
                wanted is not None and wanted <= SERVER_MAXIMUM,
            )
            chat = chat_service_pb2.ChatRequest(
                model=model,
                end_user_id=record.name,
                prompt_cache_key=chance.choice(["", "", "s1", "s2"]),
            )
            size = chance.choices([1, 100, 1000], [45, 50, 5])[0]
            record.tokens = size
            chat.messages.add(role="user").content = "x" * (4 * size)
            if chance.random() < 0.1:
                chat.params.max_completion_tokens = chance.choice([100, 5000])
            self._records.append(record)
            self._chats.append(chat)
        # How it reads: seconds that each write takes; or it stops once, or for good.
        self._pause, self._stops = 0.0, -1
        if chance.random() < world._slow:
            self._pause = chance.choice([0.0, 0.1, 1.0])
            self._stops = chance.choice([-1, -1, 1, 3])
        for record in self._records:
            record.slow = self._pause > 0 or self._stops > 0
        self._stops_for = chance.choice([5.0, 15.0, 1e9])
        self._vanishes = False  # rather than to cancel: its connection breaks
        self._gone = asyncio.Event()
        self._writes = 0
        self._next = 0  # item of the batch

    def begin(self) -> asyncio.Task[None]:
        """Calls, and leaves perhaps."""
        world, chance = self._world, self._world.random
        task = world._loop.create_task(self._batched() if self._batch else self._single())
        if chance.random() < world._hurry:
            if chance.random() < 0.6:
                place = chance.choice(PLACES)
                self._vanishes = place == WRITE and chance.random() < 0.3
                for record in self._records:
                    world.leavers[record.name] = (place, lambda: self._leave(task))
            else:
                after = world.moment(chance.choice([0.01, 1.0, 10.0]))
                world._loop.call_later(after, self._leave, task)
        return task

    def _leave(self, task: asyncio.Task[None]) -> None:
        if task.done():
            return
        for record in self._records:
            if record.name in self._world.running:
                record.left_at, record.left_in = self._world.now(), record.place
        if self._vanishes:  # the write fails, and a moment later gRPC cancels
            self._gone.set()
            self._world._loop.call_later(0.01, task.cancel)
        else:
            task.cancel()

    # --- one call -----------------------------------------------------------------------

    async def _single(self) -> None:
        world, record, chat = self._world, self._records[0], self._chats[0]
        world.begins(record)
        record.deadline = min(self._until, record.began + SERVER_MAXIMUM)
        call = Call(chat, record.name, record.began, record.deadline, record.callers_deadline)
        try:
            if record.method == "chat":
                response = await world.gateway.chat(call)
                record.text = response.choices[0].message.content
            else:
                await world.gateway.stream(
                    call,
                    self._write,
                    cumulative=record.method == "cumulative",
                    max_delay=world.random.choice([0.0, 0.0, 0.05, 1.0]),
                )
            record.outcome = OK
        except GatewayError as error:
            record.outcome = error.reason_name
            record.error = f"{error!r} {error}"
            record.about = error.metadata.get("upstream", "")
            record.timer = error.metadata.get("timer", "")
            record.retry_after = error.retry_after
        except asyncio.CancelledError:
            record.outcome = CANCELLED
        except Exception as error:  # a defect of the gateway: the worst outcome of all
            record.outcome, record.error = DEFECT, f"{type(error).__name__}: {error}"
        record.usage = call.usage
        record.ended = world.now()
        world.ends(record)

    async def _write(self, message: Event) -> None:
        world, record = self._world, self._records[0]
        kind = message.WhichOneof("event") or "beat"
        refused = False  # before anything was said
        if kind == "delta":
            record.text += message.delta.content
        elif kind == "snapshot":
            text = message.snapshot.message.content
            if not text.startswith(record.text):
                record.kinds += "!"  # it took back what it had said
            record.text = text
            state = _STATES.get(message.snapshot.state, "x")
            refused = state == "x" and not record.kinds
            if record.states[-1:] != state:
                record.states += state
        if kind in ("delta", "snapshot") and record.first_delta_at is None and not refused:
            record.first_delta_at = world.now()
        if kind != "beat" and record.kinds[-1:] != kind[0] and not refused:
            record.kinds += kind[0]
        record.writing = True
        place = FINISH if kind in ("finish", "trailer") else WRITE
        pause = self._pause
        self._writes += 1
        if self._writes == self._stops:
            pause = self._stops_for
        leaves = world.leavers.get(record.name)
        if leaves is not None and leaves[0] == place:
            pause = 0.5
        world.at(record, place)
        if self._vanishes and place == WRITE and leaves is not None:
            await self._gone.wait()
            raise GatewayError(error_reason_pb2.ERROR_REASON_CANCELLED, "the caller is gone")
        if pause:
            await asyncio.sleep(pause)
        record.writing = False
        record.last_write_at = world.now()

    # --- a batch: stands where interceptors.CallContext stands ------------------------------

    async def _batched(self) -> None:
        world = self._world
        request = chat_service_pb2.BatchChatRequest(max_concurrency=world.random.randint(1, 4))
        for chat in self._chats:
            request.items.add(chat=chat)
        refused = ""
        try:
            await world.servicer.BatchChat(request, cast(Any, self))
        except GatewayError as error:
            refused = error.reason_name
        except asyncio.CancelledError:
            pass
        if refused and not self._next:
            world.begins(self._records[0])
            self._next = 1
        for record in self._records[: self._next]:
            if not record.outcome:  # nobody heard of it
                record.outcome = refused or CANCELLED
            record.ended = min(record.ended, world.now())
            world.ends(record)

    request_id = ""
    started = 0.0
    tenant = Tenant()  # nobody in particular

    def time_remaining(self) -> float | None:
        """Asked once for each item, when it begins."""
        world, record = self._world, self._records[self._next]
        self._next += 1
        world.begins(record)
        record.while_draining = False  # its batch began before
        record.deadline = min(max(self._until, record.began), record.began + SERVER_MAXIMUM)
        record.callers_deadline = self._until - record.began <= SERVER_MAXIMUM
        return None if self._until == math.inf else self._until - world.now()

    def account(self, call: Call) -> None:
        """Called when an item has ended."""
        record = self._world.here()
        record.usage = call.usage
        record.ended = self._world.now()
        self._world._by_task.pop(asyncio.current_task(), None)

    def pack(self, message: object) -> bytes:
        """Nothing is sent here."""
        return b""

    async def write(self, answer: chat_service_pb2.BatchChatResponse) -> None:
        """One item's answer."""
        record = self._records[answer.index]
        if answer.HasField("response"):
            record.outcome = OK
            record.text = answer.response.choices[0].message.content
        else:
            whole = str(answer.error)
            info = error_details_pb2.ErrorInfo()
            for detail in answer.error.details:
                if detail.Unpack(info):
                    record.outcome, record.about = info.reason, info.metadata.get("upstream", "")
                    record.timer = info.metadata.get("timer", "")
            # Protobuf writes maps in an order of its own, another in each process.
            facts = f"{answer.error.message} {sorted(info.metadata.items())}"
            shows = SECRET in whole or ORGANIZATION in whole
            record.error = whole if shows else facts
        if record.outcome == "INTERNAL":
            record.outcome = DEFECT
        if self._pause:
            await asyncio.sleep(self._pause)


def _chain(model: str) -> tuple[str, ...]:
    """The models that a call for this one may be answered by, in order."""
    for name, _, fallbacks in MODELS:
        if name == model:
            return (model, *fallbacks)
    return (model,)


# --- the gateway's own parts, watched ---------------------------------------------------


class _Observer:
    """No event may show a key or who pays for it; each request to a provider is told once."""

    def __init__(self, world: World) -> None:
        self._world = world

    def attempt(self, event: AttemptEvent) -> None:
        seen, call = self._world.history.seen, self._world.here()
        shown = f"{event.upstream_code} {event.key_id} {event.reason} {event.model}"
        if SECRET in shown or ORGANIZATION in shown:
            seen.append(f"I16: a key shows in {event}")
        call.told += 1
        if event.number != call.told or call.told != len(call.requests):
            seen.append(f"I5: {call.name} made {len(call.requests)} requests, {event} is told")
        if event.committed != (bool(call.kinds) or call.writing):
            seen.append(f"I4: of {call.kinds!r} to {call.name}, {event} is told")

    def call(self, event: CallEvent) -> None:
        raise AssertionError("calls are told by the interceptors, which are not here")


class _Slots(Admission):
    """Tells where a call waits, and whom it refuses."""

    def __init__(self, world: World, place: str, slots: int, queue: int) -> None:
        super().__init__(slots, queue, world.now)
        self._world = world
        self._place = place

    @asynccontextmanager
    async def slot(self, deadline: float) -> AsyncIterator[None]:
        call = self._world.here()
        if self.in_flight >= self.slots or self.waiting:
            self._world.at(call, self._place)
        inside = False
        try:
            async with super().slot(deadline):
                inside = True
                if self._place == QUEUE:
                    call.slot_at = min(call.slot_at, self._world.now())
                yield
        except FullError:
            call.full += not inside
            raise


class _Pool(Pool):
    """Tells which call waits for a key, and which has none."""

    world: World

    async def lease(
        self,
        model: str,
        deadline: float,
        *,
        sticky: str = "",
        tokens: int = 0,
        avoid: frozenset[str] = frozenset(),
        wait: bool = True,
    ) -> Lease | Unavailable:
        call = self.world.here()
        call.place = WAITING
        if call.name in self.world.leavers and not cast(_Ring, self.ring).is_open(model, avoid):
            self.world.at(call, WAITING)
        found = await super().lease(
            model, deadline, sticky=sticky, tokens=tokens, avoid=avoid, wait=wait
        )
        if isinstance(found, Unavailable):
            call.refusals.append((self.world.now(), self.upstream.name))
        return found


class _Ring(KeyRing):
    """Tells every decision and what it changed."""

    def __init__(self, upstream: Upstream, world: World) -> None:
        self._world = world
        self._name = upstream.name
        self._tell = world.history.ring.append
        super().__init__(upstream, random=world.random.random)

    def replace(self, keys: Iterable[Key]) -> None:
        super().replace(keys)
        self._tell(Replaced(self._world.now(), self._name, self.keys))

    def is_open(self, model: str, avoid: frozenset[str]) -> bool:
        """Whether a key can be had at once: who wants to leave while waiting must wait first."""
        now = self._world.now()
        return any(
            self._closed(state, model, now, 0) is None
            for state in self._keys
            if state.key.quota_group not in avoid
        )

    def lease(
        self,
        model: str,
        now: float,
        *,
        sticky: str = "",
        tokens: int = 0,
        avoid: frozenset[str] = frozenset(),
    ) -> Lease | Unavailable:
        found = super().lease(model, now, sticky=sticky, tokens=tokens, avoid=avoid)
        if isinstance(found, Lease):
            self._tell(Leased(now, self._name, found, bool(sticky), avoid))
        elif found.fault is not None:
            self._tell(Denied(now, self._name, model, found, avoid))
        return found

    def succeed(self, lease: Lease) -> None:
        before = self._untils()
        super().succeed(lease)
        self._tell(Succeeded(self._world.now(), self._name, lease, self._changes(before)))

    def remaining(self, lease: Lease, requests: int | None, tokens: int | None, now: float) -> None:
        if requests is None and tokens is None:
            return
        before = self._untils()
        super().remaining(lease, requests, tokens, now)
        self._tell(Told(now, self._name, lease, self._changes(before)))

    def fail(self, lease: Lease, fault: UpstreamFault, now: float) -> None:
        before = self._untils()
        super().fail(lease, fault, now)
        self._tell(Failed(now, self._name, lease, fault, self._changes(before)))
        call = self._world.here()
        call.requests[-1].retries_left = self._world.gateway._budget.balance

    def release(self, lease: Lease) -> None:
        if lease.live:
            self._tell(Released(self._world.now(), self._name, lease))
        super().release(lease)

    def _untils(self) -> dict[Any, float]:
        return {scope: block.until for scope, block in self._blocks.items() if block.until}

    def _changes(self, before: dict[Any, float]) -> Changes:
        after = self._untils()
        if after == before:
            return []
        return [
            (scope, before.get(scope, 0.0), after.get(scope, 0.0))
            for scope in {**before, **after}
            if before.get(scope, 0.0) != after.get(scope, 0.0)
        ]
