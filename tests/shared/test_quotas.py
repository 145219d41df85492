"""Limits that replicas share, against a real Redis: exact, atomic, healed. Minutes are shorter."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness import until
from redis_server import RedisServer, both, redis_server
from tokenwire_service.config import Redis
from tokenwire_service.quotas import _RESTORE, SCRIPTS, Grant, Limits, Quotas, Refusal
from tokenwire_service.store import AwayError, Script, Store

LOGGER = logging.getLogger("tokenwire.test")


class Cutting:
    """A way to Redis that breaks in the moment in which a script is called, once for each of the
    `moments` that are left: `before` Redis hears of it, or `after` it was run."""

    def __init__(self, redis: RedisServer, script: Script) -> None:
        self._redis = redis
        self._sha = script.sha.encode()
        self._served: set[asyncio.Task[None]] = set()
        self.moments: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Cutting]:
        server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._served:
                task.cancel()
            await asyncio.gather(*self._served, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._served.add(asyncio.ensure_future(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """What comes is passed on, and then what is answered."""
        answers, asks = await asyncio.open_connection("127.0.0.1", self._redis.port)
        passing = asyncio.ensure_future(self._answer(answers, writer))
        try:
            while asked := await reader.read(1 << 20):
                if self._sha in asked and b"EVALSHA" in asked and self.moments:
                    moment = self.moments.pop(0)
                    passing.cancel()
                    await asyncio.gather(passing, return_exceptions=True)
                    if moment == "after":
                        asks.write(asked)
                        await answers.read(1)
                    return
                asks.write(asked)
        finally:
            passing.cancel()
            asks.close()
            writer.close()

    async def _answer(self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answered := await answers.read(1 << 20):
            writer.write(answered)
        writer.close()


class Replica:
    """One replica's view of the limits of one subject."""

    def __init__(
        self,
        redis: RedisServer | Cutting,
        minute: float,
        lease: float,
        timeout: float,
        pause: Callable[[float], Awaitable[None]],
    ) -> None:
        settings = Redis(url=redis.url, on_failure="open", timeout=timeout)
        self.store = Store(settings, SCRIPTS, LOGGER, sleep=pause)
        self.quotas = Quotas(self.store, minute=minute, lease=lease)
        self.granted: list[float] = []  # when each was, monotonic seconds

    async def reserve(self, limits: Limits, tokens: int = 0) -> Grant | Refusal:
        found = await self.quotas.reserve("caller:a", limits, tokens)
        if isinstance(found, Grant):
            self.granted.append(time.monotonic())
        return found

    def take(self, limits: Limits, tokens: int = 0) -> Grant:
        return self.quotas.take("caller:a", limits, tokens)


@asynccontextmanager
async def replicas(
    redis: RedisServer | Cutting,
    count: int = 3,
    *,
    minute: float = 60.0,
    lease: float = 10.0,
    timeout: float = 5.0,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[list[Replica]]:
    """Some that have reached Redis. `pause`: how they wait until they try to reach it again."""
    made = [Replica(redis, minute, lease, timeout, pause) for _ in range(count)]
    tasks = [
        asyncio.ensure_future(each)
        for replica in made
        for each in (replica.store.run(), replica.quotas.run())
    ]
    try:
        for replica in made:
            await replica.store.tried()
            assert replica.store.here
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def granted(found: list[Grant | Refusal]) -> list[Grant]:
    return [each for each in found if isinstance(each, Grant)]


@both
async def test_requests_a_minute_are_exact_over_replicas_that_ask_at_once(
    redis: RedisServer,
) -> None:
    limits = Limits(requests_per_minute=100)
    async with replicas(redis) as three:
        found = await asyncio.gather(*(r.reserve(limits) for _ in range(100) for r in three))
        assert len(granted(found)) == 100
        refusals = [each for each in found if isinstance(each, Refusal)]
        assert {each.limit for each in refusals} == {"requests"}
        assert all(59 < each.retry_after <= 60.05 for each in refusals)


async def test_no_window_lets_more_through_and_little_is_held_back(redis: RedisServer) -> None:
    """Two seconds of three replicas that never stop asking, in windows of half a second."""
    limits, minute = Limits(requests_per_minute=50), 0.5
    async with replicas(redis, minute=minute) as three:
        ends = time.monotonic() + 2.2

        async def flood(replica: Replica) -> None:
            while time.monotonic() < ends:
                found = await replica.reserve(limits)
                if isinstance(found, Refusal):
                    await asyncio.sleep(min(found.retry_after, 0.01))

        await asyncio.gather(*(flood(each) for each in three))
        times = sorted(at for each in three for at in each.granted)
    # As this process saw them, a moment after Redis: the window here is that much shorter.
    for first, last in zip(times, times[50:], strict=False):
        assert last - first > minute - 0.1
    assert len(times) >= 4 * 50


@both
async def test_tokens_are_corrected_by_what_they_really_were(redis: RedisServer) -> None:
    limits = Limits(tokens_per_minute=100)
    async with replicas(redis, 2) as (one, other):
        (first,) = granted([await one.reserve(limits, 90)])
        assert await other.reserve(limits, 90) == Refusal("tokens", pytest.approx(60, abs=1))
        first.settle(10)
        first.close()
        await one.store.drain()
        assert granted([await other.reserve(limits, 90)])
        assert isinstance(await one.reserve(limits, 1), Refusal)


async def test_a_request_above_the_whole_limit_fits_into_an_empty_window(
    redis: RedisServer,
) -> None:
    limits = Limits(tokens_per_minute=100)
    async with replicas(redis, 2) as (one, other):
        assert granted([await one.reserve(limits, 1000)])
        assert isinstance(await other.reserve(limits, 1), Refusal)


@both
async def test_a_budget_of_a_day_ends_at_midnight_utc(redis: RedisServer) -> None:
    limits = Limits(tokens_per_day=100)
    async with replicas(redis, 2) as (one, other):
        (first,) = granted([await one.reserve(limits, 60)])
        (second,) = granted([await other.reserve(limits, 60)])  # the one that reaches it
        found = await one.reserve(limits, 1)
        assert isinstance(found, Refusal)
        assert found.limit == "day"
        assert found.retry_after == pytest.approx(86_400 - time.time() % 86_400, abs=5)
        for grant in (first, second):
            grant.settle(10)
            grant.close()
        await one.store.drain()
        await other.store.drain()
        assert granted([await one.reserve(limits, 1)])


@both
async def test_what_runs_is_counted_until_it_ends_whoever_ran_it(redis: RedisServer) -> None:
    limits = Limits(in_flight=2)
    async with replicas(redis) as (one, two, three):
        (first,) = granted([await one.reserve(limits)])
        assert granted([await two.reserve(limits)])
        assert await three.reserve(limits) == Refusal("in_flight", 0)
        first.close()
        first.close()  # again does no harm
        await one.store.drain()
        assert granted([await three.reserve(limits)])
        assert isinstance(await one.reserve(limits), Refusal)


async def test_what_is_refused_takes_nothing(redis: RedisServer) -> None:
    limits = Limits(requests_per_minute=10, tokens_per_minute=100, in_flight=1, tokens_per_day=200)
    async with replicas(redis, 1) as (one,):
        (first,) = granted([await one.reserve(limits, 5)])
        for _ in range(50):
            assert isinstance(await one.reserve(limits, 5), Refusal)
        first.close()
        assert granted([await one.reserve(limits, 95)])


async def test_a_replica_that_stops_renewing_gives_its_slots_back_and_others_keep_theirs(
    redis: RedisServer,
) -> None:
    limits = Limits(in_flight=2)
    async with replicas(redis, 1, lease=0.4) as (alive,), contextlib.AsyncExitStack() as stack:
        (dying,) = await stack.enter_async_context(replicas(redis, 1, lease=0.4))
        assert granted([await alive.reserve(limits)])
        assert granted([await dying.reserve(limits)])
        await asyncio.sleep(0.8)
        assert isinstance(await alive.reserve(limits), Refusal)  # both are renewed
        await stack.aclose()
        await asyncio.sleep(0.6)
        assert granted([await alive.reserve(limits)])
        assert isinstance(await alive.reserve(limits), Refusal)  # its own was kept


async def test_what_was_asked_for_while_redis_was_slow_is_renewed_as_everything_is(
    redis: RedisServer,
) -> None:
    limits = Limits(in_flight=1)
    async with replicas(redis, 2, lease=0.4, timeout=5.0) as (one, other):
        redis.freeze()
        asking = asyncio.ensure_future(one.reserve(limits))
        await asyncio.sleep(0.3)  # looked for who has gone more than once
        redis.thaw()
        assert granted([await asking])
        await asyncio.sleep(0.8)
        assert await other.reserve(limits) == Refusal("in_flight", 0)


async def test_a_caller_that_is_cancelled_while_it_asks_runs_nowhere(redis: RedisServer) -> None:
    limits = Limits(in_flight=1)
    async with replicas(redis, 2) as (one, other):
        for _ in range(20):
            asking = asyncio.ensure_future(one.reserve(limits))
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await one.store.drain()
        assert granted([await other.reserve(limits)])


# --- when Redis is away -----------------------------------------------------------------------


async def test_who_asks_while_it_is_away_is_told_at_once(redis: RedisServer) -> None:
    async with replicas(redis, 1) as (one,):
        await redis.kill()
        with pytest.raises(AwayError):
            await one.reserve(Limits(in_flight=1))
        began = time.monotonic()
        for _ in range(1000):
            with pytest.raises(AwayError):
                await one.reserve(Limits(in_flight=1))
        assert time.monotonic() - began < 1  # a thousandth of the timeout each
        await redis.start()
        await until(lambda: one.store.here)
        assert granted([await one.reserve(Limits(in_flight=1))])


async def test_one_that_does_not_answer_is_away_after_the_timeout(redis: RedisServer) -> None:
    async with replicas(redis, 1, timeout=0.2) as (one,):
        redis.freeze()
        found = await asyncio.gather(
            *(one.reserve(Limits(in_flight=1)) for _ in range(10)), return_exceptions=True
        )
        assert all(isinstance(each, AwayError) for each in found)
        assert not one.store.here
        redis.thaw()
        await until(lambda: one.store.here)
        # What it was asked for and nobody heard of does not run.
        assert granted([await one.reserve(Limits(in_flight=1))])


@both
async def test_what_was_taken_while_it_was_away_counts_when_it_is_back(
    redis: RedisServer,
) -> None:
    limits = Limits(requests_per_minute=10, tokens_per_minute=1000, in_flight=5, tokens_per_day=900)
    async with replicas(redis, 2) as (one, other):
        for _ in range(2):
            (before,) = granted([await one.reserve(limits, 100)])
        before.close()
        await redis.kill()
        await until(lambda: not one.store.here and not other.store.here)
        during = [one.take(limits, 100), *(other.take(limits, 100) for _ in range(3))]
        during[0].settle(50)
        during[0].close()
        await redis.start()  # it has forgotten everything
        await until(lambda: one.store.here and other.store.here)
        # Six requests; 200 before, 50 and 300 while it was away; one and three are running.
        found = [await one.reserve(limits, 340)]
        assert granted(found)
        assert await one.reserve(limits, 200) == Refusal("in_flight", 0)
        granted(found)[0].settle(340)
        during[1].settle(150)
        for each in (*granted(found), *during):
            each.close()
        await one.store.drain()
        await other.store.drain()
        for tokens in (10, 10):  # 940 of 1000 tokens a minute, and of 900 a day
            assert (await one.reserve(limits, tokens)).limit == "day"


async def test_what_it_has_kept_is_not_counted_twice_when_it_is_back(redis: RedisServer) -> None:
    limits = Limits(requests_per_minute=10, tokens_per_minute=1000, in_flight=5)
    async with replicas(redis, 1, timeout=0.2) as (one,):
        for _ in range(4):
            assert granted([await one.reserve(limits, 100)])
        for _ in range(3):
            redis.freeze()
            with pytest.raises(AwayError):
                await one.quotas.reserve("caller:b", limits, 1)
            redis.thaw()
            await until(lambda: one.store.here)
        assert len(granted([await one.reserve(limits, 600)])) == 1
        assert isinstance(await one.reserve(limits, 0), Refusal)  # five run


@both
@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.parametrize("moments", [["before"], ["after"], ["before", "after", "before"]])
async def test_what_is_told_while_it_returns_is_told_until_it_is_heard_and_counts_once(
    redis: RedisServer, lost: bool, moments: list[str]
) -> None:
    limits = Limits(requests_per_minute=10, tokens_per_minute=1000, tokens_per_day=10_000)
    pauses: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def pause(_: float) -> None:
        over = asyncio.Event()
        pauses.put_nowait(over)
        await over.wait()

    async with (
        Cutting(redis, _RESTORE).serving() as way,
        replicas(way, 1, pause=pause) as (one,),
        replicas(redis, 1) as (other,),
    ):
        (before,) = granted([await one.reserve(limits, 100)])
        if lost:
            await redis.kill()
            await redis.start()
        else:
            one.store.post(Script("it does not know this one"), (), ())
        over = await pauses.get()
        taken = [before]
        way.moments += moments
        for _ in moments:  # it is there, and away in the same breath
            taken.append(one.take(limits, 100))
            over.set()
            over = await pauses.get()
        assert not way.moments
        taken.append(one.take(limits, 100))
        over.set()
        await until(lambda: one.store.here and other.store.here)
        await one.store.drain()
        found = await redis.contents()
        assert f"'total': '{len(taken)}'" in found
        assert f"'total': '{100 * len(taken)}'" in found
        assert f"'spent': '{100 * len(taken)}'" in found
        for each in taken:
            each.settle(40)
            each.close()
        await one.store.drain()
        free = 1000 - 40 * len(taken)
        refused = await other.reserve(limits, free + 1)
        assert refused == Refusal("tokens", pytest.approx(60, abs=5))
        assert granted([await other.reserve(limits, free)])


async def test_what_arrives_behind_a_later_return_tells_nothing(redis: RedisServer) -> None:
    """Of a connection that was given up: what it sent may come over a slow way yet."""
    limits = Limits(requests_per_minute=10, in_flight=5)
    async with replicas(redis, 1) as (one,):
        one.take(limits, 0)
        ((_, keys, early),) = one.quotas._restore(False)
        one.take(limits, 0)
        ((_, _, later),) = one.quotas._restore(False)
        await one.store.call(_RESTORE, keys, later)
        found = await redis.contents()
        assert "'total': '2'" in found
        await one.store.call(_RESTORE, keys, early)
        assert sorted(found.splitlines()) == sorted((await redis.contents()).splitlines())


async def test_one_that_is_emptied_is_noticed_while_it_is_never_left_in_peace(
    redis: RedisServer,
) -> None:
    limits = Limits(requests_per_minute=3)
    async with replicas(redis, 1) as (one,):
        assert granted([await one.reserve(limits)])
        await redis.command("FLUSHALL")
        async with asyncio.timeout(10):
            while "caller:a:requests" not in await redis.contents():
                with contextlib.suppress(AwayError):
                    for _ in range(20):
                        await one.quotas.reserve("caller:b", Limits(in_flight=1000), 0)
                await asyncio.sleep(0)


async def test_each_window_is_restored_whatever_was_lost(redis: RedisServer) -> None:
    limits = Limits(requests_per_minute=10, tokens_per_minute=1000)
    async with replicas(redis, 1) as (one,):
        for _ in range(3):
            assert granted([await one.reserve(limits, 100)])
        await redis.kill()
        await until(lambda: not one.store.here)
        one.take(limits, 100)
        await redis.start()
        await until(lambda: one.store.here)
        for _ in range(3):  # what was told once is not told again
            one.store.post(Script("it does not know this one"), (), ())
            await until(lambda: not one.store.here)
            await until(lambda: one.store.here)
        assert await one.reserve(limits, 601) == Refusal("tokens", pytest.approx(60, abs=5))
        assert len(granted([await one.reserve(limits, 100) for _ in range(10)])) == 6


async def test_what_redis_kept_on_disk_is_told_nothing_but_what_it_missed(tmp_path: Path) -> None:
    limits = Limits(requests_per_minute=10, in_flight=8, tokens_per_day=10_000)
    async with (
        redis_server(tmp_path, persistent=True) as redis,
        replicas(redis, 2) as (one, other),
    ):
        for each in (one, one, other, other):
            assert granted([await each.reserve(limits, 100)])
        await redis.kill()
        await until(lambda: not one.store.here and not other.store.here)
        one.take(limits, 100)
        await redis.start()
        await until(lambda: one.store.here and other.store.here)
        assert len(granted([await one.reserve(limits, 100) for _ in range(10)])) == 3  # eight run
        assert "'total': '8'" in await redis.contents()
        assert "'spent': '800'" in await redis.contents()


async def test_who_has_gone_is_forgotten(redis: RedisServer) -> None:
    async with replicas(redis, 1, minute=0.2, lease=0.2) as (one,):
        running = await one.reserve(Limits(in_flight=1))
        assert isinstance(running, Grant)
        for name in "bcd":
            await one.quotas.reserve(f"caller:{name}", Limits(requests_per_minute=1), 1)
        await until(lambda: list(one.quotas._subjects) == ["caller:a"])
        running.close()
        await until(lambda: not one.quotas._subjects)


@both
@pytest.mark.parametrize("forgotten", ["FLUSHALL", "SCRIPT FLUSH", "DEBUG RELOAD"])
async def test_whatever_becomes_of_its_data_calls_go_on(redis: RedisServer, forgotten: str) -> None:
    limits = Limits(requests_per_minute=3)
    async with replicas(redis, 1) as (one,):
        assert granted([await one.reserve(limits)])
        await redis.command(*forgotten.split())
        async with asyncio.timeout(10):
            while "caller:a:requests" not in await redis.contents():
                await asyncio.sleep(0.02)
        with contextlib.suppress(AwayError):  # of SCRIPT FLUSH it learns only by asking
            await one.reserve(Limits(in_flight=1))
        await until(lambda: one.store.here)
        assert len(granted([await one.reserve(limits) for _ in range(5)])) == 2


def test_without_it_nothing_of_it_is_loaded() -> None:
    code = "import sys, tokenwire_service.server; sys.exit(str({'redis'} & {*sys.modules} or ''))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.strip() == ""
