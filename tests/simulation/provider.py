"""The providers of a world: accounts with limits that nobody is told, keys that die, outages.

A Provider stands where UpstreamClient stands in the gateway. What it does to a request follows
from its own truth, which lasts: a revoked key stays revoked, an account without credit stays so
until somebody pays. Only `misery` is chance.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from simulation.history import DELTAS, FIRST_BYTE, UNARY, CallRecord, Request

from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import TIMER, Fault, GatewayError, UpstreamFault
from tokenwire_service.keyring import Lease
from tokenwire_service.upstream import dialect as dialects
from tokenwire_service.upstream.client import Progress
from tokenwire_service.upstream.dialect import Encoded, Route

if TYPE_CHECKING:
    from simulation.world import World

Event = chat_service_pb2.StreamChatResponse

# What goes wrong by chance, with its weight.
MISERY: dict[Fault, float] = {
    Fault.RATE_LIMITED: 4,
    Fault.SERVER_ERROR: 8,
    Fault.UNREACHABLE: 4,
    Fault.OVERLOADED: 5,
    Fault.TIMEOUT: 2,
    Fault.PROTOCOL: 2,
    Fault.TRUNCATED: 4,
    Fault.STALE_CONNECTION: 3,
    Fault.OUTPUT_INVALID: 1,
    Fault.CREDIT_TOO_SMALL: 0.5,
}
# What is the caller's own mistake: the same at every try.
MISTAKES = (
    Fault.CONTEXT_TOO_LONG,
    Fault.CONTENT_FILTERED,
    Fault.REFUSED,
    Fault.TOO_LARGE,
    Fault.MODEL_NOT_FOUND,
)
_MISERIES, _WEIGHTS = list(MISERY), list(MISERY.values())
OUTAGES = (Fault.SERVER_ERROR, Fault.UNREACHABLE, Fault.OVERLOADED, Fault.RATE_LIMITED)
UNHEARD = (Fault.UNREACHABLE, Fault.STALE_CONNECTION, Fault.TIMEOUT, Fault.TRUNCATED)  # no status
DAYS = (None, 40.0, 5000.0)  # what they state beside a quota of a whole day
STATED = (0.0, 0.05, 1.0, 5.0, 30.0, 1e6)  # seconds: what providers ask for when they ask
UNSUITED = {
    "role": error_reason_pb2.ERROR_REASON_UNKNOWN_ROLE,
    "parameter": error_reason_pb2.ERROR_REASON_UNSUPPORTED_PARAMETER,
}


@dataclass(slots=True)
class Account:
    """What a provider grants to one account. `inf`: no limit."""

    at_once: float = math.inf
    requests: float = math.inf  # in any minute
    tokens: float = math.inf
    tells: bool = True  # how long to wait, with a 429
    tells_remaining: bool = False  # requests and tokens left, with each answer
    largest: float = math.inf  # tokens of one request: its tier
    running: int = 0
    spent: deque[tuple[float, int]] = field(default_factory=deque)
    broke_until: float = 0.0
    days: dict[str, float] = field(default_factory=dict)  # until when a model's day is used up
    dead: bool = False

    def refuses(self, now: float, tokens: int) -> float | None:
        """Seconds until the request would be granted, None if it is."""
        while self.spent and self.spent[0][0] <= now - 60.0:
            self.spent.popleft()
        if self.running >= self.at_once:
            return 1.0
        if self.requests < math.inf and len(self.spent) >= self.requests:
            return self.spent[0][0] + 60.0 - now
        if self.tokens < math.inf and self.spent:
            over = sum(cost for _, cost in self.spent) + tokens - self.tokens
            for at, cost in self.spent:
                if over <= 0:
                    break
                over -= cost
                if over <= 0:
                    return at + 60.0 - now
        return None


class Dialect(dialects.Dialect):
    """Requests need no encoding in this world; the call's name travels in their body."""

    def __init__(self, world: World) -> None:
        self._world = world

    def encode(self, chat: chat_service_pb2.ChatRequest, route: Route, *, stream: bool) -> Encoded:
        """May say, as a real dialect, that it cannot."""
        name = chat.end_user_id
        self._world.enters(name, route.model_name, stream)
        mistake = self._world.mistakes.get((name, route.upstream.name))
        if isinstance(mistake, str):
            raise GatewayError(UNSUITED[mistake], f"{name} does not suit {route.upstream.name}")
        return Encoded(self, "/chat", name.encode(), chat.params.max_completion_tokens)


class Provider:
    """One upstream of the world."""

    def __init__(self, world: World, upstream: Upstream) -> None:
        self.upstream = upstream
        self.keys = upstream.keys  # of now
        dialect = Dialect(world)
        self.dialect = lambda route: dialect
        self.accounts: dict[str, Account] = {}  # by name
        self.account_of: dict[str, str] = {}  # by key id
        self.revoked: set[str] = set()  # secrets
        self.denied: set[tuple[str, str]] = set()  # (secret, model)
        self.lacks: set[tuple[str, str]] = set()  # (key id, model): fine-tuned models, previews
        self.open_answers = 0
        self._world = world
        self._random: Random = world.random
        random = self._random
        self.misery = random.choice([0.0, 0.05, 0.3, 0.6])
        self.latency = random.choice([0.05, 0.5, 3.0])  # seconds until the first byte
        self.gap = random.choice([0.02, 0.25, 2.0])  # seconds between words
        self.stalls = random.choice([0.0, 0.0, 0.02])  # share of streams that fall silent
        self._outages = random.choice([math.inf, 2000.0, 300.0])  # seconds between them
        self._outage: tuple[float, float, Fault] = (0.0, 0.0, Fault.SERVER_ERROR)

    async def fetch(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> chat_service_pb2.ChatResponse:
        """As UpstreamClient.fetch."""
        async with self._request(encoded, lease, progress) as (call, request, fault):
            self._world.at(call, UNARY)
            await self._silence(request, self.latency)
            if fault is not None:
                request.fault = fault
                raise fault
            response = chat_service_pb2.ChatResponse()
            response.choices.add().message.content = request.text
            request.complete = True
            if self._random.random() < 0.7:
                request.usage = _usage(len(request.words))
                response.usage.CopyFrom(request.usage)
            return response

    @asynccontextmanager
    async def open(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> AsyncIterator[Answer]:
        """As UpstreamClient.open."""
        async with self._request(encoded, lease, progress) as (call, request, fault):
            yield Answer(self, self._world, call, request, fault)

    @asynccontextmanager
    async def _request(
        self, encoded: Encoded, lease: Lease, progress: Progress
    ) -> AsyncIterator[tuple[CallRecord, Request, UpstreamFault | None]]:
        """The request is sent; gives what is to go wrong after the answer has begun."""
        world, random = self._world, self._random
        call = world.running[encoded.body.decode()]
        account = self.accounts[self.account_of[lease.key.id]]
        request = world.sends(call, self.upstream.name, lease, progress.fresh)
        tokens = random.randint(1, 400)
        fault = self._verdict(call, lease, account, tokens, progress.fresh)
        late = (
            fault is not None
            and fault.fault in (Fault.TRUNCATED, Fault.TIMEOUT, Fault.OUTPUT_INVALID)
            and random.random() < 0.7
        )
        account.running += 1
        if account.requests < math.inf or account.tokens < math.inf:
            account.spent.append((world.now(), tokens))
        self.open_answers += 1
        try:
            world.at(call, FIRST_BYTE)
            await self._silence(request, self.latency)
            if fault is not None and not late:
                request.fault = fault
                if fault.fault not in UNHEARD:
                    progress.http_status = fault.http_status
                raise fault
            request.answered = True
            progress.http_status = 200
            progress.first_byte_at = world.now()
            if account.tells_remaining and account.requests < math.inf:
                progress.remaining_requests = max(0, int(account.requests) - len(account.spent))
            if account.tells_remaining and account.tokens < math.inf:
                spent = sum(cost for _, cost in account.spent)
                progress.remaining_tokens = max(0, int(account.tokens) - spent)
            count = 0 if random.random() < 0.01 else random.randint(1, 8)
            which = len(call.requests)
            request.words = [f"{call.name}.{which}.{i} " for i in range(count)]
            yield call, request, fault
        finally:
            request.closed_at = world.now()
            account.running -= 1
            self.open_answers -= 1

    async def _silence(self, request: Request, mean: float) -> None:
        seconds = self._world.moment(mean)
        limit = self.upstream.timeouts.first_byte
        if seconds > limit:
            await asyncio.sleep(limit)
            request.fault = _timeout("first_byte")
            raise request.fault
        await asyncio.sleep(seconds)

    # --- the truth ----------------------------------------------------------------------

    def _verdict(
        self, call: CallRecord, lease: Lease, account: Account, tokens: int, fresh: bool
    ) -> UpstreamFault | None:
        now, random = self._world.now(), self._random
        kind: Fault | None = None
        stated: float | None = None
        wait = None
        secret = lease.key.secret.reveal()
        mistake = self._world.mistakes.get((call.name, self.upstream.name))
        if (outage := self._outage_at(now)) is not None and outage is not Fault.RATE_LIMITED:
            kind = outage
        elif secret in self.revoked:
            kind = Fault.KEY_REJECTED
        elif account.dead:
            kind = Fault.ACCOUNT_DEAD
        elif (secret, lease.model) in self.denied:
            kind = Fault.ACCESS_DENIED
        elif (lease.key.id, lease.model) in self.lacks:
            kind = Fault.MODEL_NOT_FOUND
        elif now < account.broke_until:
            kind = Fault.QUOTA_EXHAUSTED
        elif call.tokens > account.largest:
            kind = Fault.OVER_TIER
        elif now < account.days.get(lease.model, 0.0):
            kind = Fault.DAILY_QUOTA
            stated = random.choice(DAYS)
        elif (wait := account.refuses(now, tokens)) is not None:
            kind = Fault.RATE_LIMITED
            stated = wait if account.tells else None
        elif isinstance(mistake, Fault):
            kind = mistake
        elif outage is not None:
            kind = outage
        elif self.misery and random.random() < self.misery:
            kind = random.choices(_MISERIES, _WEIGHTS)[0]
            if kind is Fault.STALE_CONNECTION and fresh:
                kind = Fault.UNREACHABLE
        if kind is None:
            return None
        if kind is Fault.TIMEOUT:
            return _timeout("first_byte")
        if wait is None and kind in (Fault.RATE_LIMITED, Fault.OVERLOADED):
            stated = random.choice(STATED) if random.random() < 0.5 else None
        # Real providers echo keys: the gateway must not pass them on.
        should = None if random.random() < 0.95 else random.random() < 0.5
        return UpstreamFault(
            kind,
            f"failed with {secret} of {lease.organization}",
            http_status=500,
            code="code",
            retry_after=stated,
            should_retry=should,
        )

    def _outage_at(self, now: float) -> Fault | None:
        """The outage in force; the next is drawn when one is over."""
        if self._outages == math.inf:
            return None
        began, ends, kind = self._outage
        if now >= ends:
            began = now + self._random.expovariate(1 / self._outages)
            ends = began + self._random.choice([2.0, 20.0, 100.0])
            kind = self._random.choice(OUTAGES)
            self._outage = (began, ends, kind)
        return kind if now >= began else None

    def misfortune(self) -> None:
        """Something that lasts happens to a key or an account; or is put right."""
        random = self._random
        keys = self.keys
        if not keys:
            return
        key: Key = random.choice(keys)
        account = self.accounts[self.account_of[key.id]]
        model = random.choice(self._world.names)
        match random.randrange(13):
            case 0:
                self.revoked.add(key.secret.reveal())
            case 1:
                self.denied.add((key.secret.reveal(), model))
            case 2:
                self.denied |= {(each.secret.reveal(), model) for each in keys}
            case 3 | 4:
                account.broke_until = self._world.now() + random.choice([30.0, 400.0, 2000.0])
            case 5:
                account.dead = random.random() < 0.5
            case 6:
                self.denied.clear()
                self.lacks.clear()
            case 7 | 8:
                for each in (model, *random.choices(self._world.names, k=2)):
                    account.days[each] = self._world.now() + random.choice([30.0, 2000.0, 9000.0])
            case 9 | 10:
                self.lacks.add((key.id, model))
            case 11:
                self.lacks |= {(each.id, model) for each in keys}
            case _:
                account.dead, account.broke_until = False, 0.0


def _timeout(timer: str) -> UpstreamFault:
    return UpstreamFault(Fault.TIMEOUT, f"too slow for {timer}", facts={TIMER: timer})


def _usage(words: int) -> chat_pb2.Usage:
    return chat_pb2.Usage(prompt_tokens=7, completion_tokens=words, total_tokens=7 + words)


class Answer:
    """One stream; stands where upstream.client.Answer stands."""

    def __init__(
        self,
        provider: Provider,
        world: World,
        call: CallRecord,
        request: Request,
        fault: UpstreamFault | None,
    ) -> None:
        random = world.random
        self._world = world
        self._call = call
        self._request = request
        self._fault = fault
        self._gap = provider.gap
        self._idle = provider.upstream.timeouts.idle
        words = len(request.words)
        self._cut = words if fault is None else random.randint(0, words)
        self._silent_from = words + 1  # the word after which nothing ever comes
        if provider.stalls and random.random() < provider.stalls:
            self._silent_from = random.randint(0, words)
        self._tells_usage = random.random() < 0.5
        self._at = 0
        self.pieces = 1
        # The first text has a time of its own.
        self._silent_at = world.now() + provider.upstream.timeouts.first_byte
        self._next = self._due()

    @property
    def usage(self) -> chat_pb2.Usage | None:
        """The last one told."""
        return self._request.usage

    async def read(self, wake_at: float) -> list[Event] | None:
        """As upstream.client.Answer.read."""
        world, call, request = self._world, self._call, self._request
        world.at(call, DELTAS if call.first_delta_at is not None else FIRST_BYTE)
        if call.writing:
            request.read_while_writing = True
        now = world.now()
        until = min(self._next, self._silent_at, wake_at)
        if until > now:
            await asyncio.sleep(until - now)
        if until < self._next:
            if until == wake_at:
                return []
            request.fault = _timeout("idle" if self._at else "first_byte")
            raise request.fault
        self._silent_at = world.now() + self._idle
        if self._at >= self._cut:
            if self._fault is not None and self._fault.fault is not Fault.TRUNCATED:
                request.fault = self._fault
                raise self._fault
            return None
        events = []
        if self._at == 0:
            header = chat_service_pb2.ResponseHeader(id=call.name)
            events.append(Event(header=header))
        together = 1 if world.random.random() < 0.8 else 2
        for word in request.words[self._at : min(self._at + together, self._cut)]:
            events.append(Event(delta=chat_service_pb2.Delta(content=word)))
            self._at += 1
        if self._tells_usage:
            request.usage = _usage(self._at)
        self._next = self._due()
        return events

    def finish(self) -> list[Event]:
        """As upstream.client.Answer.finish: no OK without proof."""
        request = self._request
        if self._fault is not None:
            request.fault = self._fault
            raise self._fault
        request.complete = True
        if self._world.random.random() < 0.6:
            request.usage = _usage(self._at)
        trailer = chat_service_pb2.StreamTrailer(usage=request.usage)
        events = [
            Event(finish=chat_service_pb2.Finish(finish_reason_raw="stop")),
            Event(trailer=trailer),
        ]
        if self._at == 0:
            events.insert(0, Event(header=chat_service_pb2.ResponseHeader(id=self._call.name)))
        return events

    def _due(self) -> float:
        if self._at >= self._silent_from:
            return math.inf
        return self._world.now() + self._world.moment(self._gap)
