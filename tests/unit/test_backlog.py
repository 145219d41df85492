"""Which calls are refused follows how many wait in gRPC's core."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import sys
import time
from collections import deque
from typing import Any

import grpc
import pytest

from harness import until
from tokenwire_service.backlog import (
    CALM,
    FEW,
    GROWS,
    IN_VAIN,
    INTERVAL,
    INTERVAL_OVERLOADED,
    KEPT,
    LEISURE,
    LONGEST,
    OVERLOAD,
    SERVED,
    SERVED_IN_VAIN,
    SHRINKS,
    Backlog,
    calls_in_core,
    servers,
    time_wanted,
)
from tokenwire_service.looplag import LoopLag

MOST = 500


class Core:
    """What gRPC's core has: calls that wait, those that were handed over, and those that are
    counted for ever."""

    def __init__(self) -> None:
        self.now = self.ran = self.wanted = 0.0
        self.waiting = self.running = self.stray = self.looks = 0
        self.lag = LoopLag(lambda: self.now)
        self.backlog = Backlog(
            self._count, MOST, self.lag, lambda: self.now, lambda: self.ran, lambda: self.wanted
        )

    def _count(self) -> int:
        self.looks += 1
        return self.waiting + self.running + self.stray

    def hand_over(self, apart: float, *, idle: float = 0.0, refusable: bool = True) -> bool:
        """The next call begins so many seconds after the one before, a share of which the process
        had nothing to do; or it is refused: False."""
        self.now += apart
        self.ran += apart * (1 - idle)
        self.waiting = max(0, self.waiting - 1)
        self.running += 1
        if self.backlog.begins(refusable=refusable):
            return True
        self.running -= 1
        self.backlog.ended()
        return False


def test_while_few_calls_begin_nobody_looks() -> None:
    core = Core()
    assert all(core.hand_over(1.1 * INTERVAL / FEW) for _ in range(100))
    assert core.looks == 0


def test_a_flood_of_which_few_begin_is_seen_while_the_loop_is_in_time() -> None:
    """A turn of 1.5 ms is in time, and a call takes some five."""
    core = Core()
    core.waiting = 2 * MOST
    served = []
    for _ in range(100):
        core.waiting += 5  # others come
        served.append(core.hand_over(0.008))
    assert served.count(False) > 80


def test_at_leisure_strays_are_looked_for_once() -> None:
    """A look takes a fifth of a millisecond and more, of which a call would be late."""
    core = Core()
    core.stray = 2 * MOST
    assert all(core.hand_over(INTERVAL, idle=0.9) for _ in range(100))
    assert core.looks == 1
    assert core.backlog.waiting == 0


def test_after_a_pause_what_began_before_it_is_few() -> None:
    core = Core()
    for _ in range(FEW):
        core.hand_over(INTERVAL / (2 * FEW))
    core.stray = 2 * MOST  # of a flood that the core cut off
    assert core.hand_over(20 * INTERVAL)
    assert core.backlog.waiting == 2 * MOST, "not known yet"
    assert all(core.hand_over(0.01, idle=0.5) for _ in range(100))
    assert core.backlog.waiting == 0


def test_a_loop_that_is_late_is_looked_at_though_few_calls_begin() -> None:
    core = Core()
    core.lag.seconds = 0.01
    core.waiting = MOST + 100
    assert not all(core.hand_over(INTERVAL) for _ in range(8))


def test_what_is_open_to_all_is_never_refused() -> None:
    core = Core()
    core.waiting = 4 * MOST
    assert all(core.hand_over(0.001, refusable=False) for _ in range(2 * MOST))
    assert core.backlog.refused == 0


def test_calls_that_the_core_counts_for_ever_get_nobody_refused() -> None:
    """As those that it cut off itself, by thousands."""
    core = Core()
    core.hand_over(1.0)
    core.waiting, core.stray = 2 * MOST, 10 * MOST
    while core.waiting:
        core.hand_over(0.001)
    assert core.backlog.refused > MOST
    served = [core.hand_over(0.001, idle=0.5) for _ in range(1000)]
    assert all(served[100:]), "what is at leisure has nobody waiting"
    core.stray += 3 * MOST  # and more of them
    assert all(core.hand_over(0.001, idle=0.5) for _ in range(1000))


def test_a_burst_that_comes_to_a_process_at_leisure_is_served_and_hides_no_flood() -> None:
    core = Core()
    for _ in range(100):
        core.hand_over(0.001, idle=0.9)
    core.waiting = 3 * MOST
    for _ in range(50):
        core.hand_over(0.001, idle=0.9)
    assert core.backlog.waiting < 50
    assert all(core.hand_over(0.001) for _ in range(core.waiting))
    core.waiting = 2 * MOST
    assert not all(core.hand_over(0.001) for _ in range(MOST))


def test_what_runs_does_not_wait_whatever_there_is_of_it() -> None:
    core = Core()
    assert all(core.hand_over(0.001) for _ in range(10 * MOST))
    assert core.looks > 10
    assert core.backlog.waiting == 0


def test_a_burst_may_wait() -> None:
    core = Core()
    core.waiting = MOST
    assert all(core.hand_over(0.002) for _ in range(MOST))
    assert core.looks > 10


def test_a_queue_that_only_grows_is_no_burst() -> None:
    def refused_at(grows_for: float) -> float | None:
        """When somebody was, of whom three come in the time of two; after that as many as begin."""
        core = Core()
        core.hand_over(0)
        for n in range(8000):
            core.waiting += 1 if core.now > grows_for else 1 + n % 2
            if not core.hand_over(0.0005):
                return core.now
        return None

    assert refused_at(GROWS - 2 * INTERVAL) is None
    at = refused_at(math.inf)
    assert at is not None
    assert GROWS < at < GROWS + 4 * INTERVAL


def test_a_process_that_waits_for_a_processor_is_not_at_leisure() -> None:
    core = Core()
    core.hand_over(1.0)
    core.waiting = 2 * MOST
    served = []
    for _ in range(MOST):
        core.wanted += 0.002
        served.append(core.hand_over(0.002, idle=0.6))
        core.waiting += 1  # another has come
    assert not all(served)
    assert core.backlog.waiting == pytest.approx(2 * MOST, abs=2)


def test_one_look_that_finds_leisure_hides_nobody_who_waits() -> None:
    core = Core()
    overload(core)
    for _ in range(2 * LEISURE):
        core.hand_over(1.1 * INTERVAL_OVERLOADED, idle=0.5)
        core.waiting = MOST
        assert core.backlog.waiting == MOST
        core.hand_over(1.1 * INTERVAL_OVERLOADED)
        core.waiting = MOST


def test_callers_who_have_just_left_make_nobody_wait() -> None:
    """The core knows it before their calls end here."""
    core = Core()
    core.hand_over(1.0)
    core.stray = 600
    assert all(core.hand_over(0.01, idle=0.5) for _ in range(50)), "they are known"
    core.backlog.running += 300  # they have left: for the core they have ended
    for _ in range(FEW):
        core.hand_over(INTERVAL / FEW, idle=0.1)
    core.backlog.running -= 300
    assert all(core.hand_over(0.001, idle=0.1) for _ in range(1000))
    assert core.backlog.waiting == 0


def test_callers_who_leave_at_leisure_make_nobody_wait_either() -> None:
    core = Core()
    core.backlog.running += 300  # they have left: for the core they have ended
    for _ in range(2 * LEISURE):
        core.hand_over(1.1 * INTERVAL, idle=0.9)
    core.backlog.running -= 300
    assert core.backlog.waiting == 0


@pytest.mark.parametrize("held_up", [0.3, 0.6, 2.0])
def test_a_loop_that_was_held_up_has_a_queue_that_does_not_grow(held_up: float) -> None:
    core = Core()
    for _ in range(2 * FEW):
        core.hand_over(INTERVAL / (2 * FEW))
    core.lag.seconds = 0.1
    core.waiting = MOST - 10
    core.now += held_up
    core.ran += held_up
    assert all(core.hand_over(0.001) for _ in range(MOST - 10))


def overload(core: Core) -> None:
    core.waiting = 2 * MOST
    while core.hand_over(0.001):
        pass


def test_calls_that_can_be_served_are_soon_served_after_overload_though_they_come_in_clumps() -> (
    None
):
    core = Core()
    overload(core)
    core.waiting = 0
    refused = 0
    ends = core.now + OVERLOAD + 20
    while core.now < ends:
        core.waiting += 40
        while core.waiting:
            refused = 0 if core.hand_over(0.001) else refused + 1
        core.now += 0.01
        core.ran += 0.01  # streams
        if core.now < ends - 20:
            refused = 0
    assert refused == 0


def test_calls_that_the_core_counts_for_ever_get_others_refused_no_longer_than_one_overload() -> (
    None
):
    """Where streams leave no time in which nothing would wait."""
    core = Core()
    overload(core)
    core.waiting, core.stray = 0, 100
    served = [core.hand_over(0.01, idle=0.1) for _ in range(1000)]
    assert not all(served[:200])
    assert all(served[round((OVERLOAD + GROWS) / 0.01) :])


def test_overload_lasts_longer_where_it_comes_back_at_once() -> None:
    core = Core()
    lasted: list[float] = []
    for _ in range(5):
        overload(core)
        began = core.now
        while not core.hand_over(0.001) or core.now - began < OVERLOAD - 1:
            core.waiting = 4 * KEPT  # ever so many come as are refused
        while not core.hand_over(0.001) or not core.hand_over(0.001):
            core.waiting = 4 * KEPT
        lasted.append(core.now - began)
    doubled = [OVERLOAD * 2**n for n in range(4)]
    assert lasted[:4] == pytest.approx(doubled, rel=0.05)
    assert lasted[4] == pytest.approx(LONGEST, rel=0.05)


def test_where_too_many_wait_some_are_kept_and_some_served() -> None:
    core = Core()
    core.waiting = 4 * MOST
    served = [core.hand_over(0.001) for _ in range(4 * MOST)]
    refused_at = [n for n, each in enumerate(served) if not each]
    assert refused_at[0] < 2 * INTERVAL / 0.001
    during = served[refused_at[0] : refused_at[-1]]
    assert during.count(True) == pytest.approx(len(during) / SERVED, rel=0.1)
    assert 4 * MOST - refused_at[-1] == pytest.approx(KEPT, abs=INTERVAL / 0.001)
    assert core.backlog.refused == len(refused_at)


def test_more_are_served_where_refusing_does_not_shorten_the_queue_until_it_is_tried_again() -> (
    None
):
    core = Core()

    def share_served(seconds: float) -> float:
        calls = round(seconds / 0.001)
        core.waiting = 2 * MOST
        served = 0
        for _ in range(calls):
            served += core.hand_over(0.001)
            core.waiting = 2 * MOST  # others have come
        return served / calls

    share_served(2 * INTERVAL)
    assert share_served(0.8 * SHRINKS) == pytest.approx(1 / SERVED, rel=0.1)
    share_served(0.2 * SHRINKS + 2 * INTERVAL)
    assert share_served(IN_VAIN - 6 * INTERVAL) == pytest.approx(1 / SERVED_IN_VAIN, rel=0.1)
    share_served(6 * INTERVAL)
    assert share_served(SHRINKS / 2) == pytest.approx(1 / SERVED, rel=0.1)
    core.waiting = MOST
    for _ in range(round(SHRINKS / 0.001)):  # now it does
        core.hand_over(0.001)
    assert core.waiting < KEPT + INTERVAL / 0.001


def test_during_overload_the_backlog_stays_short_and_after_it_a_burst_may_wait_again() -> None:
    core = Core()
    core.waiting = 2 * MOST
    while core.waiting > KEPT:
        core.hand_over(0.001)
    core.waiting += MOST - KEPT  # no more than may wait at other times
    assert not all(core.hand_over(0.001) for _ in range(MOST - 1))
    core.waiting = 0
    core.now += 2 * CALM
    core.ran += 2 * CALM
    core.waiting = MOST
    assert all(core.hand_over(0.002) for _ in range(MOST))


def test_nobody_is_refused_in_place_of_those_who_have_left_meanwhile() -> None:
    core = Core()
    core.waiting = 4 * MOST
    while core.hand_over(0.001):
        pass
    core.waiting = 0
    core.now += INTERVAL
    assert all(core.hand_over(0.001) for _ in range(50))


@pytest.mark.parametrize("rate", [500, 900, 1500, 1900, 2500, 3500])
@pytest.mark.parametrize("seed", range(5))
def test_overload_is_served_as_well_as_there_is_time_for_and_no_other_call_refused(
    rate: int, seed: int
) -> None:
    """`rate` calls a second come, each of which takes a millisecond, or a third if refused; gRPC
    cuts off those that come when twice as many wait as are the most. A refusal is heard within
    some 10 ms wherever there is time to refuse all that cannot be served."""
    chance, core = random.Random(seed), Core()
    came: deque[float] = deque()
    waits: list[float] = []  # of those that are refused, once overload is known
    next_at, served = 0.0, 0
    while core.now < 20:
        while next_at <= core.now:
            if len(came) < 2 * MOST:
                came.append(next_at)
            next_at += chance.expovariate(rate)
        if not came:
            core.now = next_at  # and the process had nothing to do
            continue
        waited = core.now - came.popleft()
        core.waiting = len(came) + 1
        if core.hand_over(0):
            served += 1
            core.now += 0.001
            core.ran += 0.001
            core.running -= 1
            core.backlog.ended()
        else:
            if core.now > 10:
                waits.append(waited)
            core.now += 0.00033
            core.ran += 0.00033
    if rate < 1000:
        assert core.backlog.refused == 0
    elif rate < 2600:
        assert served / 20 > 0.9 * (1 - 0.00033 * rate) / (0.001 - 0.00033)
        assert statistics.median(waits) < 0.012
        assert max(waits) < 0.35  # while it is found out that there is overload yet
    else:  # more than there is time to refuse
        assert served / 20 > 0.75 / (0.001 + (SERVED_IN_VAIN - 1) * 0.00033)
        assert max(waits) < 0.6


def test_a_thread_wants_a_processor_for_as_long_as_it_runs() -> None:
    before, ran = time_wanted(), time.thread_time()
    while time.thread_time() < ran + 0.2:
        pass
    if sys.platform == "linux":
        assert time_wanted() - before >= 0.15  # the kernel counts it at ticks
    else:
        assert time_wanted() == 0.0


# --- the real core -----------------------------------------------------------------------


async def test_a_server_is_found_among_others_and_its_calls_are_counted() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def answer(request: bytes, _: object) -> bytes:
        begun.set()
        await go_on.wait()
        return request

    class Handler(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(answer)

    others = [grpc.aio.server()]
    before = servers()
    server = grpc.aio.server()
    (server_id,) = servers() - before
    others.append(grpc.aio.server())
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert calls_in_core(server_id) == 0
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method: Any = channel.unary_unary("/any/Method")
        call = method(b"")
        await begun.wait()
        await until(lambda: calls_in_core(server_id) == 1)
        go_on.set()
        await call
        await until(lambda: calls_in_core(server_id) == 0)
    for each in (server, *others):
        await each.stop(0)
    del server, each
    assert calls_in_core(server_id) == 0, "though there is no such server any more"
