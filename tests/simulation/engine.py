"""A Redis in virtual time: it runs the real scripts, and fails whenever and however a world wants.

Lua is Lua; the commands that scripts use are played by a small model, which tests/shared compares
with a real server, call by call. A `Line` stands where the connection of a `Store` stands: what was
sent over it is run later, or never, and whoever waits for the answer may wait in vain.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from lupa import lua51

EPOCH = 1_790_000_000.0  # seconds since 1970 when virtual time is 0
_Answer = Any


class Engine:
    """What it holds, and how the way there is. `now`: seconds."""

    def __init__(self, now: Callable[[], float], chance: random.Random) -> None:
        self._now = now
        self.chance = chance
        self.up = True
        self.lives = 0  # how often it was started again: a connection is to one of these
        self.frozen_until = 0.0
        self.latency = 0.001  # seconds, one way, on average
        self._lua = lua51.LuaRuntime(unpack_returned_tuples=True)
        self._scripts: dict[str, Any] = {}
        self._data: dict[str, Any] = {}
        self._ends: dict[str, float] = {}  # of those that expire
        self._table = self._lua.eval("function(...) return {...} end")
        self._compile = self._lua.eval(
            "function(text) return assert(loadstring('return function(KEYS, ARGV) ' .. text "
            ".. '\\nend'))() end"
        )
        called = self._lua.eval("function(call) redis = {call = call} end")
        called(self._call)

    def forget(self) -> None:
        """All that it holds."""
        self._data.clear()
        self._ends.clear()

    def load(self, text: str) -> str:
        """As SCRIPT LOAD."""
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        if sha not in self._scripts:
            self._scripts[sha] = self._compile(text)
        return sha

    def run(self, sha: str, keys: Sequence[str], arguments: Sequence[str]) -> _Answer:
        """As EVALSHA."""
        table = self._lua.table_from
        return _answer(self._scripts[sha](table(keys), table(arguments)))

    def members(self, suffix: str) -> list[str]:
        """Of the sorted sets whose names end so, those whose score is still to come."""
        now = 1000 * self.time()
        for name in list(self._ends):
            self._found(name)
        return [
            member
            for name, held in self._data.items()
            if name.endswith(suffix)
            for member, score in held.items()
            if score > now
        ]

    def time(self) -> float:
        """Of its own clock, seconds since 1970."""
        return EPOCH + self._now()

    # --- commands -------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> Any:
        words = [_text(each) for each in arguments]
        found = getattr(self, f"_{name.lower()}")(*words)
        return self._table(*found) if isinstance(found, list) else found

    def _found(self, key: str, made: type[dict[str, Any]] | None = None) -> Any:
        if self._ends.get(key, math.inf) <= self.time():
            self._del(key)
        if made is not None and key not in self._data:
            self._data[key] = made()
        return self._data.get(key, {})

    def _left(self, key: str) -> None:
        """A hash or set without members is none."""
        if not self._data.get(key, True):
            self._del(key)

    def _time(self) -> list[str]:
        micros = round(self.time() * 1e6)
        return [str(micros // 1_000_000), str(micros % 1_000_000)]

    def _exists(self, key: str) -> int:
        self._found(key)
        return int(key in self._data)

    def _del(self, *keys: str) -> int:
        for key in keys:
            self._ends.pop(key, None)
        return sum(self._data.pop(key, None) is not None for key in keys)

    def _pexpire(self, key: str, milliseconds: str) -> int:
        if not self._exists(key):
            return 0
        self._ends[key] = self.time() + float(milliseconds) / 1000
        return 1

    def _expire(self, key: str, seconds: str) -> int:
        return self._pexpire(key, str(1000 * int(seconds)))

    def _get(self, key: str) -> Any:
        return self._found(key) or False

    def _set(self, key: str, value: str, only_new: str = "") -> Any:
        if only_new and self._exists(key):
            return False
        self._data[key] = value
        self._ends.pop(key, None)
        return True

    def _incr(self, key: str) -> int:
        value = int(self._found(key) or 0) + 1
        self._data[key] = str(value)
        return value

    def _hget(self, key: str, name: str) -> Any:
        return self._found(key).get(name, False)

    def _hgetall(self, key: str) -> list[str]:
        return [each for pair in self._found(key).items() for each in pair]

    def _hexists(self, key: str, name: str) -> int:
        return int(name in self._found(key))

    def _hset(self, key: str, *pairs: str) -> int:
        held, before = self._found(key, dict), len(self._found(key))
        held.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(held) - before

    def _hdel(self, key: str, *names: str) -> int:
        gone = sum(self._found(key).pop(name, None) is not None for name in names)
        self._left(key)
        return gone

    def _hincrby(self, key: str, name: str, more: str) -> int:
        held = self._found(key, dict)
        value = int(held.get(name, 0)) + int(more)
        held[name] = str(value)
        return value

    def _zadd(self, key: str, score: str, member: str) -> int:
        held = self._found(key, dict)
        new = member not in held
        held[member] = float(score)
        return int(new)

    def _zrem(self, key: str, *members: str) -> int:
        return self._hdel(key, *members)

    def _zcard(self, key: str) -> int:
        return len(self._found(key))

    def _zscore(self, key: str, member: str) -> Any:
        score = self._found(key).get(member)
        return False if score is None else _text(score)

    def _zrange(self, key: str, first: str, last: str) -> list[str]:
        members = [member for member, _ in self._ranked(key)]
        return members[int(first) : None if last == "-1" else int(last) + 1]

    def _zrangebyscore(self, key: str, least: str, most: str, *limit: str) -> list[str]:
        found = [m for m, score in self._ranked(key) if _within(score, least, most)]
        if limit:
            _, skipped, count = limit
            found = found[int(skipped) : int(skipped) + int(count)]
        return found

    def _zremrangebyscore(self, key: str, least: str, most: str) -> int:
        return self._zrem(key, *self._zrangebyscore(key, least, most))

    def _ranked(self, key: str) -> list[tuple[str, float]]:
        return sorted(self._found(key).items(), key=lambda each: (each[1], each[0]))


def _text(value: Any) -> str:
    """As Redis turns what Lua hands it into bytes."""
    return format(value, ".17g") if isinstance(value, int | float) else str(value)


def _within(score: float, least: str, most: str) -> bool:
    bound = float(least.removeprefix("("))
    above = score > bound if least.startswith("(") else score >= bound
    return above and score <= float(most)


def _answer(value: Any) -> _Answer:
    """As Redis turns what Lua answers into an answer."""
    if isinstance(value, float | int) and not isinstance(value, bool):
        return int(value)
    if lua51.lua_type(value) == "table":
        counted = (value[i] for i in itertools.count(1))
        return [_answer(each) for each in itertools.takewhile(lambda e: e is not None, counted)]
    return value or None


class Line:
    """One connection to it, in place of a client of redis-py. `cut` breaks the line at any time."""

    def __init__(self, engine: Engine, is_open: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_open = is_open
        self._life: int | None = None
        self._arrival = 0.0
        self._waiting: set[asyncio.Future[list[_Answer]]] = set()
        self._closed = False

    def pipeline(self, transaction: bool) -> Batch:
        """As a client's."""
        assert not transaction
        return Batch(self)

    async def evalsha(self, sha: str, count: int, *words: str) -> _Answer:
        """As a client's."""
        batch = Batch(self)
        batch.evalsha(sha, count, *words)
        (answer,) = await batch.execute()
        return answer

    async def aclose(self) -> None:
        """As a client's: what is under way yet is run, if it arrives."""
        self._closed = True

    def cut(self) -> None:
        """Whoever waits is told; what has not arrived does not."""
        self._life = -1
        for each in self._waiting:
            if not each.done():
                each.set_exception(ConnectionError("the line is cut"))

    async def exchange(self, commands: list[tuple[str, ...]]) -> list[_Answer]:
        """There, in the order in which it was sent, and back."""
        engine, loop = self._engine, asyncio.get_running_loop()
        if not engine.up or not self._is_open():
            raise ConnectionError("nobody is there")
        if self._life is None:
            self._life = engine.lives
        self._arrival = max(self._arrival, loop.time() + self._delay())
        answers: asyncio.Future[list[_Answer]] = loop.create_future()
        self._waiting.add(answers)
        loop.call_at(self._arrival, self._arrive, commands, answers)
        try:
            return await answers
        finally:
            self._waiting.discard(answers)

    def _arrive(
        self, commands: list[tuple[str, ...]], answers: asyncio.Future[list[_Answer]]
    ) -> None:
        engine, loop = self._engine, asyncio.get_running_loop()
        if not self._stands():
            self._answer(answers, None)
            return
        if engine.frozen_until > loop.time():
            loop.call_at(engine.frozen_until, self._arrive, commands, answers)
            return
        found = [self._run(each) for each in commands]
        loop.call_later(self._delay(), self._answer, answers, found)

    def _answer(self, answers: asyncio.Future[list[_Answer]], found: list[_Answer] | None) -> None:
        if answers.done():
            return
        if found is None or not self._stands():
            answers.set_exception(ConnectionError("nobody is there any more"))
        else:
            answers.set_result(found)

    def _stands(self) -> bool:
        return self._engine.up and self._life == self._engine.lives

    def _run(self, command: tuple[str, ...]) -> _Answer:
        if command[0] == "load":
            return self._engine.load(command[1])
        _, sha, count, *words = command
        keys = int(count)
        return self._engine.run(sha, words[:keys], words[keys:])

    def _delay(self) -> float:
        return self._engine.chance.expovariate(1 / self._engine.latency)


class Batch:
    """What is sent together, in place of a pipeline of redis-py."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._commands: list[tuple[str, ...]] = []

    def script_load(self, text: str) -> None:
        """As a pipeline's."""
        self._commands.append(("load", text))

    def evalsha(self, sha: str, count: int, *words: str) -> None:
        """As a pipeline's."""
        self._commands.append(("run", sha, str(count), *words))

    async def execute(self, raise_on_error: bool = True) -> list[_Answer]:
        """As a pipeline's."""
        return await self._line.exchange(self._commands)
