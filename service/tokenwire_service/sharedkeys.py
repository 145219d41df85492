"""Closed keys, told to other replicas through Redis and taken in from them.

A key ring decides by itself, at once; what it decides about a key or its quota group is told after
the fact, and looked for four times a second. What is told carries a version: each is taken in once.
The longest closure of a key wins, whatever the order. What closes a whole upstream stays each
replica's own: it may be the way there that fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenwire_service.errors import Fault
from tokenwire_service.keyring import Closed, KeyRing
from tokenwire_service.keyset import shared_name
from tokenwire_service.settings import Key
from tokenwire_service.snapshot import Scope
from tokenwire_service.store import AwayError, Script, Store, Value

INTERVAL = 0.25  # seconds between two looks
# Seconds. What another replica found of a key for good is believed for so long, then tried: whoever
# has the key reinstated at its provider need not look for it in Redis.
BELIEVED = 3600.0
_TOLERANCE = 0.1  # share by which a closure has to grow to be told again
_SUFFIXES = ("closures", "closures:version", "closures:versions", "closures:until")

# KEYS: those of `_SUFFIXES`: text of each closure by its name, the newest version, names by
# version, names by when they end.
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# ARGV: name, milliseconds, fault, strikes.
_TELL = Script(
    _NOW
    + """
local name, ends = ARGV[1], now + ARGV[2]
for _, over in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('HDEL', KEYS[1], over)
  redis.call('ZREM', KEYS[3], over)
  redis.call('ZREM', KEYS[4], over)
end
if tonumber(redis.call('ZSCORE', KEYS[4], name) or 0) >= ends then return 0 end
redis.call('HSET', KEYS[1], name, ARGV[3] .. ' ' .. ARGV[4])
redis.call('ZADD', KEYS[3], redis.call('INCR', KEYS[2]), name)
redis.call('ZADD', KEYS[4], ends, name)
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, 86400) end
return 1
"""
)

# ARGV: the newest version that is known already. Answers the newest, then of each closure its name,
# milliseconds, and text.
_NEWS = Script(
    _NOW
    + """
local newest, known = tonumber(redis.call('GET', KEYS[2]) or 0), tonumber(ARGV[1])
if newest < known then known = 0 end
local found = {newest}
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. known, '+inf')) do
  local left = tonumber(redis.call('ZSCORE', KEYS[4], name) or 0) - now
  local text = redis.call('HGET', KEYS[1], name)
  if left > 0 and text then
    found[#found + 1] = name
    found[#found + 1] = left
    found[#found + 1] = text
  end
end
return found
"""
)

SCRIPTS = (_TELL, _NEWS)
_SCOPES = {scope.value: scope for scope in Scope}
_FAULTS = {fault.value: fault for fault in Fault}


@dataclass(eq=False)
class _Ring:
    """One upstream's. `changed`: called when it has heard something."""

    ring: KeyRing
    changed: Callable[[], None]
    generation: int = -1  # of `keys`
    keys: dict[str, Key] = field(default_factory=dict)  # by what replicas call them


class SharedKeys:
    """What this replica tells of its keys, and hears. `now`: monotonic seconds, as the rings'."""

    def __init__(
        self,
        store: Store,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._now = now
        self._sleep = sleep
        self._keys = tuple(store.key(suffix) for suffix in _SUFFIXES)
        self._rings: dict[str, _Ring] = {}
        self._told: dict[str, float] = {}  # until when each was told to be closed
        self._version = 0
        self._new: set[str] = set()  # names of keys that came since the last look
        store.on_return(self._restore)

    def join(self, upstream: str, ring: KeyRing, changed: Callable[[], None]) -> None:
        """Shares the keys of one upstream. `changed`: told when what was heard closes some."""
        self._rings[upstream] = _Ring(ring, changed)
        ring.tell = lambda closed: self._tell(upstream, closed)

    def leave(self, upstream: str) -> None:
        """Shares them no more."""
        left = self._rings.pop(upstream, None)
        if left is not None:
            left.ring.tell = None

    async def run(self) -> None:
        """Takes in what others tell, until cancelled."""
        while True:
            with contextlib.suppress(AwayError):  # when it is back, nothing is missed
                known, found = self._version, await self._news(self._version)
                self._version = found[0]
                self._look()
                for closure in _closures(found):
                    self._hear(*closure)
                if known and self._new:  # what was told while nobody here had these keys
                    for closure in _closures(await self._news(0)):
                        if _parts(closure[0])[0] in self._new:
                            self._hear(*closure)
                self._new.clear()
            await self._sleep(INTERVAL)

    # --- inside -------------------------------------------------------------------------

    async def _news(self, version: int) -> Sequence[Any]:
        """What is closed of what was told since, as _NEWS answers. Raises AwayError."""
        found: Sequence[Any] = await self._store.call(_NEWS, self._keys, (version,))
        return found

    def _look(self) -> None:
        """Which keys there are now."""
        for upstream, each in self._rings.items():
            if each.generation != each.ring.generation:
                each.generation = each.ring.generation
                before, each.keys = each.keys, {shared_name(upstream, k): k for k in each.ring.keys}
                self._new |= each.keys.keys() - before.keys()

    def _tell(self, upstream: str, closed: Closed) -> None:
        now = self._now()
        name = _name(upstream, closed)
        until = min(closed.until, now + BELIEVED)
        told = self._told.get(name, 0.0)
        if until - now <= (told - now) * (1 + _TOLERANCE):
            return
        if len(self._told) > 10_000:
            self._told = {each: end for each, end in self._told.items() if end > now}
        if self._store.here:  # else what is closed then is told when it is back
            self._told[name] = until
            self._store.post(_TELL, self._keys, _arguments(name, closed, until - now))

    def _hear(self, name: str, seconds: float, text: str) -> None:
        digest, scope, _, model = _parts(name)
        fault, _, strikes = text.partition(" ")
        if scope not in _SCOPES or fault not in _FAULTS:
            return  # of a gateway of another version
        for each in self._rings.values():
            key = each.keys.get(digest)
            if key is None:
                continue
            until = self._now() + seconds
            self._told[name] = max(until, self._told.get(name, 0.0))
            closed = Closed(
                _SCOPES[scope],
                key,
                model if "model" in scope else None,
                _FAULTS[fault],
                until,
                int(strikes or 0),
            )
            if each.ring.hear(closed):
                each.changed()

    def _restore(self, lost: bool) -> Iterator[tuple[Script, tuple[str, ...], tuple[Value, ...]]]:
        """Tells again what is closed here: what came about meanwhile, or all of it."""
        if lost:
            self._version = 0
        now = self._now()
        self._told.clear()
        for upstream, each in self._rings.items():
            for closed in each.ring.closed(now):
                name = _name(upstream, closed)
                until = min(closed.until, now + BELIEVED)
                self._told[name] = until
                yield _TELL, self._keys, _arguments(name, closed, until - now)


def _closures(found: Sequence[Any]) -> Iterator[tuple[str, float, str]]:
    """Of an answer of _NEWS: name, seconds, text of each."""
    for at in range(1, len(found), 3):
        yield str(found[at]), found[at + 1] / 1000, str(found[at + 2])


def _name(upstream: str, closed: Closed) -> str:
    return f"{shared_name(upstream, closed.key)} {closed.scope.value} {closed.model or ''}"


def _parts(name: str) -> tuple[str, str, str, str]:
    """(digest, scope, " ", model)."""
    digest, _, rest = name.partition(" ")
    scope, blank, model = rest.partition(" ")
    return digest, scope, blank, model


def _arguments(name: str, closed: Closed, seconds: float) -> tuple[Value, ...]:
    return (name, math.ceil(seconds * 1000), closed.fault.value, closed.strikes)
