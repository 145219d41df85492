"""Who may start: in order, never too many, and no slot is ever lost, in virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation.vtime import run

from tokenwire_service.admission import Admission, FullError


def admission(slots: int, queue: int) -> Admission:
    return Admission(slots, queue, lambda: asyncio.get_running_loop().time())


def now() -> float:
    return asyncio.get_running_loop().time()


async def hold(of: Admission, seconds: float, deadline: float = math.inf) -> float:
    """One call that takes so long once it has its slot; returns when it got it."""
    async with of.slot(deadline):
        began = now()
        await asyncio.sleep(seconds)
    return began


async def begun(*calls: Coroutine[object, object, float]) -> list[asyncio.Task[float]]:
    """The calls, begun in order and as far as they get without waiting."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


# --- any traffic ------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """One call of a script. Times are whole seconds, so that much happens at the same moment."""

    after: int  # the one before
    takes: int
    leaves: int | None  # seconds after it came
    rounds: int  # of the loop, by which it leaves later in that moment


arrivals = st.lists(
    st.builds(
        Arrival,
        after=st.integers(0, 2),
        takes=st.integers(0, 3),
        leaves=st.none() | st.integers(0, 4),
        rounds=st.integers(0, 4),
    ),
    max_size=30,
)


@given(slots=st.integers(1, 3), queue=st.integers(0, 8), script=arrivals)
def test_slots_go_in_order_to_never_too_many_and_all_come_back(
    slots: int, queue: int, script: list[Arrival]
) -> None:
    run(_play(admission(slots, queue), queue, script))


async def _play(of: Admission, queue: int, script: list[Arrival]) -> None:
    came: list[int] = []  # those that wait, in order
    held: set[int] = set()

    async def call(number: int, arrival: Arrival) -> None:
        full = len(held) + len(came) >= of.slots + queue
        came.append(number)
        try:
            async with of.slot(math.inf):
                behind = came[came.index(number) + 1 :]
                assert of.waiting <= len(behind), "somebody was overtaken"
                came.remove(number)
                held.add(number)
                assert len(held) <= of.slots
                try:
                    await asyncio.sleep(arrival.takes)
                finally:
                    held.remove(number)
        except FullError:
            assert full, "refused, though there was a place"
        finally:
            if number in came:
                came.remove(number)

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
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), outcome
    assert (of.in_flight, of.waiting) == (0, 0)
    async with asyncio.TaskGroup() as all_slots:  # each of them can still be had
        for _ in range(of.slots):
            all_slots.create_task(hold(of, 1.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert of.in_flight == of.slots


@pytest.mark.parametrize("leaves", range(5))
@pytest.mark.parametrize("ends", range(5))
def test_a_slot_that_comes_at_the_moment_its_waiter_leaves_goes_to_the_next(
    ends: int, leaves: int
) -> None:
    """Both within one moment, in every order of the loop's rounds."""

    async def main() -> None:
        of = admission(1, 10)

        async def first() -> None:
            async with of.slot(math.inf):
                for _ in range(5 + ends):
                    await asyncio.sleep(0)

        holder = asyncio.ensure_future(first())
        (waiter,) = await begun(hold(of, 1.0))
        (patient,) = await begun(hold(of, 1.0))
        for _ in range(4 + leaves):
            await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert await patient == now() - 1.0
        await holder
        assert (of.in_flight, of.waiting) == (0, 0)

    run(main())


# --- one thing at a time ----------------------------------------------------------------


def test_the_queue_is_first_come_first_served() -> None:
    async def main() -> None:
        of = admission(1, 10)
        began = await asyncio.gather(*(hold(of, 1.0) for _ in range(5)))
        assert [at - began[0] for at in began] == [0, 1, 2, 3, 4]

    run(main())


def test_a_newcomer_does_not_take_the_slot_that_was_just_handed_on() -> None:
    async def main() -> None:
        of = admission(1, 10)
        first, second = await begun(hold(of, 1.0), hold(of, 1.0))
        first.add_done_callback(lambda _: late.append(asyncio.ensure_future(hold(of, 1.0))))
        late: list[asyncio.Task[float]] = []
        assert await second == await first + 1.0
        assert await late[0] == await first + 2.0

    run(main())


def test_a_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        of = admission(2, 3)
        tasks = await begun(*(hold(of, 1.0) for _ in range(5)))
        assert (of.in_flight, of.waiting) == (2, 3)
        before = now()
        with pytest.raises(FullError):
            await hold(of, 1.0)
        assert now() == before
        await asyncio.gather(*tasks)

    run(main())


def test_without_a_queue_only_a_free_slot_helps() -> None:
    async def main() -> None:
        of = admission(1, 0)
        tasks = await begun(hold(of, 1.0))
        with pytest.raises(FullError):
            await hold(of, 1.0)
        await asyncio.gather(*tasks)
        await hold(of, 1.0)

    run(main())


def test_who_cannot_have_a_slot_before_the_deadline_is_refused_at_once() -> None:
    async def main() -> None:
        of = admission(2, 100)
        await asyncio.gather(*(hold(of, 10.0) for _ in range(4)))  # a call takes 10 s
        busy = await begun(*(hold(of, 10.0) for _ in range(2)))
        start = now()
        with pytest.raises(FullError):
            await hold(of, 10.0, deadline=start + 4.0)  # the next of two slots: 5 s on average
        assert now() == start
        patient = await begun(hold(of, 10.0, deadline=start + 6.0))
        assert of.waiting == 1
        with pytest.raises(FullError):
            await hold(of, 10.0, deadline=start + 9.0)  # behind it: 10 s
        await asyncio.gather(*busy, *patient)

    run(main())


def test_before_any_call_has_ended_nobody_is_refused_for_a_deadline() -> None:
    async def main() -> None:
        of = admission(1, 100)
        tasks = await begun(hold(of, 10.0), hold(of, 0.0, deadline=now() + 0.001))
        assert of.waiting == 1
        await asyncio.gather(*tasks)

    run(main())


@pytest.mark.parametrize(
    ("slots", "takes", "queued", "after"),
    [(1, 10.0, 0, 10.0), (1, 10.0, 3, 40.0), (4, 10.0, 3, 10.0), (10, 0.01, 0, 0.1)],
)
def test_the_time_to_come_back_is_that_of_a_place_at_the_end(
    slots: int, takes: float, queued: int, after: float
) -> None:
    async def main() -> None:
        of = admission(slots, queued)
        await hold(of, takes)
        tasks = await begun(*(hold(of, takes) for _ in range(slots + queued)))
        with pytest.raises(FullError) as refused:
            await hold(of, takes)
        assert refused.value.retry_after == pytest.approx(after)
        await asyncio.gather(*tasks)

    run(main())


def test_the_expected_wait_follows_the_calls() -> None:
    async def main() -> None:
        of = admission(1, 0)
        await hold(of, 100.0)
        for _ in range(100):
            await hold(of, 1.0)
        tasks = await begun(hold(of, 1.0))
        with pytest.raises(FullError) as refused:
            await hold(of, 1.0)
        assert 1.0 <= refused.value.retry_after < 1.1
        await asyncio.gather(*tasks)

    run(main())


def test_a_call_that_fails_gives_its_slot_back() -> None:
    async def main() -> None:
        of = admission(1, 1)
        with pytest.raises(ZeroDivisionError):
            async with of.slot(math.inf):
                raise ZeroDivisionError
        assert of.in_flight == 0

    run(main())
