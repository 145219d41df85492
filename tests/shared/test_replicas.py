"""Three replicas, one Redis, all real processes: limits hold, nothing is lost, all of it heals."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from harness import (
    Failure,
    Received,
    failure_of,
    receive,
    request,
    simulate,
    stream_request,
    until,
)
from processes import STALLED, Program, begun, serve
from redis_server import RedisServer
from tokenwire_service.simulator import Simulator

TOKENS = {name.upper(): f"token-of-{name}" for name in ("many", "few", "slots", "free")}
KEYS = "sk-test-secret-one,sk-test-secret-two"
CALLERS: dict[str, dict[str, Any]] = {
    "many": {"requests_per_minute": 100_000, "tokens_per_minute": 100_000_000},
    "few": {"requests_per_minute": 150},
    "slots": {"in_flight": 3},
    "free": {},
}


def bearer(caller: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[caller.upper()]}"),)


# A model of each upstream has its name.
UPSTREAMS: dict[str, dict[str, Any]] = {
    "test": {},
    "other": {},
    "limited": {"requests_per_minute": 60},
    "wide": {"requests_per_minute": 100_000, "tokens_per_minute": 100_000_000},
    "narrow": {"in_flight": 2},
}


@asynccontextmanager
async def gateways(
    folder: Path, server: RedisServer, count: int = 3, **redis: Any
) -> AsyncIterator[list[Program]]:
    """Some replicas of one configuration in front of one simulator."""
    callers = {
        name: {"tokens": [{"env": name.upper()}], **limits} for name, limits in CALLERS.items()
    }
    # The machine may be busy: only one that is killed is away.
    shared = {"url": server.url, "on_failure": "open", "lease": "3s", "timeout": "10s", **redis}
    async with Simulator(tokens_per_second=0).serving() as url, AsyncExitStack() as stack:
        upstreams = {
            name: {"base_url": url, "keys": [{"env": "TEST_KEY", "id": "k", **limits}]}
            for name, limits in UPSTREAMS.items()
        }
        models = {name: {"upstream": name} for name in UPSTREAMS}
        config = folder / f"{len(list(folder.iterdir()))}.yaml"
        written = {"callers": callers, "redis": shared, "upstreams": upstreams, "models": models}
        written |= {"admin": {"listen": "off"}, "drain": {"propagation": "0s", "grace": "100ms"}}
        config.write_text(json.dumps(written))
        variables = {**TOKENS, "TEST_KEY": KEYS}
        yield [
            await stack.enter_async_context(serve("--config", str(config), **variables))
            for _ in range(count)
        ]


@dataclass
class Load:
    """Calls without a pause, taking turns among replicas. Counts what became of them."""

    replicas: list[Program]
    caller: str
    model: str = "test"
    failures: list[Failure] = field(default_factory=list)
    answered: Counter[int] = field(default_factory=Counter)  # by replica
    stopped: bool = False
    seconds: float | None = None  # until each call's deadline

    @property
    def total(self) -> int:
        return self.answered.total()

    @property
    def reasons(self) -> Counter[str]:
        return Counter(each.reason for each in self.failures)

    async def ask(self, index: int) -> None:
        try:
            await self.replicas[index].chat.Chat(
                request(model=self.model), metadata=bearer(self.caller), timeout=self.seconds
            )
            self.answered[index] += 1
        except grpc.aio.AioRpcError as error:
            self.failures.append(failure_of(error))

    async def run(self, workers: int = 6) -> None:
        turns = itertools.cycle(range(len(self.replicas)))

        async def work() -> None:
            while not self.stopped:
                await self.ask(next(turns))

        await asyncio.gather(*(work() for _ in range(workers)))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.run())
        try:
            yield
        finally:
            self.stopped = True
            await task

    async def more(self, count: int = 30) -> None:
        """Waits until so many more have ended."""
        target = self.total + len(self.failures) + count
        await until(lambda: self.total + len(self.failures) >= target)


def every(replicas: list[Program], event: str, count: int) -> Callable[[], bool]:
    """Whether each replica's log has this line so often."""
    return lambda: all(
        sum(json.loads(line)["event"] == event for line in each.lines) >= count for each in replicas
    )


async def held(replica: Program, caller: str, model: str = "test") -> asyncio.Task[Received]:
    """A stream that has begun, and will not end."""
    stalled = stream_request(request(model=model, extra_body_json=STALLED))
    return await begun(replica.chat.StreamChat(stalled, metadata=bearer(caller)))


async def keys_asked(replica: Program, model: str, **directive: Any) -> list[str]:
    """The ids of the keys that one call was tried with, in order."""
    chat = request(model=model, extra_body_json=simulate(**directive))
    answer = await replica.chat.Chat(chat, metadata=bearer("free"))
    return [each.key_id for each in answer.header.attempts]


async def test_limits_hold_over_three_replicas(redis: RedisServer, tmp_path: Path) -> None:
    async with gateways(tmp_path, redis) as three:
        few = Load(three, "few")
        # With two keys of 60 requests a minute; a caller without limits, who will not wait for it.
        keys = Load(three, "free", "limited", seconds=20.0)
        await asyncio.gather(
            *(few.ask(index % 3) for index in range(300)),
            *(keys.ask(index % 3) for index in range(180)),
        )
        assert few.total == pytest.approx(150, rel=0.02)
        assert keys.total == pytest.approx(120, rel=0.02)
        for load in (few, keys):  # not one of them did all the work
            assert len(load.answered) == 3, load.answered
        assert set(few.reasons) == {"CALLER_QUOTA_EXCEEDED"}
        assert all(50 < each.retry_seconds <= 60.1 for each in few.failures)
        assert "150 chats a minute" in few.failures[0].message
        assert set(keys.reasons) == {"RATE_LIMITED"}

        # At once: three of one caller's, and two for each of two keys.
        running = [await held(each, "slots") for each in three]
        running += [await held(three[i % 3], "free", "narrow") for i in range(4)]
        fourth = Load(three, "slots")
        for index in range(3):
            await fourth.ask(index)
        assert fourth.reasons == {"CALLER_QUOTA_EXCEEDED": 3}
        waiting = [asyncio.ensure_future(keys_asked(each, "narrow", tokens=1)) for each in three]
        await asyncio.sleep(0.5)
        assert not any(each.done() for each in waiting)
        running.pop().cancel()
        async with asyncio.timeout(15):  # one after the other has the one that is free
            assert [len(await each) for each in waiting] == [1, 1, 1]

        # One is killed: what it had running counts no more once its lease is over.
        three[0].signal(signal.SIGKILL)
        await fourth.ask(1)
        assert fourth.total == 0
        async with asyncio.timeout(15):
            while not fourth.total:
                await fourth.ask(1)
            running.append(await held(three[1], "free", "narrow"))
        # The slots of those that live are renewed: there is one more, not two.
        running.append(await held(three[1], "slots"))
        await asyncio.sleep(3.5)
        refused = Load(three, "slots")
        await refused.ask(2)
        assert refused.reasons == {"CALLER_QUOTA_EXCEEDED": 1}
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)

        found = await redis.contents()
        assert "caller:few" in found
        assert " key:" in found.replace("tokenwire:", " ")
        for secret in (*TOKENS.values(), *KEYS.split(",")):
            assert secret not in found


async def test_open_loses_no_call_and_heals(redis: RedisServer, tmp_path: Path) -> None:
    async with gateways(tmp_path, redis) as three:
        few = Load(three, "few")
        await asyncio.gather(*(few.ask(index % 3) for index in range(60)))
        load, keys = Load(three, "many"), Load(three, "free", "wide")
        async with load.running(), keys.running():
            await load.more()
            await redis.kill()
            await load.more(100)
            await asyncio.gather(*(few.ask(index % 3) for index in range(30)))
            chat = request(model="test", extra_body_json=simulate(tokens=20))
            streams = [
                receive(each.chat.StreamChat(stream_request(chat), metadata=bearer("many")))
                for each in three
            ]
            assert all(each.failure is None for each in await asyncio.gather(*streams))
            await redis.start()
            await until(every(three, "redis is here", 2))
            await load.more()
        for each in (load, keys):
            assert each.failures == []
            assert min(each.answered.values()) > 0
        # What was taken before and meanwhile counts, though Redis had forgotten the one and not
        # heard of the other.
        assert (few.total, few.failures) == (90, [])
        await asyncio.gather(*(few.ask(index % 3) for index in range(90)))
        assert few.total == pytest.approx(150, rel=0.02)
        assert set(few.reasons) == {"CALLER_QUOTA_EXCEEDED"}
        for each in three:
            away = each.event("redis is away")
            assert away is not None
            assert away["level"] == "warning"


async def test_closed_refuses_who_has_limits_with_a_reason_and_heals(
    redis: RedisServer, tmp_path: Path
) -> None:
    async with gateways(tmp_path, redis, on_failure="closed") as three:
        limited, free = Load(three, "many"), Load(three, "free")
        keys = Load(three, "free", "wide")
        async with limited.running(), free.running(), keys.running():
            await limited.more()
            assert limited.failures == keys.failures == []
            await redis.kill()
            await limited.more(100)
            await keys.more(30)
            await redis.start()
            await until(every(three, "redis is here", 2))
            for load in (limited, keys):
                answered = load.total
                await load.more(30)
                assert load.total >= answered + 20
        for load, whose in ((limited, "caller many"), (keys, "the keys of upstream wide")):
            assert set(load.reasons) == {"GATEWAY_OVERLOADED"}
            for failure in load.failures:
                assert failure.code is grpc.StatusCode.UNAVAILABLE
                assert int(failure.pushback) > 0
                assert f"limits of {whose}" in failure.message
        assert free.failures == []
        assert free.total > 100


async def test_a_key_that_closes_on_one_replica_is_left_alone_by_the_others_within_a_second(
    redis: RedisServer, tmp_path: Path
) -> None:
    cools = {"fault": "rate_limited", "retry_after_s": 100, "keys": ["-one"]}
    retires = {"fault": "invalid_api_key", "keys": ["-one"]}
    both = (("test", cools), ("other", retires))
    async with gateways(tmp_path, redis) as three:
        for model, fault in both:
            assert await keys_asked(three[0], model, **fault) == ["k-1", "k-2"]
        await asyncio.sleep(1)
        for each in three:
            for model, fault in both:
                for _ in range(3):
                    assert await keys_asked(each, model, **fault) == ["k-2"]
        # What Redis forgets, it is told again: one that starts later hears of it, too.
        await redis.kill()
        await redis.start()
        await until(every(three, "redis is here", 2))
        async with gateways(tmp_path, redis, 1) as (later,):
            await asyncio.sleep(1)
            for model, fault in both:
                assert await keys_asked(later, model, **fault) == ["k-2"]
            assert await keys_asked(later, "wide", **cools) == ["k-1", "k-2"]  # other keys
        found = await redis.contents()
        assert " group_model test" in found
        assert " key " in found
        for secret in KEYS.split(","):
            assert secret not in found


async def test_one_that_starts_stalls_and_ends_without_redis(
    redis: RedisServer, tmp_path: Path
) -> None:
    await redis.kill()
    async with gateways(tmp_path, redis, 1, timeout="1s", lease="10m") as (one,):
        load = Load([one], "many")
        await load.ask(0)
        assert load.total == 1
        await redis.start()
        await until(every([one], "redis is here", 1))
        await load.ask(0)
        assert load.total == 2
        assert "caller:many" in await redis.contents()
        # It answers nobody: calls wait for it once, and none is lost.
        redis.freeze()
        await asyncio.gather(*(load.ask(0) for _ in range(20)))
        redis.thaw()
        await until(every([one], "redis is here", 2))
        assert (load.total, load.failures) == (22, [])
        # What ends with the gateway is told: nobody waits ten minutes for its slot.
        stream = await held(one, "slots")
        assert "caller:slots:running" in await redis.contents()
        one.signal(signal.SIGTERM)
        await one.exit_code()
        assert (await stream).failure is not None
        assert "caller:slots:running" not in await redis.contents()
