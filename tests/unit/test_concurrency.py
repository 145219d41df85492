"""How many at once: the limit of a provider is found without being told, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation.vtime import run

from tokenwire_service.admission import Admission
from tokenwire_service.concurrency import FIRST_HOLD, FORGOTTEN, HOLD_CAP, AdaptiveLimit
from tokenwire_service.config import Key, Upstream
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.keyring import KeyRing, Lease
from tokenwire_service.pool import Pool
from tokenwire_service.secret import Secret


class Account:
    """A provider's account that takes `bears` requests at once and tells nobody; what is beyond is
    refused at once. Callers without end ask through one key."""

    def __init__(self, bears: int, *, takes: float = 1.0, streams: bool = False) -> None:
        self.bears = bears
        self.refused = 0
        self.served = 0
        self.busy = 0.0  # seconds, summed over requests
        self.at_the_end = 0  # requests under way
        self._takes = takes
        self._streams = streams
        self._random = random.Random(7)
        self._running = 0

    async def run(self, callers: int, *phases: tuple[float, int]) -> None:
        """Lets callers ask for so many seconds at each bearing capacity, and counts in the last
        phase alone."""
        now = asyncio.get_running_loop().time
        upstream = Upstream(
            name="u", base_url="http://u", keys=(Key(id="k", secret=Secret("s"), weight=1.0),)
        )
        ring = KeyRing(upstream, random=self._random.random)
        pool = Pool(cast(Any, None), ring, Admission(callers, 0, now), now=now)
        tasks = [asyncio.ensure_future(self._ask(pool)) for _ in range(callers)]
        for seconds, self.bears in phases:
            self.refused = self.served = 0
            self.busy = 0.0
            await asyncio.sleep(seconds)
        self.at_the_end = self._running
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert ring.in_flight == 0

    async def _ask(self, pool: Pool) -> None:
        now = asyncio.get_running_loop().time
        while True:
            lease = await pool.lease("m", math.inf)
            assert isinstance(lease, Lease)
            try:
                await asyncio.sleep(0.05 * self._random.random())  # on the way
                if self._running >= self.bears:
                    self.refused += 1
                    pool.ring.fail(lease, UpstreamFault(Fault.RATE_LIMITED), now())
                    continue
                self._running += 1
                began = now()
                try:
                    if self._streams:
                        pool.ring.succeed(lease)
                        pool.look()
                    await asyncio.sleep(self._takes * self._random.uniform(0.5, 1.5))
                finally:
                    self._running -= 1
                    self.busy += now() - began
                pool.ring.succeed(lease)
                self.served += 1
            finally:
                pool.release(lease)


@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streams"])
@pytest.mark.parametrize("bears", [1, 3, 10, 50])
def test_the_limit_of_an_account_is_found_from_above(bears: int, streams: bool) -> None:
    account = Account(bears, streams=streams)
    run(account.run(2 * bears + 20, (60.0, bears), (180.0, bears)))
    assert account.refused / (account.refused + account.served) < 0.05
    assert account.busy / (180.0 * bears) > 0.8, "the account stands idle"


def test_a_limit_that_rises_is_followed() -> None:
    account = Account(5)
    run(account.run(100, (120.0, 5), (90.0, 50), (60.0, 50)))
    assert account.busy / (60.0 * 50) > 0.75
    assert account.refused / (account.refused + account.served) < 0.05


def test_a_limit_that_falls_is_followed() -> None:
    account = Account(50)
    run(account.run(100, (60.0, 50), (60.0, 5), (60.0, 5)))
    assert account.busy / (60.0 * 5) > 0.8
    assert account.refused / (account.refused + account.served) < 0.05


def test_long_streams_do_not_keep_the_limit_low() -> None:
    account = Account(20, takes=300.0, streams=True)
    run(account.run(60, (120.0, 20), (1.0, 20)))
    assert account.at_the_end >= 18


def test_nothing_is_held_back_before_the_first_429() -> None:
    limit = AdaptiveLimit()
    for together in (1, 10, 100_000):
        limit.borne(together)
        assert limit.at(5.0) == math.inf
    account = Account(1000)
    run(account.run(1000, (0.3, 1000)))
    assert account.refused == 0


# --- the limit by itself ----------------------------------------------------------------


def refused(at: float, together: int) -> AdaptiveLimit:
    limit = AdaptiveLimit()
    limit.limited(together, at, at)
    return limit


def test_a_429_leaves_a_share_of_what_was_borne() -> None:
    assert refused(100.0, 101).at(100.0) == pytest.approx(70.0)


def test_it_grows_back_to_what_was_borne_and_stays() -> None:
    limit = AdaptiveLimit()
    now = 0.0
    for _ in range(10):  # the same place again and again: long holds
        limit.limited(11, now, now)
        now += HOLD_CAP
    limit.limited(11, now, now)
    grown = [limit.at(now + seconds) for seconds in (0, 1, 2, 3, 10, HOLD_CAP - 0.1)]
    assert grown == pytest.approx([7, 8, 9, 10, 10, 10])
    assert limit.at(now + HOLD_CAP) == 11


def test_the_next_try_comes_twice_as_late_each_time_it_fails_at_the_same_place() -> None:
    limit, now, waits = AdaptiveLimit(), 0.0, []
    limit.limited(2, now, now)
    for _ in range(8):
        waited = next(s / 10 for s in itertools.count() if limit.at(now + s / 10) >= 2)
        waits.append(waited)
        now += waited
        limit.limited(2, now, now)
    assert waits == [1, 2, 4, 8, 16, HOLD_CAP, HOLD_CAP, HOLD_CAP]
    limit.limited(40, now + 1.0, now + 1.0)  # elsewhere
    assert limit.at(now + 1.0 + 39 + FIRST_HOLD) > 39


def test_one_more_is_tried_after_each_that_was_borne() -> None:
    limit = refused(0.0, 11)
    now, tried = 100.0, []
    for _ in range(5):
        tried.append(math.floor(limit.at(now)))
        limit.borne(tried[-1])
    assert tried == [11, 12, 13, 14, 15]


def test_requests_that_are_refused_together_lower_the_limit_once() -> None:
    limit = AdaptiveLimit()
    for number in range(50):
        limit.limited(101 - number, started=1.0, now=2.0 + number / 100)
    assert limit.at(2.0) == pytest.approx(70.0)
    limit.limited(71, started=2.1, now=3.0)
    assert limit.at(3.0) == pytest.approx(49.0)


def test_few_requests_left_lower_the_limit_before_there_is_a_429() -> None:
    limit = AdaptiveLimit()
    limit.remaining(1000, 5, 1.0)
    limit.remaining(3, 5, 1.0)
    assert limit.at(1.0) == 8
    limit.remaining(900, 5, 1.0)
    assert limit.at(1.0) == 8, "many left says nothing about how many at once"
    limit.remaining(0, 2, 1.0)
    assert limit.at(1.0) == 2
    limit.remaining(0, 0, 1.0)
    assert limit.at(1.0) == 1
    assert limit.at(1.0 + FIRST_HOLD) >= 2


def test_what_was_learnt_long_ago_is_forgotten() -> None:
    limit = refused(0.0, 3)
    assert limit.at(FORGOTTEN - 1) == 3
    assert limit.at(FORGOTTEN + 1) == math.inf


steps = st.lists(
    st.tuples(
        st.sampled_from(["borne", "limited", "remaining"]),
        st.integers(0, 200),
        st.floats(0, 40),
    ),
    max_size=30,
)


@given(steps)
def test_whatever_happens_one_may_always_be_sent(script: list[tuple[str, int, float]]) -> None:
    limit, now = AdaptiveLimit(), 1000.0
    for what, number, later in script:
        now += later
        before = limit.at(now)
        if what == "borne":
            limit.borne(number)
            assert limit.at(now) >= before
        elif what == "limited":
            limit.limited(number, now, now)
            assert limit.at(now) <= max(1.0, number)
        else:
            limit.remaining(number, 1, now)
            assert limit.at(now) <= max(1.0, number + 1.0)
        assert limit.at(now) >= 1
        assert limit.at(now + 1) >= limit.at(now)
