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

from harness import Failure, failure_of, receive, request, simulate, stream_request, until
from processes import STALLED, Program, begun, serve, write_config
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


@asynccontextmanager
async def gateways(
    folder: Path, server: RedisServer, count: int = 3, **settings: Any
) -> AsyncIterator[list[Program]]:
    """Some replicas of one configuration in front of one simulator."""
    keys = settings.pop("keys", None)
    callers = {
        name: {"tokens": [{"env": name.upper()}], **limits} for name, limits in CALLERS.items()
    }
    # The machine may be busy: only one that is killed is away.
    shared = {"url": server.url, "on_failure": "open", "lease": "1s", "timeout": "10s"}
    shared |= settings.pop("redis", {})
    folder.mkdir(exist_ok=True)
    async with Simulator(tokens_per_second=0).serving() as url, AsyncExitStack() as stack:
        config = write_config(
            folder, url, callers=callers, redis=shared, admin={"listen": "off"}, **settings
        )
        if keys is not None:
            text = Path(config).read_text()
            written = json.loads(text)
            written["upstreams"]["test"]["keys"] = keys
            Path(config).write_text(json.dumps(written))
        variables = {**TOKENS, "TEST_KEY": KEYS}
        starting = (
            stack.enter_async_context(serve("--config", config, **variables)) for _ in range(count)
        )
        yield [await each for each in starting]


@dataclass
class Load:
    """Calls without a pause, taking turns among replicas. Counts what became of them."""

    replicas: list[Program]
    caller: str
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
                request(), metadata=bearer(self.caller), timeout=self.seconds
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


async def test_limits_hold_over_three_replicas(redis: RedisServer, tmp_path: Path) -> None:
    async with gateways(tmp_path, redis) as three:
        load = Load(three, "few")
        await asyncio.gather(*(load.ask(index % 3) for index in range(300)))
        assert load.total == pytest.approx(150, rel=0.02)
        assert len(load.answered) == 3, load.answered  # not one of them did all the work
        assert set(load.reasons) == {"CALLER_QUOTA_EXCEEDED"}
        assert all(55 < each.retry_seconds <= 60.1 for each in load.failures)
        assert "150 chats a minute" in load.failures[0].message

        held = [
            await begun(
                each.chat.StreamChat(
                    stream_request(request(extra_body_json=STALLED)), metadata=bearer("slots")
                )
            )
            for each in three
        ]
        fourth = Load(three, "slots")
        for index in range(3):
            await fourth.ask(index)
        assert fourth.reasons == {"CALLER_QUOTA_EXCEEDED": 3}

        # One is killed: what it had running counts no more once its lease is over.
        three[0].signal(signal.SIGKILL)
        await asyncio.sleep(0.1)
        await fourth.ask(1)
        assert fourth.total == 0
        async with asyncio.timeout(5):
            while not fourth.total:
                await fourth.ask(1)
        # The slots of those that live are renewed: there is one more, not two.
        held.append(
            await begun(
                three[1].chat.StreamChat(
                    stream_request(request(extra_body_json=STALLED)), metadata=bearer("slots")
                )
            )
        )
        await asyncio.sleep(1.5)
        refused = Load(three, "slots")
        await refused.ask(2)
        assert refused.reasons == {"CALLER_QUOTA_EXCEEDED": 1}
        for each in held:
            each.cancel()
        await asyncio.gather(*held, return_exceptions=True)

        found = await redis.contents()
        assert "caller:few" in found
        for secret in (*TOKENS.values(), *KEYS.split(",")):
            assert secret not in found


async def test_open_loses_no_call_and_heals(redis: RedisServer, tmp_path: Path) -> None:
    async with gateways(tmp_path, redis) as three:
        few = Load(three, "few")
        await asyncio.gather(*(few.ask(index % 3) for index in range(60)))
        load = Load(three, "many")
        async with load.running():
            await load.more()
            await redis.kill()
            await load.more(100)
            await asyncio.gather(*(few.ask(index % 3) for index in range(30)))
            streams = [
                receive(
                    each.chat.StreamChat(
                        stream_request(request(extra_body_json=simulate(tokens=20))),
                        metadata=bearer("many"),
                    )
                )
                for each in three
            ]
            assert all(each.failure is None for each in await asyncio.gather(*streams))
            await redis.start()
            await until(every(three, "redis is here", 2))
            await load.more()
        assert load.failures == []
        assert min(load.answered.values()) > 0
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
    async with gateways(tmp_path, redis, redis={"on_failure": "closed"}) as three:
        limited, free = Load(three, "many"), Load(three, "free")
        async with limited.running(), free.running():
            await limited.more()
            assert limited.failures == []
            await redis.kill()
            await limited.more(100)
            await redis.start()
            await until(every(three, "redis is here", 2))
            answered = limited.total
            await limited.more(60)
            assert limited.total >= answered + 50
        assert set(limited.reasons) == {"GATEWAY_OVERLOADED"}
        for failure in limited.failures:
            assert failure.code is grpc.StatusCode.UNAVAILABLE
            assert int(failure.pushback) > 0
            assert "limits of caller many" in failure.message
        assert free.failures == []
        assert free.total > 100


async def test_a_start_without_redis_is_a_start(redis: RedisServer, tmp_path: Path) -> None:
    await redis.kill()
    async with gateways(tmp_path, redis, 1) as (one,):
        load = Load([one], "many")
        await load.ask(0)
        assert load.total == 1
        await redis.start()
        await until(every([one], "redis is here", 1))
        await load.ask(0)
        assert load.total == 2
        assert "caller:many" in await redis.contents()


# --- keys -------------------------------------------------------------------------------------

NAMED = [{"env": "TEST_KEY", "id": "k"}]  # k-1 and k-2


async def keys_asked(replica: Program, **directive: Any) -> list[str]:
    """The ids of the keys that one call was tried with, in order."""
    chat = request(extra_body_json=simulate(**directive))
    answer = await replica.chat.Chat(chat, metadata=bearer("free"))
    return [each.key_id for each in answer.header.attempts]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"fault": "rate_limited", "retry_after_s": 100}, "group_model"),
        ({"fault": "invalid_api_key"}, "key"),
    ],
)
async def test_a_key_that_closes_on_one_replica_is_left_alone_by_the_others_within_a_second(
    redis: RedisServer, tmp_path: Path, fault: dict[str, Any], told: str
) -> None:
    async with gateways(tmp_path, redis, keys=NAMED) as three:
        fault = {**fault, "keys": ["-one"]}
        assert await keys_asked(three[0], **fault) == ["k-1", "k-2"]
        await asyncio.sleep(1)
        for each in three:
            for _ in range(4):
                assert await keys_asked(each, **fault) == ["k-2"]
        # One that starts later hears of it, too; and Redis may forget it, or be away meanwhile.
        await redis.kill()
        await redis.start()
        await until(every(three, "redis is here", 2))
        async with gateways(tmp_path / "later", redis, 1, keys=NAMED) as (later,):
            await asyncio.sleep(1)
            # Its upstream has another address, but the keys are the same.
            assert await keys_asked(later, **fault) == ["k-2"]
        found = await redis.contents()
        assert f" {told} " in found
        for secret in KEYS.split(","):
            assert secret not in found


async def test_limits_of_keys_hold_over_three_replicas(redis: RedisServer, tmp_path: Path) -> None:
    keys = [{"env": "TEST_KEY", "id": "k", "requests_per_minute": 60}]
    async with gateways(tmp_path, redis, keys=keys) as three:
        load = Load(three, "free")
        load.seconds = 3.0
        await asyncio.gather(*(load.ask(index % 3) for index in range(180)))
        assert load.total == pytest.approx(120, rel=0.02)  # of two keys
        assert len(load.answered) == 3
        assert set(load.reasons) == {"RATE_LIMITED"}


async def test_requests_at_once_of_a_key_hold_and_who_waits_has_its_turn(
    redis: RedisServer, tmp_path: Path
) -> None:
    keys = [{"env": "TEST_KEY", "id": "k", "in_flight": 2}]
    async with gateways(tmp_path, redis, keys=keys) as three:
        stalled = stream_request(request(extra_body_json=STALLED))
        held = [
            await begun(three[i % 3].chat.StreamChat(stalled, metadata=bearer("free")))
            for i in range(4)
        ]
        waiting = [asyncio.ensure_future(keys_asked(each, tokens=1)) for each in three]
        await asyncio.sleep(0.5)
        assert not any(each.done() for each in waiting)
        held.pop().cancel()
        async with asyncio.timeout(10):  # one after the other has the one that is free
            assert [len(await each) for each in waiting] == [1, 1, 1]
        # A replica that is killed gives its two back.
        three[0].signal(signal.SIGKILL)
        more = [
            await begun(three[1].chat.StreamChat(stalled, metadata=bearer("free")))
            for _ in range(2)
        ]
        for each in (*held, *more):
            each.cancel()
        await asyncio.gather(*held, *more, return_exceptions=True)


@pytest.mark.parametrize("on_failure", ["open", "closed"])
async def test_limits_of_keys_while_redis_is_away(
    redis: RedisServer, tmp_path: Path, on_failure: str
) -> None:
    keys = [{"env": "TEST_KEY", "id": "k", "requests_per_minute": 1000}]
    async with gateways(tmp_path, redis, keys=keys, redis={"on_failure": on_failure}) as three:
        load = Load(three, "free")
        async with load.running():
            await load.more(100)
            assert load.failures == []
            await redis.kill()
            await load.more(200)
            await redis.start()
            await until(every(three, "redis is here", 2))
            answered = load.total
            await load.more(60)
            assert load.total >= answered + 50
        if on_failure == "open":
            assert load.failures == []
        else:
            assert set(load.reasons) == {"GATEWAY_OVERLOADED"}
            assert "limits of the keys of upstream test" in load.failures[0].message
