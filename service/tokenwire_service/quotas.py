"""Limits that replicas share, counted in Redis: one atomic call for each admission.

A window of a minute is a log of buckets of 20 ms, each counted until all of it is a minute ago: in
no 60 seconds more than the limit is let through, and a unit comes back up to 20 ms late. What runs
is a set of leases that its replica renews: those of one that died run out. All times are Redis's.

What this replica has taken in the last minute, it remembers as well. A Redis that comes back is
told of what was taken while it was away, and one that has forgotten everything of all of it. It is
told so at each return, as sums, of which Redis adds what it does not have yet: so nothing is lost
if it fails again in that moment, and nothing counts twice.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from tokenwire_service.store import Script, Store, Value

BUCKET = 0.02  # seconds
_RENEWALS = 4  # of a lease before it runs out
_DAY = 86_400.0  # seconds
_SUFFIXES = ("requests", "requests:order", "tokens", "tokens:order", "running", "day")

# KEYS: those of `_SUFFIXES`, in their order. A window is a hash of units by bucket with their
# `total`, and a set of the buckets in order; a day is a hash of its number, of what was spent, and
# of how much of that each replica has told at its returns.
_COMMON = f"""
local BUCKET = {int(BUCKET * 1000)}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local today = math.floor(time[1] / 86400)

local function total(units, order, window)
  if redis.call('EXISTS', order) == 0 then redis.call('DEL', units) end -- one may be evicted alone
  local last = math.floor((now - window) / BUCKET) - 1
  local over = redis.call('ZRANGEBYSCORE', order, '-inf', last)
  for _, bucket in ipairs(over) do
    redis.call('HINCRBY', units, 'total', 0 - (redis.call('HGET', units, bucket) or 0))
    redis.call('HDEL', units, bucket)
  end
  if #over > 0 then redis.call('ZREMRANGEBYSCORE', order, '-inf', last) end
  return tonumber(redis.call('HGET', units, 'total') or 0)
end

local function add(units, order, window, bucket, count)
  redis.call('HINCRBY', units, bucket, count)
  redis.call('HINCRBY', units, 'total', count)
  redis.call('ZADD', order, bucket, bucket)
  redis.call('PEXPIRE', units, window + 60000)
  redis.call('PEXPIRE', order, window + 60000)
end

-- The bucket that has what was taken then, if any: what was restored may be in the one beside.
local function holds(units, bucket)
  for _, each in ipairs({{bucket, bucket - 1, bucket + 1}}) do
    if redis.call('HEXISTS', units, each) == 1 then return each end
  end
end

-- Milliseconds until `cost` units fit; 0 if they do.
local function opens_in(units, order, window, limit, cost)
  local surplus = total(units, order, window) + math.min(cost, limit) - limit
  if surplus <= 0 then return 0 end
  local from = 0
  while true do
    local buckets = redis.call('ZRANGE', order, from, from + 99)
    if #buckets == 0 then return window end
    for _, bucket in ipairs(buckets) do
      surplus = surplus - (redis.call('HGET', units, bucket) or 0)
      if surplus <= 0 then return (bucket + 1) * BUCKET + window - now + 1 end
    end
    from = from + 100
  end
end

local function spent_today(key)
  if tonumber(redis.call('HGET', key, 'day') or -1) < today then
    redis.call('DEL', key)
    redis.call('HSET', key, 'day', today, 'spent', 0)
    redis.call('EXPIRE', key, 172800)
  end
  return tonumber(redis.call('HGET', key, 'spent'))
end
"""

# ARGV: lease, its milliseconds, window in milliseconds, tokens, and the limits, 0 for none:
# requests, tokens, running, tokens a day. Answers {1, bucket, day}, or {0, which, milliseconds}.
_RESERVE = Script(
    _COMMON
    + """
local lease, lasts = ARGV[1], tonumber(ARGV[2])
local window, tokens = tonumber(ARGV[3]), tonumber(ARGV[4])
local requests_limit, tokens_limit = tonumber(ARGV[5]), tonumber(ARGV[6])
local running_limit, day_limit = tonumber(ARGV[7]), tonumber(ARGV[8])
if running_limit > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now)
  if redis.call('ZCARD', KEYS[5]) >= running_limit then return {0, 'in_flight', 0} end
end
if requests_limit > 0 then
  local wait = opens_in(KEYS[1], KEYS[2], window, requests_limit, 1)
  if wait > 0 then return {0, 'requests', wait} end
end
if tokens_limit > 0 then
  local wait = opens_in(KEYS[3], KEYS[4], window, tokens_limit, tokens)
  if wait > 0 then return {0, 'tokens', wait} end
end
if day_limit > 0 and spent_today(KEYS[6]) >= day_limit then
  return {0, 'day', (today + 1) * 86400000 - now}
end
local bucket = math.floor(now / BUCKET)
if running_limit > 0 then
  redis.call('ZADD', KEYS[5], now + lasts, lease)
  redis.call('PEXPIRE', KEYS[5], lasts)
end
if requests_limit > 0 then add(KEYS[1], KEYS[2], window, bucket, 1) end
if tokens_limit > 0 then add(KEYS[3], KEYS[4], window, bucket, tokens) end
if day_limit > 0 then redis.call('HINCRBY', KEYS[6], 'spent', tokens) end
return {1, bucket, today}
"""
)

# ARGV: lease, its bucket or 0, the age of that in milliseconds, its day, by how many tokens it cost
# more.
_FINISH = Script(
    _COMMON
    + """
local lease, bucket, day, more = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4]), tonumber(ARGV[5])
redis.call('ZREM', KEYS[5], lease)
if bucket == 0 then bucket = math.floor((now - ARGV[3]) / BUCKET) end
bucket = more ~= 0 and holds(KEYS[3], bucket)
if bucket then
  redis.call('HINCRBY', KEYS[3], bucket, more)
  redis.call('HINCRBY', KEYS[3], 'total', more)
end
if more ~= 0 and tonumber(redis.call('HGET', KEYS[6], 'day') or -1) == day then
  redis.call('HINCRBY', KEYS[6], 'spent', more)
end
return 1
"""
)

# ARGV: milliseconds, leases. Those that ran out while this replica was held up are there again.
_RENEW = Script(
    _COMMON
    + """
for i = 2, #ARGV do redis.call('ZADD', KEYS[5], now + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[5], ARGV[1])
return 1
"""
)

# KEYS[7]: what this replica has told of its buckets at its returns. ARGV: replica, milliseconds of
# a lease, window, day or 0, tokens of that day, how many leases, those; then of each bucket its
# number, age in milliseconds, requests, tokens. All are sums: what was added is not added again.
_RESTORE = Script(
    _COMMON
    + """
local replica, lasts, window = ARGV[1], ARGV[2], tonumber(ARGV[3])
local day, spent, leases = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
for _, lease in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do
  if string.sub(lease, 1, #replica) == replica then redis.call('ZREM', KEYS[5], lease) end
end
for i = 7, 6 + leases do redis.call('ZADD', KEYS[5], now + lasts, ARGV[i]) end
if leases > 0 then redis.call('PEXPIRE', KEYS[5], lasts) end
if day == today then
  spent_today(KEYS[6])
  redis.call('HINCRBY', KEYS[6], 'spent', spent - (redis.call('HGET', KEYS[6], replica) or 0))
  redis.call('HSET', KEYS[6], replica, spent)
end
local told, before = {}, redis.call('HGETALL', KEYS[7])
for i = 1, #before, 2 do told[before[i]] = before[i + 1] end
redis.call('DEL', KEYS[7]) -- what it speaks of no more is over
for i = 7 + leases, #ARGV, 4 do
  local bucket = math.floor((now - ARGV[i + 1]) / BUCKET)
  for k = 1, 2 do
    local name, count = ARGV[i] .. ' ' .. k, tonumber(ARGV[i + 1 + k])
    local more, units, order = count - (told[name] or 0), KEYS[2 * k - 1], KEYS[2 * k]
    local at = more > 0 and bucket or more < 0 and holds(units, bucket)
    if at then add(units, order, window, at, more) end
    redis.call('HSET', KEYS[7], name, count)
  end
end
redis.call('PEXPIRE', KEYS[7], window + 60000)
return 1
"""
)

SCRIPTS = (_RESERVE, _FINISH, _RENEW, _RESTORE)


@dataclass(frozen=True)
class Limits:
    """What one subject may take; None for no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    in_flight: int | None = None
    tokens_per_day: int | None = None

    def __bool__(self) -> bool:
        return bool(
            self.requests_per_minute
            or self.tokens_per_minute
            or self.in_flight
            or self.tokens_per_day
        )


@dataclass(frozen=True)
class Refusal:
    """Which limit is reached, `requests`, `tokens`, `in_flight` or `day`, and the seconds until
    it is not; 0 where nobody knows."""

    limit: str
    retry_after: float


@dataclass(eq=False, slots=True)
class _Taken:
    """What this replica took within one bucket, and how much of it Redis was not told of then, and
    so has to be at its returns."""

    number: int
    at: float  # monotonic seconds
    requests: int = 0
    tokens: int = 0
    untold: bool = False  # the next two may be 0 again
    untold_requests: int = 0
    untold_tokens: int = 0


@dataclass(eq=False, slots=True)
class _Subject:
    keys: tuple[str, ...]
    limits: Limits
    leases: dict[str, None] = field(default_factory=dict)  # that run, with a limit of those
    taken: deque[_Taken] = field(default_factory=deque)  # of the last minute, by age
    day: int = 0  # since 1970, by Redis or else by this machine
    today: int = 0  # tokens of that day that this replica took
    untold_today: int = 0  # of these, as those of `_Taken`


class Grant:
    """What one admission has taken of the shared limits, until it is closed."""

    def __init__(
        self, quotas: Quotas, subject: _Subject, lease: str, bucket: int, day: int, tokens: int
    ) -> None:
        self._quotas = quotas
        self._subject = subject
        self._lease = lease
        self._bucket = bucket
        self._day = day
        self._tokens = self._real = tokens
        self._taken = quotas._took(subject, tokens, day, told=bucket > 0)
        if subject.limits.in_flight:
            subject.leases[lease] = None

    def settle(self, tokens: int) -> None:
        """What it has really cost; told when it is closed."""
        self._real = tokens

    def close(self) -> None:
        """It is over. Nobody has to wait for that."""
        subject, more = self._subject, self._real - self._tokens
        running = self._lease in subject.leases
        subject.leases.pop(self._lease, None)
        counted = subject.limits.tokens_per_minute or subject.limits.tokens_per_day
        if not counted:
            more = 0
        if not running and not more:
            return
        self._tokens = self._real
        self._quotas._corrected(subject, self._taken, self._day, more)
        age = self._quotas._age(self._taken)
        self._quotas._finish(subject, self._lease, self._bucket, age, self._day, more)


class Quotas:
    """The shared limits as one replica sees them.

    `minute`: seconds that a window lasts. `lease`: seconds, in place of the setting. `now`:
    monotonic seconds; `clock`: seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        *,
        minute: float = 60.0,
        lease: float | None = None,
        now: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.closed = store.settings.on_failure == "closed"
        self._store = store
        self._minute = minute
        self._lease = store.settings.lease if lease is None else lease
        self._now = now
        self._clock = clock
        self._sleep = sleep
        self._replica = uuid.uuid4().hex[:16]
        self._numbers = itertools.count()
        self._subjects: dict[str, _Subject] = {}
        store.on_return(self._restore)

    async def reserve(self, subject: str, limits: Limits, tokens: int) -> Grant | Refusal:
        """Takes one request and so many `tokens`, an estimate, in one step, if all limits allow it.

        Raises AwayError. Whoever is cancelled here keeps what was taken, but does not run.
        """
        found = self._found(subject, limits)
        lease = self._name()
        arguments: tuple[Value, ...] = (
            lease,
            int(self._lease * 1000),
            int(self._minute * 1000),
            tokens,
            limits.requests_per_minute or 0,
            limits.tokens_per_minute or 0,
            limits.in_flight or 0,
            limits.tokens_per_day or 0,
        )
        try:
            granted, first, second = await self._store.call(_RESERVE, found.keys, arguments)
        except asyncio.CancelledError:
            self._finish(found, lease, 0, 0, 0, 0)
            raise
        if not granted:
            return Refusal(first, second / 1000)
        # Looked up again: who has nothing may have been forgotten meanwhile.
        return Grant(self, self._found(subject, limits), lease, first, second, tokens)

    def take(self, subject: str, limits: Limits, tokens: int) -> Grant:
        """Takes without asking, while Redis is away: it is told when it is back."""
        day = int(self._clock() // _DAY)
        return Grant(self, self._found(subject, limits), self._name(), 0, day, tokens)

    async def run(self) -> None:
        """Renews what runs, and forgets who has gone, until cancelled."""
        while True:
            await self._sleep(self._lease / _RENEWALS)
            today = int(self._clock() // _DAY)
            for name, subject in list(self._subjects.items()):
                self._trim(subject)
                if subject.leases:
                    lasts = int(self._lease * 1000)
                    self._store.post(_RENEW, subject.keys, (lasts, *subject.leases))
                    continue
                spent = subject.today or subject.untold_today
                if not subject.taken and (not spent or subject.day < today):
                    del self._subjects[name]

    # --- inside -------------------------------------------------------------------------

    def _found(self, name: str, limits: Limits) -> _Subject:
        found = self._subjects.get(name)
        if found is None:
            keys = tuple(self._store.key(f"{name}:{suffix}") for suffix in _SUFFIXES)
            found = self._subjects[name] = _Subject(keys, limits)
        found.limits = limits
        return found

    def _name(self) -> str:
        return f"{self._replica}:{next(self._numbers)}"

    def _took(self, subject: _Subject, tokens: int, day: int, *, told: bool) -> _Taken:
        """Remembers one request."""
        now = self._now()
        self._trim(subject)
        if not subject.taken or subject.taken[-1].at + BUCKET <= now:
            subject.taken.append(_Taken(next(self._numbers), now))
        taken = subject.taken[-1]
        taken.requests += 1
        taken.tokens += tokens
        if not told:
            taken.untold = True
            taken.untold_requests += 1
            taken.untold_tokens += tokens
        if day > subject.day:
            subject.day, subject.today, subject.untold_today = day, 0, 0
        if day == subject.day and subject.limits.tokens_per_day:
            subject.today += tokens
            subject.untold_today += 0 if told else tokens
        return taken

    def _trim(self, subject: _Subject) -> None:
        """Forgets what is over a minute ago."""
        over = self._now() - self._minute - 2 * BUCKET
        while subject.taken and subject.taken[0].at <= over:
            subject.taken.popleft()

    def _corrected(self, subject: _Subject, taken: _Taken, day: int, more: int) -> None:
        told = self._store.here
        taken.tokens += more
        if not told:
            taken.untold = True
            taken.untold_tokens += more
        if day == subject.day and subject.limits.tokens_per_day:
            subject.today += more
            subject.untold_today += 0 if told else more

    def _age(self, taken: _Taken) -> int:
        return int((self._now() - taken.at) * 1000)

    def _finish(
        self, subject: _Subject, lease: str, bucket: int, age: int, day: int, more: int
    ) -> None:
        self._store.post(_FINISH, subject.keys, (lease, bucket, age, day, more))

    def _restore(self, lost: bool) -> Iterator[tuple[Script, tuple[str, ...], tuple[Value, ...]]]:
        """What Redis should know of this replica's, and was not told when it was taken. It is kept
        after that: who knows whether Redis hears this?"""
        for name, subject in self._subjects.items():
            self._trim(subject)
            limits = subject.limits
            buckets: list[Value] = []
            for taken in subject.taken:
                if lost:
                    taken.untold = True
                    taken.untold_requests, taken.untold_tokens = taken.requests, taken.tokens
                if taken.untold:
                    requests = taken.untold_requests if limits.requests_per_minute else 0
                    tokens = taken.untold_tokens if limits.tokens_per_minute else 0
                    buckets += (taken.number, self._age(taken), requests, tokens)
            if lost:
                subject.untold_today = subject.today
            arguments: tuple[Value, ...] = (
                f"{self._replica}:",
                int(self._lease * 1000),
                int(self._minute * 1000),
                subject.day if limits.tokens_per_day else 0,
                subject.untold_today,
                len(subject.leases),
                *subject.leases,
                *buckets,
            )
            told = self._store.key(f"{name}:told:{self._replica}")
            yield _RESTORE, (*subject.keys, told), arguments
