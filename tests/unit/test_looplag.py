"""How long streams rest follows how late the loop runs."""

from __future__ import annotations

import asyncio
import time

from hypothesis import given
from hypothesis import strategies as st
from simulation.vtime import run

from tokenwire_service.looplag import FIRST_HOLD, HOLD_CAP, IN_TIME, LATE, LoopLag


def test_streams_rest_longer_while_the_loop_is_late_and_less_when_it_keeps_up() -> None:
    lag = LoopLag(lambda: 0.0)
    holds = []
    for _ in range(20):
        lag.measured(2 * LATE)
        holds.append(lag.hold)
    assert holds[0] == FIRST_HOLD
    assert holds == sorted(holds)
    assert holds[-1] == HOLD_CAP
    for _ in range(100):
        lag.measured(0.0)
        holds.append(lag.hold)
    assert holds[20:] == sorted(holds[20:], reverse=True)
    assert lag.hold == 0.0


def test_between_late_and_in_time_nothing_changes() -> None:
    lag = LoopLag(lambda: 0.0)
    lag.measured((LATE + IN_TIME) / 2)
    assert lag.hold == 0.0
    lag.measured(1.0)
    before = lag.hold
    lag.measured((LATE + IN_TIME) / 2)
    assert lag.hold == before > 0


@given(st.lists(st.floats(0, 100), max_size=50))
def test_no_rest_is_longer_than_the_cap_whatever_happens(looks: list[float]) -> None:
    lag = LoopLag(lambda: 0.0)
    for late in looks:
        lag.measured(late)
        assert 0 <= lag.hold <= HOLD_CAP
        assert 0 <= lag.seconds <= max(looks)


def test_one_long_turn_is_no_overload() -> None:
    lag = LoopLag(lambda: 0.0)
    lag.measured(1.0)
    assert lag.seconds < 0.25
    for _ in range(20):
        lag.measured(1.0)
    assert lag.seconds > 0.95


def test_a_loop_that_keeps_up_is_never_late() -> None:
    async def idle() -> LoopLag:
        lag = LoopLag(asyncio.get_running_loop().time)
        lag.start()
        await asyncio.sleep(100)
        lag.close()
        return lag

    lag = run(idle())  # which ends: nothing looks any more
    assert lag.seconds < 1e-6
    assert lag.hold == 0.0


async def test_a_loop_that_is_held_up_is_late() -> None:
    lag = LoopLag(time.monotonic)
    lag.start()
    for _ in range(200):
        time.sleep(0.03)  # what holds it up
        await asyncio.sleep(0)
        if lag.hold:
            break
    lag.close()
    assert lag.hold >= FIRST_HOLD
    assert lag.seconds > 0
