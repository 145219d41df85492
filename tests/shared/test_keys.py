"""Keys that replicas share, against a real Redis: what closes one, and what it may."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness import until
from redis_server import RedisServer, both
from tokenwire_service import quotas, sharedkeys
from tokenwire_service.admission import Admission
from tokenwire_service.config import Key, Redis, Upstream
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.keyring import KeyRing, Lease, Unavailable
from tokenwire_service.keyset import shared_name
from tokenwire_service.quotas import Quotas
from tokenwire_service.secret import Secret
from tokenwire_service.sharedkeys import BELIEVED, SharedKeys
from tokenwire_service.sharedpool import SharedPool
from tokenwire_service.store import Store

SECRETS = ("sk-test-key-one-0001", "sk-test-key-two-0002")


def keys_of(prefix: str = "k", **settings: Any) -> tuple[Key, ...]:
    """Two keys, whose ids depend on who has them."""
    return tuple(
        Key(id=f"{prefix}{n}", secret=Secret(secret), **settings)
        for n, secret in enumerate(SECRETS, 1)
    )


class Replica:
    """Upstreams of one replica, each with a pool: `one` is the first."""

    def __init__(
        self, redis: RedisServer, upstreams: dict[str, tuple[Key, ...]], minute: float
    ) -> None:
        settings = Redis(url=redis.url, on_failure="open", timeout=5.0)
        scripts = (*quotas.SCRIPTS, *sharedkeys.SCRIPTS)
        self.store = Store(settings, scripts, logging.getLogger("tokenwire.test"))
        self.quotas = Quotas(self.store, minute=minute)
        self.keys = SharedKeys(self.store)
        self.pools: dict[str, SharedPool] = {}
        for name, keys in upstreams.items():
            upstream = Upstream(name=name, base_url="http://u", keys=keys)
            client = cast(Any, SimpleNamespace(upstream=upstream))
            ring = KeyRing(upstream, random=lambda: 0.0)
            pool = SharedPool(client, ring, Admission(1, 0, time.monotonic), self.quotas)
            self.pools[name] = pool
            self.keys.join(name, ring, pool.look)
        self.one = next(iter(self.pools.values()))
        self.ring = self.one.ring

    def meet(self, kind: Fault, after: float | None = None, model: str = "m", key: int = 1) -> None:
        """A request with the first key, or another, meets a fault."""
        others = []
        while (lease := self.lease(model)).key.secret != Secret(SECRETS[key - 1]):
            others.append(lease)
        self.ring.fail(lease, UpstreamFault(kind, retry_after=after), time.monotonic())
        for each in (lease, *others):
            self.ring.release(each)

    def lease(self, model: str = "m") -> Lease:
        found = self.ring.lease(model, time.monotonic())
        assert isinstance(found, Lease), found
        return found

    def open(self, model: str = "m", upstream: str = "u") -> list[int]:
        """The numbers of the keys that it would use."""
        ring, taken = self.pools[upstream].ring, []
        avoid: frozenset[str] = frozenset()
        while isinstance(found := ring.lease(model, time.monotonic(), avoid=avoid), Lease):
            avoid |= {found.key.quota_group}
            taken.append(found)
        for each in taken:
            ring.release(each)
        return sorted(SECRETS.index(each.key.secret.reveal()) + 1 for each in taken)

    def left(self, model: str = "m") -> float:
        """Seconds until the first key may serve again, as this ring has it."""
        view = self.ring.snapshot(now := time.monotonic())
        (key,) = (key for key in view.keys if key.id.endswith("1"))
        return max(each.until - now for each in key.closures if each.model in (None, model))


@asynccontextmanager
async def replicas(
    redis: RedisServer, *upstreams: dict[str, tuple[Key, ...]], minute: float = 60.0
) -> AsyncIterator[list[Replica]]:
    made = [Replica(redis, each, minute) for each in upstreams]
    tasks = [
        asyncio.ensure_future(each)
        for one in made
        for each in (one.store.run(), one.quotas.run(), one.keys.run())
    ]
    try:
        for one in made:
            await one.store.tried()
            assert one.store.here
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def looked() -> None:
    """Everybody has looked for news since."""
    await asyncio.sleep(2 * sharedkeys.INTERVAL)


TWO = ({"u": keys_of("a")}, {"u": keys_of("b")})

# What a key meets -> whether others leave it alone for this model, for another; for how long.
CLOSES = [
    (Fault.RATE_LIMITED, 100.0, True, False, 100.0),
    (Fault.RATE_LIMITED, None, True, False, 1.0),
    (Fault.DAILY_QUOTA, None, True, False, 3600.0),
    (Fault.KEY_REJECTED, None, True, True, BELIEVED),
    (Fault.ACCOUNT_DEAD, None, True, True, BELIEVED),
    (Fault.QUOTA_EXHAUSTED, None, True, True, 300.0),
    (Fault.ACCESS_DENIED, None, True, False, 3600.0),
    (Fault.OVERLOADED, 50.0, False, False, 0.0),
    (Fault.SERVER_ERROR, None, False, False, 0.0),
    (Fault.REFUSED, None, False, False, 0.0),
]


@pytest.mark.parametrize(("kind", "after", "here", "elsewhere", "seconds"), CLOSES)
async def test_what_one_replica_finds_the_other_knows(
    redis: RedisServer,
    kind: Fault,
    after: float | None,
    here: bool,
    elsewhere: bool,
    seconds: float,
) -> None:
    async with replicas(redis, *TWO) as (one, other):
        one.meet(kind, after)
        if not here:
            await looked()
            assert other.open() == [1, 2]
            return
        await until(lambda: other.open() == [2])
        assert other.open("another") == ([2] if elsewhere else [1, 2])
        assert other.left() == pytest.approx(seconds, abs=1)
        if kind is Fault.KEY_REJECTED:
            assert one.left() == math.inf  # it has that from the provider
        found = await redis.contents()
        assert kind.value in found
        assert all(secret not in found for secret in SECRETS)


@both
async def test_a_longer_closure_stays_whoever_tells_a_shorter_one(redis: RedisServer) -> None:
    async with replicas(redis, *TWO) as (one, other):
        one.meet(Fault.RATE_LIMITED, 1000.0)
        other.meet(Fault.RATE_LIMITED, 100.0)
        await looked()
        assert one.left() == pytest.approx(1000, abs=5)
        assert other.left() == pytest.approx(1000, abs=5)


async def test_a_new_secret_is_closed_by_nothing_that_the_old_one_met(redis: RedisServer) -> None:
    async with replicas(redis, *TWO) as (one, other):
        renewed = (Key(id="b1", secret=Secret("sk-test-renewed")), keys_of("b")[1])
        other.one.replace(renewed)
        one.meet(Fault.KEY_REJECTED)
        await looked()
        assert len(other.ring.keys) == 2
        found = [other.lease(), other.lease()]
        assert {each.key.id for each in found} == {"b1", "b2"}


async def test_a_key_that_comes_or_comes_back_is_known_as_others_know_it(
    redis: RedisServer,
) -> None:
    async with replicas(redis, *TWO) as (one, other):
        other.one.replace(keys_of("b")[1:])
        await looked()
        one.meet(Fault.RATE_LIMITED, 100.0)
        one.meet(Fault.KEY_REJECTED, model="another")
        one.meet(Fault.RATE_LIMITED, 100.0, "later", key=2)
        await until(lambda: other.open("later") == [])  # all of it has been looked at
        other.one.replace(keys_of("b"))
        await until(lambda: other.open("another") == [2])
        assert other.open() == [2]
        assert other.left() == pytest.approx(BELIEVED, abs=5)
        other.keys.leave("u")  # and its upstream comes back, too
        ring = KeyRing(Upstream(name="u", base_url="http://u", keys=keys_of("b")))
        other.keys.join("u", ring, lambda: None)
        await until(lambda: len(list(ring.closed(time.monotonic()))) == 3)


async def test_the_same_secret_at_another_upstream_is_another_key(redis: RedisServer) -> None:
    both = {"u": keys_of(), "v": keys_of()}
    async with replicas(redis, both, both) as (one, other):
        one.meet(Fault.KEY_REJECTED)
        await until(lambda: other.open() == [2])
        assert other.open(upstream="v") == one.open(upstream="v") == [1, 2]


async def test_who_waits_hears_that_it_waits_for_nothing(redis: RedisServer) -> None:
    single = {"u": keys_of(in_flight=1)[:1]}
    async with replicas(redis, {"u": keys_of()[:1]}, single) as (one, other):
        held = other.lease()
        waiting = asyncio.ensure_future(other.one.lease("m", math.inf))
        await asyncio.sleep(0)
        one.ring.fail(one.lease(), UpstreamFault(Fault.KEY_REJECTED), time.monotonic())
        async with asyncio.timeout(10):
            found = await waiting
        assert isinstance(found, Unavailable)
        assert found.fault is Fault.KEY_REJECTED
        other.ring.release(held)


@both
@pytest.mark.parametrize("lost", [True, False])
async def test_what_was_found_while_it_was_away_is_told_when_it_is_back(
    redis: RedisServer, lost: bool
) -> None:
    async with replicas(redis, *TWO) as (one, other):
        one.meet(Fault.RATE_LIMITED, 100.0)
        await until(lambda: other.open() == [2])
        if lost:
            await redis.kill()
        else:
            one.store.post(quotas.Script("it does not know this one"), (), ())
        await until(lambda: not one.store.here)
        one.meet(Fault.KEY_REJECTED, model="another", key=1)
        if lost:
            await redis.start()
        await until(lambda: other.open("another") == [2])
        # A third one, which begins now, hears of everything.
        async with replicas(redis, {"u": keys_of("c")}) as (third,):
            await until(lambda: third.open() == third.open("another") == [2])


async def test_what_is_told_to_a_redis_that_has_forgotten_is_news(redis: RedisServer) -> None:
    async with replicas(redis, *TWO) as (one, other):
        one.meet(Fault.RATE_LIMITED, 0.5, "passing")
        await until(lambda: other.open("passing") == [2])
        assert await versions(redis) == 1
        await asyncio.sleep(0.6)
        await redis.kill()
        await until(lambda: not one.store.here and not other.store.here)
        one.meet(Fault.KEY_REJECTED)  # the first version of another count
        await redis.start()
        await until(lambda: other.open() == [2])


async def test_a_flood_of_rate_limits_is_told_once(redis: RedisServer) -> None:
    async with replicas(redis, *TWO) as (one, other):
        leases = [one.lease() for _ in range(100)]
        for each in leases:
            one.ring.fail(each, UpstreamFault(Fault.RATE_LIMITED, retry_after=60), time.monotonic())
        await until(lambda: other.open() == [])
        await redis.command("PING")
        assert await versions(redis) <= 2 * 2  # of two keys


async def versions(redis: RedisServer) -> int:
    found = [line for line in (await redis.contents()).splitlines() if "closures:version " in line]
    return int(found[0].split()[-1])


@both
async def test_what_has_passed_is_swept(redis: RedisServer) -> None:
    async with replicas(redis, *TWO) as (one, other):
        for model in ("x", "y", "z"):
            one.meet(Fault.RATE_LIMITED, 0.3, model)
        await until(lambda: other.open("z") == [2])
        await asyncio.sleep(0.5)
        one.meet(Fault.RATE_LIMITED, 100.0)
        await until(lambda: other.open() == [2])
        found = await redis.contents()
        assert "group_model m" in found
        assert "group_model x" not in found


async def test_what_another_version_tells_does_no_harm(redis: RedisServer) -> None:
    async with replicas(redis, *TWO) as (one, other):
        one.meet(Fault.RATE_LIMITED, 100.0)
        await until(lambda: other.open() == [2])
        key = shared_name("u", other.ring.keys[0])
        for name, text in (
            (f"{key} planet ", "rate_limited 1"),
            (f"{key} key ", "eaten_by_a_dog 1"),
            ("0123 key ", "rate_limited 1"),
            ("0123", ""),
        ):
            await redis.command("HSET", "tokenwire:closures", name, text)
            await redis.command("ZADD", "tokenwire:closures:versions", "1000", name)
            await redis.command("ZADD", "tokenwire:closures:until", f"{2**52}", name)
        await redis.command("SET", "tokenwire:closures:version", "1000")
        await looked()
        one.meet(Fault.RATE_LIMITED, 100.0, "later")
        await until(lambda: other.open("later") == [2])


# --- what a key may -----------------------------------------------------------------------------


def pools(**limits: Any) -> tuple[dict[str, tuple[Key, ...]], ...]:
    return ({"u": keys_of("a", **limits)}, {"u": keys_of("b", **limits)})


async def taken(replica: Replica, tokens: int = 0, deadline: float = 0.0) -> Lease | Unavailable:
    return await replica.one.lease("m", deadline, tokens=tokens)


@both
async def test_a_key_that_others_have_used_up_is_passed_over_and_costs_nothing(
    redis: RedisServer,
) -> None:
    async with replicas(redis, *pools(requests_per_minute=10)) as (one, other):
        for _ in range(5):
            for each in (one, other):
                for _ in range(2):
                    lease = await taken(each)
                    assert isinstance(lease, Lease)
                    each.one.release(lease)
        for each in (one, other, one):
            found = await taken(each)
            assert isinstance(found, Unavailable)
            assert found.fault is Fault.RATE_LIMITED
            assert found.until - time.monotonic() == pytest.approx(60, abs=10)
            assert each.ring.in_flight == 0
        assert [key.state.value for key in one.ring.snapshot(time.monotonic()).keys] == [
            "limited",
            "limited",
        ]


async def test_what_was_refused_is_counted_nowhere(redis: RedisServer) -> None:
    """Minutes of Redis are shorter here than those of a ring."""
    single = {"u": keys_of(requests_per_minute=5, tokens_per_minute=500)[:1]}
    async with replicas(redis, single, single, minute=1.0) as (one, other):
        assert all([isinstance(await taken(one, 100), Lease) for _ in range(5)])
        assert isinstance(await taken(other, 100), Unavailable)
        assert isinstance(await taken(other, 100), Unavailable)
        await asyncio.sleep(1.2)
        assert all([isinstance(await taken(other, 100), Lease) for _ in range(5)])


async def test_tokens_of_a_key_are_corrected_for_everybody(redis: RedisServer) -> None:
    async with replicas(redis, *pools(tokens_per_minute=100)) as (one, other):
        first, second = await taken(one, 90), await taken(one, 90)
        assert isinstance(first, Lease)
        assert isinstance(second, Lease)
        assert isinstance(await taken(other, 90), Unavailable)
        one.ring.settle(first, 5)
        one.one.release(first)
        await one.store.drain()
        async with asyncio.timeout(10):  # it had been told that it takes a minute
            while isinstance(await taken(one, 90), Unavailable):
                await asyncio.sleep(0.05)
        one.one.release(second)


async def test_what_others_give_back_can_be_had_before_its_minute_is_over(
    redis: RedisServer,
) -> None:
    async with replicas(redis, *pools(tokens_per_minute=100)) as (one, other):
        held = [await taken(one, 90), await taken(one, 90)]
        found = await taken(other, 90)
        assert isinstance(found, Unavailable)
        assert found.until - time.monotonic() == pytest.approx(60, abs=10)
        waiting = asyncio.ensure_future(taken(other, 90, math.inf))
        await asyncio.sleep(0.1)
        for lease in held:
            assert isinstance(lease, Lease)
            one.ring.settle(lease, 5)
            one.one.release(lease)
        async with asyncio.timeout(10):
            lease = await waiting
            assert isinstance(lease, Lease)
            other.one.release(lease)
            while isinstance(await taken(other, 90), Unavailable):
                await asyncio.sleep(0.05)


async def test_a_request_that_needs_more_than_there_is_keeps_no_smaller_one_off(
    redis: RedisServer,
) -> None:
    single = {"u": keys_of(tokens_per_minute=100)[:1]}
    async with replicas(redis, single, single) as (one, other):
        assert isinstance(await taken(one, 50), Lease)
        for tokens in (90, 90, 60):
            assert isinstance(await taken(other, tokens), Unavailable)
        assert isinstance(await taken(other, 40), Lease)
        assert isinstance(await taken(other, 40), Unavailable)


async def test_who_waits_for_a_key_has_it_when_another_replica_releases_it(
    redis: RedisServer,
) -> None:
    async with replicas(redis, *pools(in_flight=1)) as (one, other):
        held = [await taken(one), await taken(one)]
        waiting = [asyncio.ensure_future(taken(other, deadline=math.inf)) for _ in range(3)]
        await asyncio.sleep(0.3)
        assert not any(each.done() for each in waiting)
        for lease in held:
            assert isinstance(lease, Lease)
            one.one.release(lease)
        async with asyncio.timeout(10):
            for _ in range(3):
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    waiting.remove(each)
                    lease = each.result()
                    assert isinstance(lease, Lease)
                    other.one.release(lease)
                if not waiting:
                    break
        assert other.ring.in_flight == 0


async def test_whoever_leaves_while_it_asks_holds_no_key(redis: RedisServer) -> None:
    async with replicas(redis, *pools(in_flight=1)) as (one, other):
        for turns in range(30):
            asking = asyncio.ensure_future(taken(one))
            for _ in range(turns % 6):
                await asyncio.sleep(0.0003)
            asking.cancel()
            try:
                lease = await asking
            except asyncio.CancelledError:
                continue
            assert isinstance(lease, Lease)
            one.one.release(lease)
        assert one.ring.in_flight == 0
        await one.store.drain()
        found = [await taken(other), await taken(other)]
        assert all(isinstance(each, Lease) for each in found)


async def test_keys_without_limits_ask_nobody(redis: RedisServer) -> None:
    async with replicas(redis, *TWO) as (one, _):
        lease = await taken(one)
        assert isinstance(lease, Lease)
        one.one.release(lease)
        await one.store.drain()
        assert "key:" not in (await redis.contents()).replace("tokenwire:", "")
