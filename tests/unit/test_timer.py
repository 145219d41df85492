"""A timer that is due lets in what had come by then."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
import threading
import time
import weakref
from collections.abc import Callable
from random import Random

import pytest
import uvloop
from simulation.vtime import run

from tokenwire_service.timer import Alarm, Within


async def comes_while_blocked(place: str) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        threading.Timer(0.05, theirs.send, (b"x",)).start()
        held_up(place)
        async with Within(0.1):
            assert await reader.read(1) == b"x"
        writer.close()


def held_up(place: str) -> None:
    """A blocking call, where a loop runs its timers or where it looks at its sockets."""
    loop = asyncio.get_running_loop()
    if place == "timer":
        loop.call_later(0.01, time.sleep, 0.3)
        return
    ours, theirs = socket.socketpair()

    def block() -> None:
        time.sleep(0.3)
        loop.remove_reader(ours)
        ours.close()
        theirs.close()

    loop.add_reader(ours, block)
    loop.call_later(0.01, theirs.send, b"x")


@pytest.mark.parametrize("place", ["timer", "socket"])
@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_what_came_while_the_loop_was_blocked_was_in_time(
    loop: Callable[[], asyncio.AbstractEventLoop], place: str
) -> None:
    """Loops differ in what they do first: timers or sockets."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(comes_while_blocked(place))


async def test_what_does_not_come_ends_in_time() -> None:
    began = time.monotonic()
    timer = Within(0.05)
    with pytest.raises(TimeoutError):
        async with timer:
            await asyncio.Event().wait()
    assert timer.expired()
    assert 0.04 < time.monotonic() - began < 5


@pytest.mark.parametrize("seconds", [0.02, float("inf")])
async def test_what_comes_in_time_leaves_no_timer(seconds: float) -> None:
    timer = Within(seconds)
    async with timer:
        await asyncio.sleep(0)
    await asyncio.sleep(0.05)
    assert not timer.expired()


async def test_a_timeout_of_what_it_stands_around_is_not_its_own() -> None:
    timer = Within(5)
    with pytest.raises(TimeoutError):
        async with timer:
            raise TimeoutError
    assert not timer.expired()


async def test_a_cancel_is_no_timeout() -> None:
    async def wait() -> None:
        async with Within(5):
            await asyncio.Event().wait()

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- one timer for many waits -----------------------------------------------------------


async def alarm_while_blocked(place: str) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        alarm = Alarm(time.monotonic)
        threading.Timer(0.05, theirs.send, (b"x",)).start()
        held_up(place)
        with alarm.until(time.monotonic() + 0.1):
            assert await reader.read(1) == b"x"
        alarm.close()
        writer.close()


@pytest.mark.parametrize("place", ["timer", "socket"])
@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_an_alarm_lets_in_what_came_while_the_loop_was_blocked(
    loop: Callable[[], asyncio.AbstractEventLoop], place: str
) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(alarm_while_blocked(place))


def test_an_alarm_ends_each_wait_at_its_own_time() -> None:
    async def waits(random: Random) -> None:
        loop = asyncio.get_running_loop()
        alarm = Alarm(loop.time)
        for _ in range(300):
            lasts, patience = random.choice([0.0, 0.5, 2.0, 15.0]), random.choice([0.0, 0.001])
            ends = random.choice([0.0, 0.4, 2.0, 3.0, 40.0, math.inf])
            began, late = loop.time(), False
            try:
                with alarm.until(began + ends, patience):
                    await asyncio.sleep(lasts)
            except TimeoutError:
                late = True
            took = loop.time() - began
            if lasts < ends:
                assert not late
                assert took == pytest.approx(lasts)
            elif lasts > ends + patience:
                assert late
                assert took == pytest.approx(ends + patience)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            await asyncio.sleep(random.choice([0.0, 0.7, 20.0]))  # nothing rings between
        alarm.close()

    for seed in range(20):
        run(waits(Random(seed)))


async def test_whoever_else_cancels_comes_before_an_alarm() -> None:
    alarm = Alarm(time.monotonic)

    async def wait() -> None:
        with alarm.until(time.monotonic() + 0.02, 0.0):
            try:
                await asyncio.sleep(10)
            finally:
                asyncio.current_task().cancel()  # type: ignore[union-attr]

    task = asyncio.create_task(wait())
    with pytest.raises(asyncio.CancelledError):
        await task
    alarm.close()


async def test_a_deadline_around_an_alarm_is_told_from_it() -> None:
    alarm = Alarm(time.monotonic)

    async def wait(around: asyncio.Timeout, seconds: float) -> None:
        async with around:
            with alarm.until(time.monotonic() + seconds):
                await asyncio.sleep(10)

    for around, seconds in ((asyncio.timeout(0.02), 10), (asyncio.timeout(10), 0.02)):
        with pytest.raises(TimeoutError):
            await wait(around, seconds)
        assert around.expired() == (seconds == 10)
    alarm.close()


async def test_a_closed_alarm_holds_nothing() -> None:
    alarm = Alarm(time.monotonic)
    with alarm.until(time.monotonic() + 3600):
        await asyncio.sleep(0)
    handle = weakref.ref(alarm)
    alarm.close()
    del alarm
    gc.collect()
    assert handle() is None, "the loop still has its timer"
