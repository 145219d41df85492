"""A timer that is due lets in what had come by then."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest
import uvloop

from tokenwire_service.timer import Within


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
