"""Who waits for a key gets it in turn, and nobody waits for what has come, in virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation.vtime import run

from tokenwire_service.admission import Admission
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.keyring import KeyRing, Lease, Unavailable
from tokenwire_service.pool import Pool
from tokenwire_service.secret import Secret


def now() -> float:
    return asyncio.get_running_loop().time()


class Ring(KeyRing):
    """Counts how often it is asked."""

    asked = 0

    def lease(self, model: str, now: float, **needs: Any) -> Lease | Unavailable:
        self.asked += 1
        return super().lease(model, now, **needs)


def key(name: str = "k", secret: str = "s", **limits: Any) -> Key:
    return Key(id=name, secret=Secret(secret), **limits)


def pool_of(*keys: Key) -> tuple[Pool, Ring]:
    ring = Ring(Upstream(name="u", base_url="http://u", keys=keys), random=lambda: 0.0)
    return Pool(cast(Any, None), ring, Admission(1, 0, now), now=now), ring


async def taken(pool: Pool, model: str = "m", **needs: Any) -> Lease:
    found = await pool.lease(model, math.inf, **needs)
    assert isinstance(found, Lease), found
    return found


async def use(pool: Pool, seconds: float = 1.0, model: str = "m", **needs: Any) -> float:
    """Waits for a key, uses it so long, with success; returns when it had it."""
    lease = await taken(pool, model, **needs)
    began = now()
    try:
        await asyncio.sleep(seconds)
        pool.ring.succeed(lease)
    finally:
        pool.release(lease)
    return began


async def begun(*work: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """The work, begun in order and as far as it gets without waiting."""
    tasks = [asyncio.ensure_future(each) for each in work]
    await asyncio.sleep(0)
    return tasks


def fail(pool: Pool, lease: Lease, kind: Fault, after: float | None = None) -> None:
    pool.ring.fail(lease, UpstreamFault(kind, retry_after=after), now())
    pool.release(lease)


# --- turns ------------------------------------------------------------------------------


def test_who_waits_is_served_in_order_of_arrival() -> None:
    async def main() -> None:
        pool, _ = pool_of(key(in_flight=1))
        start = now()
        began = await asyncio.gather(*(use(pool) for _ in range(6)))
        assert [at - start for at in began] == [0, 1, 2, 3, 4, 5]
        assert pool.waiting == 0

    run(main())


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    async def main() -> None:
        pool, _ = pool_of(key(in_flight=1))
        held = await taken(pool)
        (waiter,) = await begun(use(pool))
        pool.release(held)  # the waiter's task has not run yet
        assert await use(pool) == await waiter + 1.0

    run(main())


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    async def main() -> None:
        pool, _ = pool_of(key(tokens_per_minute=100))
        start = await use(pool, tokens=60)
        large, *small = await begun(use(pool, tokens=90), *(use(pool, tokens=10) for _ in range(5)))
        assert await large == start + 60.0
        assert {await each for each in small} == {start + 60.0, start + 120.0}

    run(main())


def test_those_who_wait_hold_up_nobody_who_asks_for_another_model() -> None:
    async def main() -> None:
        pool, _ = pool_of(key())
        fail(pool, await taken(pool, "full"), Fault.OVERLOADED, 60.0)
        start = now()
        waiting = await begun(*(use(pool, model="full") for _ in range(5)))
        assert await use(pool, model="free") == start
        assert pool.waiting == 5
        assert min(await asyncio.gather(*waiting)) == start + 60.0

    run(main())


def test_a_key_that_is_of_no_use_to_the_first_goes_to_the_next() -> None:
    """The first waits for a model that cools, the second for the key alone."""

    async def main() -> None:
        pool, _ = pool_of(key(in_flight=1))
        fail(pool, await taken(pool, "full"), Fault.OVERLOADED, 60.0)
        held = await taken(pool, "free")
        start = now()
        cooling, busy = await begun(use(pool, model="full"), use(pool, model="free"))
        await asyncio.sleep(5.0)
        pool.release(held)
        assert await busy == start + 5.0
        assert await cooling == start + 60.0

    run(main())


def test_one_return_serves_as_many_as_it_makes_room_for() -> None:
    """A probe that succeeds opens the key to everyone who waits for it, not to one."""

    async def main() -> None:
        pool, _ = pool_of(key())
        fail(pool, await taken(pool), Fault.OVERLOADED, 10.0)
        start = now()
        began = await asyncio.gather(*(use(pool) for _ in range(20)))
        assert [at - start for at in began] == [10.0] + [11.0] * 19

    run(main())


def test_what_is_known_before_the_stream_has_ended_helps_at_once() -> None:
    async def main() -> None:
        pool, ring = pool_of(key())
        fail(pool, await taken(pool), Fault.OVERLOADED, 10.0)
        probe, waiter = await begun(taken(pool), use(pool))
        lease = await probe
        await asyncio.sleep(3.0)
        assert not waiter.done()
        ring.succeed(lease)
        pool.look()
        assert await waiter == now() - 1.0
        pool.release(lease)

    run(main())


# --- by themselves ----------------------------------------------------------------------


def test_a_key_that_opens_with_time_is_had_at_that_time() -> None:
    async def main() -> None:
        pool, _ = pool_of(key(requests_per_minute=2))
        start = now()
        began = await asyncio.gather(*(use(pool, seconds=0.5) for _ in range(5)))
        assert [at - start for at in began] == [0, 0, 60, 60, 120]

    run(main())


def test_tokens_that_were_not_used_are_had_as_soon_as_that_is_known() -> None:
    async def main() -> None:
        pool, ring = pool_of(key(tokens_per_minute=100))
        start = now()
        lease = await taken(pool, tokens=90)
        (waiter,) = await begun(use(pool, tokens=50))
        await asyncio.sleep(7.0)
        ring.settle(lease, 10)
        pool.release(lease)
        assert await waiter == start + 7.0

    run(main())


def test_new_keys_serve_those_who_wait() -> None:
    async def main() -> None:
        pool, ring = pool_of(key(in_flight=1))
        held = await taken(pool)
        (waiter,) = await begun(use(pool))
        ring.replace([key(in_flight=1), key("new", "t")])
        pool.look()
        assert await waiter == now() - 1.0
        pool.release(held)

    run(main())


def test_each_model_is_had_at_its_own_time() -> None:
    async def main() -> None:
        pool, _ = pool_of(key())
        for model, seconds in (("soon", 10.0), ("late", 50.0)):
            fail(pool, await taken(pool, model), Fault.OVERLOADED, seconds)
        start = now()
        soon, late = await begun(use(pool, model="soon"), use(pool, model="late"))
        assert (await soon, await late) == (start + 10.0, start + 50.0)

    run(main())


# --- no use in waiting ------------------------------------------------------------------


def test_a_deadline_before_the_soonest_key_is_told_at_once() -> None:
    async def main() -> None:
        pool, _ = pool_of(key())
        fail(pool, await taken(pool), Fault.RATE_LIMITED, 10.0)
        start = now()
        found = await pool.lease("m", start + 9.0)
        assert found == Unavailable(start + 10.0, Fault.RATE_LIMITED)
        assert now() == start

    run(main())


def test_what_makes_waiting_useless_is_told_to_everyone_at_once() -> None:
    async def main() -> None:
        pool, ring = pool_of(key(in_flight=1))
        held = await taken(pool)
        hurried, patient = now() + 5.0, math.inf
        tasks = await begun(*(pool.lease("m", end) for end in (hurried, patient, hurried, patient)))
        fail(pool, held, Fault.RATE_LIMITED, 10.0)
        for hasty in tasks[::2]:
            found = await hasty
            assert isinstance(found, Unavailable)
            assert found.fault is Fault.RATE_LIMITED
        assert pool.waiting == 2
        await asyncio.sleep(10.0)
        probe = await tasks[1]
        fail(pool, probe, Fault.KEY_REJECTED)
        assert await tasks[3] == Unavailable(math.inf, Fault.KEY_REJECTED)
        assert ring.in_flight == pool.waiting == 0

    run(main())


def test_who_stands_behind_one_that_leaves_may_need_less_than_it_did() -> None:
    """Found by a simulated world: the next one waited for the room that the first had asked for."""

    async def main() -> None:
        pool, ring = pool_of(key(in_flight=1, tokens_per_minute=100))
        first = await taken(pool, tokens=40)
        large, small = await begun(
            pool.lease("m", now() + 30, tokens=50), pool.lease("m", now() + 90, tokens=8)
        )
        ring.settle(first, 90)  # more than was thought: the larger one fits no more
        pool.release(first)
        await asyncio.sleep(0)
        assert isinstance(await large, Unavailable)  # no room before its deadline
        had = await asyncio.wait_for(small, 1)
        assert isinstance(had, Lease)
        pool.release(had)
        assert ring.in_flight == pool.waiting == 0

    run(main())


def test_nobody_hears_of_a_key_that_was_mended_meanwhile() -> None:
    async def main() -> None:
        pool, ring = pool_of(key(in_flight=1))
        held = await taken(pool)
        tasks = await begun(*(pool.lease("m", math.inf) for _ in range(100)))
        ring.asked = 0
        fail(pool, held, Fault.KEY_REJECTED)
        assert ring.asked == 1
        for waiter in tasks:
            assert await waiter == Unavailable(math.inf, Fault.KEY_REJECTED)
        ring.replace([key(secret="new")])
        await use(pool)

    run(main())


def test_a_busy_key_is_waited_for_though_another_cools_for_long() -> None:
    async def main() -> None:
        pool, _ = pool_of(key("a"), key("b", "t", in_flight=1))
        fail(pool, await taken(pool), Fault.RATE_LIMITED, 1000.0)
        held = await taken(pool)
        assert held.key.id == "b"
        start = now()
        (waiter,) = await begun(pool.lease("m", start + 20.0))
        await asyncio.sleep(2.0)
        pool.release(held)
        found = await waiter
        assert isinstance(found, Lease)
        pool.release(found)

    run(main())


def test_a_key_that_cools_is_waited_for_though_another_is_retired_for_less_long() -> None:
    async def main() -> None:
        pool, _ = pool_of(key("a"), key("b", "t"))
        fail(pool, await taken(pool), Fault.QUOTA_EXHAUSTED)  # asked again after 300 s
        fail(pool, await taken(pool), Fault.RATE_LIMITED, 400.0)
        start = now()
        assert await use(pool) <= start + 400.0

    run(main())


def test_who_waits_for_a_busy_key_has_another_as_soon_as_that_is_asked_again() -> None:
    """Found by a simulated world: the breaker's time was over, and nobody looked."""

    async def main() -> None:
        pool, _ = pool_of(key("a", in_flight=1), key("b", "t"))
        fail(pool, await taken(pool, "other"), Fault.RATE_LIMITED, 0.0)
        held = await taken(pool)
        if held.key.id != "a":
            other, held = held, await taken(pool)
            pool.release(other)
        assert held.key.id == "a"
        fail(pool, await taken(pool), Fault.QUOTA_EXHAUSTED)  # b is asked again after 300 s
        start = now()
        (waiter,) = await begun(taken(pool))  # for `a`, which is only busy
        await asyncio.sleep(301.0)
        assert waiter.done()
        found = await waiter
        assert (found.key.id, found.started) == ("b", start + 300.0)
        pool.release(found)
        pool.release(held)

    run(main())


def test_who_waits_for_a_key_that_cools_has_another_as_soon_as_that_is_asked_again() -> None:
    async def main() -> None:
        pool, _ = pool_of(key("a"), key("b", "t"))
        fail(pool, await taken(pool), Fault.QUOTA_EXHAUSTED)  # asked again after 300 s
        fail(pool, await taken(pool), Fault.RATE_LIMITED, 400.0)
        start = now()
        assert await use(pool) == start + 300.0

    run(main())


def test_nobody_waits_for_a_probe_where_the_upstream_is_closed_anyway() -> None:
    """Found by a simulated world: the breaker tells at once, also those whose key is busy."""

    async def main() -> None:
        pool, _ = pool_of(key("a"))
        fail(pool, await taken(pool), Fault.RATE_LIMITED, 1.0)
        await asyncio.sleep(2.0)
        elsewhere = [await taken(pool, "other") for _ in range(10)]
        probe = await taken(pool)
        (waiter,) = await begun(pool.lease("m", math.inf))
        for lease in elsewhere:
            fail(pool, lease, Fault.SERVER_ERROR)
        await asyncio.sleep(0)
        assert waiter.done()
        assert await waiter == Unavailable(now() + 1.0, Fault.SERVER_ERROR)
        pool.release(probe)

    run(main())


# --- no herd ----------------------------------------------------------------------------


def test_a_return_asks_for_one_key_more_than_it_hands_out() -> None:
    async def main() -> None:
        pool, ring = pool_of(key(in_flight=1))
        tasks = await begun(*(use(pool) for _ in range(200)))
        ring.asked = 0
        await asyncio.gather(*tasks)
        assert ring.asked <= 2 * 200

    run(main())


def test_time_alone_wakes_nobody_for_nothing() -> None:
    async def main() -> None:
        pool, ring = pool_of(key(requests_per_minute=1))
        await use(pool)
        ring.asked = 0
        tasks = await begun(*(use(pool) for _ in range(50)))
        assert ring.asked == 1, "who comes later stands in a line that is closed"
        await asyncio.gather(*tasks)
        assert ring.asked <= 3 * 50

    run(main())


def test_many_models_are_asked_for_once_each() -> None:
    async def main() -> None:
        pool, ring = pool_of(key(in_flight=1))
        held = await taken(pool)
        tasks = await begun(*(use(pool, model=f"m{n % 5}") for n in range(100)))
        ring.asked = 0
        pool.release(held)
        assert ring.asked == 1 + 5
        await asyncio.gather(*tasks)

    run(main())


# --- leaving ----------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", range(5))
@pytest.mark.parametrize("ends", range(5))
def test_a_key_that_comes_at_the_moment_its_waiter_leaves_goes_to_the_next(
    ends: int, leaves: int
) -> None:
    """Both within one moment, in every order of the loop's rounds."""

    async def main() -> None:
        pool, ring = pool_of(key(in_flight=1))
        held = await taken(pool)
        waiter, patient = await begun(use(pool), use(pool))

        async def end() -> None:
            for _ in range(ends):
                await asyncio.sleep(0)
            pool.release(held)

        (ending,) = await begun(end())
        for _ in range(leaves):
            await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert await patient == now() - 1.0
        await ending
        assert ring.in_flight == pool.waiting == 0

    run(main())


def test_who_leaves_makes_room_for_a_smaller_one_behind() -> None:
    async def main() -> None:
        pool, _ = pool_of(key(tokens_per_minute=100))
        start = await use(pool, tokens=60)
        large, small = await begun(use(pool, tokens=90), use(pool, tokens=10))
        large.cancel()
        assert await small == start + 1.0
        assert large.cancelled()

    run(main())


@dataclass(frozen=True)
class Arrival:
    """One call of a script, in whole seconds so that much happens at the same moment."""

    after: int  # the one before
    model: str
    tokens: int
    takes: int
    ends: Fault | None
    leaves: int | None  # seconds after it came
    rounds: int  # of the loop, by which it leaves later in that moment


arrivals = st.lists(
    st.builds(
        Arrival,
        after=st.integers(0, 2),
        model=st.sampled_from("aab"),
        tokens=st.sampled_from([0, 1, 60]),
        takes=st.integers(0, 3),
        ends=st.sampled_from([None, None, Fault.RATE_LIMITED, Fault.OVERLOADED, Fault.REFUSED]),
        leaves=st.none() | st.integers(0, 5),
        rounds=st.integers(0, 4),
    ),
    max_size=25,
)


# --- other keys while calls run ---------------------------------------------------------


def test_who_waits_has_a_key_that_comes() -> None:
    async def main() -> None:
        pool, _ = pool_of(key(in_flight=1))
        held = await taken(pool)
        waiting = await begun(*(use(pool) for _ in range(3)))
        start = now()
        pool.replace([key(in_flight=1), key("new", "t", in_flight=2)])
        assert [await each for each in waiting] == [start, start, start + 1.0]
        pool.release(held)

    run(main())


def test_who_waits_for_keys_that_all_left_is_told_at_once() -> None:
    async def main() -> None:
        pool, ring = pool_of(key(in_flight=1))
        held = await taken(pool)
        waiting = await begun(*(pool.lease("m", math.inf) for _ in range(3)))
        start = now()
        pool.replace([])
        told = [await each for each in waiting]
        assert told == [Unavailable(math.inf, Fault.KEY_REJECTED)] * 3
        assert now() == start
        assert pool.waiting == 0
        pool.ring.succeed(held)  # it goes on to its end
        pool.release(held)
        assert ring.in_flight == 0

    run(main())


def test_who_waits_for_a_key_that_cools_has_the_one_that_replaces_it() -> None:
    async def main() -> None:
        pool, _ = pool_of(key())
        fail(pool, await taken(pool), Fault.RATE_LIMITED, 60.0)
        (waiter,) = await begun(use(pool))
        await asyncio.sleep(1.0)
        start = now()
        pool.replace([key("other", "t")])
        assert await waiter == start

    run(main())


@given(
    script=arrivals,
    in_flight=st.none() | st.integers(1, 2),
    requests=st.none() | st.integers(1, 5),
    tokens=st.none() | st.integers(1, 100),
)
def test_in_any_traffic_all_are_served_in_turn_and_no_lease_is_lost(
    script: list[Arrival], in_flight: int | None, requests: int | None, tokens: int | None
) -> None:
    limits = {"in_flight": in_flight, "requests_per_minute": requests, "tokens_per_minute": tokens}
    run(_play(script, key("a", "s", **limits), key("b", "t", **limits)))


async def _play(script: list[Arrival], *keys: Key) -> None:
    pool, ring = pool_of(*keys)
    lines: dict[str, list[int]] = {"a": [], "b": []}  # those that wait, in order

    async def call(number: int, arrival: Arrival) -> None:
        line = lines[arrival.model]
        line.append(number)
        try:
            lease = await taken(pool, arrival.model, tokens=arrival.tokens)
            ahead = line[: line.index(number)]
            waiting = sum(waiter.model == arrival.model for waiter in pool._waiting)
            assert waiting <= len(line) - 1 - len(ahead), "somebody was overtaken"
        finally:
            line.remove(number)
        try:
            await asyncio.sleep(arrival.takes)
            if arrival.ends is None:
                ring.succeed(lease)
            else:
                ring.fail(lease, UpstreamFault(arrival.ends), now())
        finally:
            pool.release(lease)

    async def leave(task: asyncio.Task[None], arrival: Arrival) -> None:
        assert arrival.leaves is not None
        await asyncio.sleep(arrival.leaves)
        for _ in range(arrival.rounds):
            await asyncio.sleep(0)
        task.cancel()

    tasks: list[asyncio.Task[None]] = []
    for number, arrival in enumerate(script):
        await asyncio.sleep(arrival.after)
        task = asyncio.ensure_future(call(number, arrival))
        tasks.append(task)
        if arrival.leaves is not None:
            tasks.append(asyncio.ensure_future(leave(task, arrival)))
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):  # else the loop is stuck
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
    assert ring.in_flight == pool.waiting == 0
    await asyncio.sleep(10_000.0)
    assert isinstance(await pool.lease("a", math.inf), Lease)
