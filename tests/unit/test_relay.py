"""What one caller receives: all of it, in the contract's order, whatever is joined on the way."""

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.v1 import chat_pb2, chat_service_pb2, error_reason_pb2
from tokenwire_service.errors import GatewayError
from tokenwire_service.relay import HEARTBEAT_SECONDS, LEGACY_STATES, Outbox

Event = chat_service_pb2.StreamChatResponse
Delta = chat_service_pb2.Delta
Snapshot = chat_service_pb2.Snapshot


class Wire:
    """A scripted write in virtual time: keeps what is written, may take long, may break."""

    def __init__(self) -> None:
        self.now = 100.0
        self.written: list[Event] = []
        self.seconds = 0.0  # a write takes
        self.during: Callable[[], None] = lambda: None

    async def __call__(self, message: Event) -> None:
        self.during()
        self.now += self.seconds
        self.written.append(Event.FromString(message.SerializeToString()))

    def outbox(self, *, cumulative: bool = False, max_delay: float = 0.0) -> Outbox:
        return Outbox(
            self,
            cumulative=cumulative,
            max_delay=max_delay,
            started=90.0,
            now=lambda: self.now,
        )

    @property
    def kinds(self) -> list[str]:
        return [event.WhichOneof("event") or "" for event in self.written]

    @property
    def texts(self) -> list[str]:
        return [event.delta.content for event in self.written if event.HasField("delta")]


def header(model: str = "m") -> Event:
    return Event(header=chat_service_pb2.ResponseHeader(model=model))


def delta(content: str = "", index: int = 0, **fields: object) -> Event:
    return Event(delta=Delta(content=content, choice_index=index, **fields))


def part(index: int, arguments: str, call_id: str = "", name: str = "", custom: bool = False):
    return chat_service_pb2.ToolCallDelta(
        index=index, id=call_id, name=name, arguments=arguments, custom=custom
    )


def finish(index: int = 0) -> Event:
    return Event(
        finish=chat_service_pb2.Finish(
            choice_index=index, finish_reason=chat_pb2.FINISH_REASON_STOP
        )
    )


def trailer() -> Event:
    return Event(trailer=chat_service_pb2.StreamTrailer(usage=chat_pb2.Usage(total_tokens=3)))


# --- any answer, cut anyhow -------------------------------------------------------------

words = st.text(max_size=5)


@st.composite
def tool_parts(draw: st.DrawFn) -> list[chat_service_pb2.ToolCallDelta]:
    """Parts of up to two calls; the receiver takes the first id and name of each."""
    return [
        part(
            draw(st.integers(0, 1)),
            draw(words),
            draw(st.sampled_from(["", "", "id"])),
            draw(st.sampled_from(["", "", "name"])),
        )
        for _ in range(draw(st.integers(0, 3)))
    ]


@st.composite
def deltas(draw: st.DrawFn) -> Event:
    event = delta(
        draw(words),
        draw(st.integers(0, 2)),
        reasoning=draw(words),
        refusal=draw(st.sampled_from(["", "", "no"])),
        tool_calls=draw(tool_parts()),
        extra_json=draw(st.sampled_from(["", "", '{"audio":{"data":"Y"}}', '{"x":[1]}'])),
    )
    if draw(st.booleans()):
        event.delta.logprobs.add(token=draw(words), logprob=-1.0)
        event.delta.annotations.add(start_offset=1, url=draw(words))
    return event


answers = st.lists(deltas(), min_size=1, max_size=25)


def batches(data: st.DataObject, events: Sequence[Event]) -> list[list[Event]]:
    """The events as they arrive: some reads bring several, some none. Copies, since the outbox
    may change what it is given."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(events)), max_size=len(events))))
    edges = [0, *cuts, len(events)]
    copies = [Event.FromString(event.SerializeToString()) for event in events]
    return [copies[a:b] for a, b in itertools.pairwise(edges)]


def fold(events: Sequence[Event]) -> dict[int, dict[str, object]]:
    """What a caller who appends every delta has in the end, by choice."""
    out: dict[int, dict[str, object]] = {}
    calls: dict[tuple[int, int], list[str]] = {}
    for event in events:
        if not event.HasField("delta"):
            continue
        new = event.delta
        so_far = out.setdefault(
            new.choice_index,
            {"content": "", "reasoning": "", "refusal": "", "data": "", "x": 0}
            | {"logprobs": [], "annotations": [], "calls": []},
        )
        for name in ("content", "reasoning", "refusal", "logprobs", "annotations"):
            so_far[name] += type(so_far[name])(getattr(new, name))
        extra = json.loads(new.extra_json or "{}")
        so_far["data"] += extra.get("audio", {}).get("data", "")
        so_far["x"] += len(extra.get("x", []))
        for piece in new.tool_calls:
            call = calls.setdefault((new.choice_index, piece.index), ["", "", ""])
            call[:] = [call[0] or piece.id, call[1] or piece.name, call[2] + piece.arguments]
    for (choice, _), call in sorted(calls.items()):
        out[choice]["calls"] += [call]
    return out


def flat(message: chat_pb2.ChatMessage) -> dict[str, object]:
    """A message as `fold` writes it; it has no place for log probabilities."""
    extra = json.loads(message.extra_json or "{}")
    return {
        "content": message.content,
        "reasoning": message.reasoning,
        "refusal": message.refusal,
        "data": extra.get("audio", {}).get("data", ""),
        "x": len(extra.get("x", [])),
        "annotations": list(message.annotations),
        "calls": [
            [call.id, call.function.name, call.function.arguments_json]
            for call in message.tool_calls
        ],
    }


async def send_all(wire: Wire, outbox: Outbox, reads: Sequence[Sequence[Event]]) -> None:
    reads = [list(read) for read in reads]
    next(read for read in reads if read).insert(0, header())
    for read in reads:
        await outbox.send(read)
        wire.now += 0.3
        if wire.now >= outbox.wake_at:
            await outbox.tick()
    await outbox.finish([finish(0), finish(1), trailer()])


def check_order(kinds: Sequence[str], middle: str) -> None:
    """The order of the contract: header, text, one finish per choice, trailer."""
    assert kinds[0] == "header"
    assert list(kinds[-3:]) == ["finish", "finish", "trailer"]
    assert set(kinds[1:-3]) <= {middle}


@given(answers, st.sampled_from([0.0, 0.2, 1.0, 5.0]), st.data())
async def test_joining_loses_nothing_and_mixes_nothing(
    events: list[Event], max_delay: float, data: st.DataObject
) -> None:
    wire = Wire()
    await send_all(wire, wire.outbox(max_delay=max_delay), batches(data, events))
    assert fold(wire.written) == fold(events)
    check_order(wire.kinds, "delta")


@given(answers, st.sampled_from([0.0, 0.2, 5.0]), st.data())
async def test_snapshots_end_where_deltas_end_and_only_grow(
    events: list[Event], max_delay: float, data: st.DataObject
) -> None:
    wire = Wire()
    await send_all(wire, wire.outbox(cumulative=True, max_delay=max_delay), batches(data, events))
    check_order(wire.kinds, "snapshot")
    last: dict[int, Snapshot] = {}
    for event in wire.written:
        if event.HasField("snapshot"):
            index = event.snapshot.choice_index
            before = last.get(index, Snapshot()).message
            assert event.snapshot.message.content.startswith(before.content)
            assert event.snapshot.message.reasoning.startswith(before.reasoning)
            last[index] = event.snapshot
    folded = fold(events)
    for index, expected in folded.items():
        assert flat(last[index].message) == {k: v for k, v in expected.items() if k != "logprobs"}
    # A choice that ends says so, though no text of it came.
    assert {i for i, s in last.items() if s.state == Snapshot.STATE_ENDED} == {0, 1}
    assert set(last) == set(folded) | {0, 1}


# --- joining ----------------------------------------------------------------------------


async def written(*events: Event) -> list[Event]:
    """What goes out of one read, after the first text has gone."""
    wire = Wire()
    outbox = wire.outbox()
    await outbox.send([header(), delta("begun")])
    await outbox.send(events)
    return wire.written[2:]


async def test_neighbours_of_one_choice_travel_as_one_message() -> None:
    sent = await written(delta("a"), delta("b", reasoning="r"), delta("c", reasoning="s"))
    assert sent == [delta("abc", reasoning="rs")]


async def test_choices_are_never_joined() -> None:
    sent = await written(delta("a", 0), delta("b", 1), delta("c", 0))
    assert sent == [delta("a", 0), delta("b", 1), delta("c", 0)]


async def test_unmodelled_fields_travel_alone() -> None:
    odd = delta("b", extra_json='{"x":1}')
    assert await written(delta("a"), odd, delta("c")) == [delta("a"), odd, delta("c")]


async def test_arguments_of_one_call_are_joined_and_a_new_call_begins_a_part() -> None:
    sent = await written(
        delta(tool_calls=[part(0, "{", "id0", "f")]),
        delta(tool_calls=[part(0, '"a"')]),
        delta(tool_calls=[part(1, "x", "id1", "g", custom=True)]),
        delta(tool_calls=[part(1, "y")]),
        delta(tool_calls=[part(0, ":1}")]),
    )
    assert [list(event.delta.tool_calls) for event in sent] == [
        [
            part(0, '{"a"', "id0", "f"),
            part(1, "xy", "id1", "g", custom=True),
            part(0, ":1}"),
        ]
    ]


async def test_what_comes_while_a_write_is_under_way_is_one_message() -> None:
    """There is no queue: the reader hands in all that piled up."""
    wire = Wire()
    outbox = wire.outbox()
    await outbox.send([header(), delta("a")])
    await outbox.send([delta(c) for c in "bcdef"])
    assert wire.texts == ["a", "bcdef"]


async def test_messages_are_joined_up_to_a_size() -> None:
    """A message must stay sendable, however much text comes at once."""
    sent = await written(*(delta("x" * 1000) for _ in range(100)))
    assert "".join(event.delta.content for event in sent) == "x" * 100_000
    assert 3 <= len(sent) <= 5
    assert await written(delta("x" * 100_000)) == [delta("x" * 100_000)], "nothing is cut"


# --- the commit -------------------------------------------------------------------------


async def test_a_header_alone_commits_nothing() -> None:
    wire = Wire()
    outbox = wire.outbox()
    await outbox.send([header()])
    await outbox.send([])
    assert not outbox.committed
    assert wire.written == []
    assert outbox.wake_at == math.inf
    await outbox.send([delta("a")])
    assert outbox.committed
    assert wire.kinds == ["header", "delta"]


async def test_the_header_of_a_failed_attempt_is_never_sent() -> None:
    wire = Wire()
    outbox = wire.outbox()
    await outbox.send([header("first")])
    await outbox.send([header("second"), delta("a")])
    assert [event.header.model for event in wire.written] == ["second", ""]


async def test_the_call_is_committed_before_its_first_write_returns() -> None:
    wire = Wire()
    outbox = wire.outbox()
    seen: list[bool] = []
    wire.during = lambda: seen.append(outbox.committed)
    await outbox.send([header(), delta("a")])
    assert seen == [True, True]


async def test_an_answer_without_text_is_sent_at_its_end() -> None:
    wire = Wire()
    outbox = wire.outbox()
    await outbox.finish([header(), finish(), trailer()])
    assert wire.kinds == ["header", "finish", "trailer"]
    assert not wire.written[-1].trailer.HasField("time_to_first_token")


# --- time -------------------------------------------------------------------------------


async def test_the_first_text_is_never_delayed() -> None:
    wire = Wire()
    outbox = wire.outbox(max_delay=5.0)
    await outbox.send([header(), delta("a")])
    assert wire.texts == ["a"]


async def test_text_is_held_at_most_max_delay_from_its_arrival() -> None:
    wire = Wire()
    outbox = wire.outbox(max_delay=0.5)
    await outbox.send([header(), delta("a")])
    wire.now = 101.0
    await outbox.send([delta("b")])
    assert outbox.wake_at == 101.5
    wire.now = 101.4
    await outbox.send([delta("c")])
    assert outbox.wake_at == 101.5  # what came later does not prolong it
    await outbox.tick()  # a moment too early
    assert wire.texts == ["a"]
    wire.now = 101.5
    await outbox.tick()
    assert wire.texts == ["a", "bc"]
    assert outbox.wake_at == 101.5 + HEARTBEAT_SECONDS


async def test_what_is_held_is_bounded() -> None:
    wire = Wire()
    outbox = wire.outbox(max_delay=5.0)
    await outbox.send([header(), delta("a")])
    for _ in range(200):
        await outbox.send([delta("x" * 1000)])
    assert wire.texts == ["a"]
    for _ in range(100):
        await outbox.send([delta("x" * 1000)])
    sent = len(wire.written)
    assert len("".join(wire.texts)) > 200_000
    await outbox.send([delta("y")])
    assert len(wire.written) == sent, "then it is held again"


async def test_what_was_delivered_is_known_in_bytes() -> None:
    outbox = Wire().outbox(max_delay=5.0)
    await outbox.send([header(), delta("é" * 1000)])
    await outbox.send([delta(reasoning="x" * 1000)])
    assert 3000 <= outbox.delivered_bytes < 3050


async def test_the_end_does_not_wait_for_max_delay() -> None:
    wire = Wire()
    outbox = wire.outbox(max_delay=5.0)
    await outbox.send([header(), delta("a")])
    await outbox.send([delta("b")])
    await outbox.finish([finish(), trailer()])
    assert wire.kinds == ["header", "delta", "delta", "finish", "trailer"]


async def test_silence_after_the_first_text_is_broken_by_an_empty_message() -> None:
    wire = Wire()
    outbox = wire.outbox()
    await outbox.send([header(), delta("a")])
    assert outbox.wake_at == 100.0 + HEARTBEAT_SECONDS
    wire.now = outbox.wake_at
    await outbox.tick()
    assert wire.written[-1] == Event()
    assert outbox.wake_at == 100.0 + 2 * HEARTBEAT_SECONDS


async def test_no_heartbeat_comes_before_the_first_text() -> None:
    wire = Wire()
    outbox = wire.outbox()
    await outbox.send([header()])
    wire.now += 1000 * HEARTBEAT_SECONDS
    await outbox.tick()
    assert wire.written == []
    assert not outbox.committed


async def test_a_heartbeat_counts_from_the_end_of_the_last_write() -> None:
    wire = Wire()
    wire.seconds = 4.0
    outbox = wire.outbox()
    await outbox.send([header(), delta("a")])
    assert outbox.wake_at == 100.0 + 2 * 4.0 + HEARTBEAT_SECONDS


async def test_the_trailer_tells_the_time_from_the_call_to_the_first_text() -> None:
    wire = Wire()
    outbox = wire.outbox()
    wire.now = 92.5
    await outbox.send([header(), delta("a")])
    wire.now = 99.0
    await outbox.send([delta("b")])
    await outbox.finish([finish(), trailer()])
    assert wire.written[-1].trailer.time_to_first_token.ToMilliseconds() == 2500
    assert wire.written[-1].trailer.usage.total_tokens == 3


async def test_text_that_only_comes_with_the_end_has_its_time_too() -> None:
    wire = Wire()
    wire.now = 91.0
    await wire.outbox().finish([header(), delta("a"), finish(), trailer()])
    assert wire.written[-1].trailer.time_to_first_token.ToMilliseconds() == 1000


# --- cumulative -------------------------------------------------------------------------


async def test_each_snapshot_holds_all_so_far_and_one_read_sends_one() -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=True)
    await outbox.send([header(), delta("a")])
    await outbox.send([delta("b"), delta("c")])
    await outbox.finish([finish(), trailer()])
    shown = [
        (event.snapshot.state, event.snapshot.message.content)
        for event in wire.written
        if event.HasField("snapshot")
    ]
    assert shown == [
        (Snapshot.STATE_READY, ""),
        (Snapshot.STATE_STREAMING, "a"),
        (Snapshot.STATE_STREAMING, "abc"),
        (Snapshot.STATE_ENDED, "abc"),
    ]
    assert wire.kinds == ["header", *["snapshot"] * 4, "finish", "trailer"]


@pytest.mark.parametrize("max_delay", [0.0, 5.0])
async def test_long_snapshots_replace_each_other_too(max_delay: float) -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=True, max_delay=max_delay)
    await outbox.send([header(), delta("x" * 100_000)])
    await outbox.send([delta("y") for _ in range(50)])
    await outbox.finish([finish(), trailer()])
    snapshots = [len(e.snapshot.message.content) for e in wire.written if e.HasField("snapshot")]
    assert snapshots == [0, 100_000, 100_050] + [100_050] * (max_delay == 0)


async def test_snapshots_of_choices_in_turn_are_not_held_without_end() -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=True, max_delay=5.0)
    await outbox.send([header(), delta("x" * 50_000, 0)])
    for i in range(20):
        await outbox.send([delta("y", i % 2)])
    assert len(wire.written) > 10


async def test_the_ends_of_several_choices_come_after_all_snapshots() -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=True)
    await outbox.send([header(), delta("a", 0), delta("b", 1)])
    await outbox.finish([finish(0), finish(1), trailer()])
    assert wire.kinds == [
        *("header", "snapshot", "snapshot", "snapshot", "snapshot"),
        *("snapshot", "snapshot"),
        *("finish", "finish", "trailer"),
    ]


async def test_a_snapshot_knows_tool_calls_and_unmodelled_fields() -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=True)
    await outbox.send(
        [
            header(),
            delta(tool_calls=[part(0, "{", "id0", "f"), part(1, "in", "id1", "g", custom=True)]),
            delta(tool_calls=[part(0, "}"), part(1, "put")], refusal="no"),
            delta(extra_json='{"audio":{"id":"i","data":"AA"},"n":1,"l":[1]}'),
            delta(extra_json='{"audio":{"data":"BB"},"n":2,"l":[2],"half":"\\ud83d"}'),
        ]
    )
    message = wire.written[-1].snapshot.message
    first, second = message.tool_calls
    assert (first.id, first.function.name, first.function.arguments_json) == ("id0", "f", "{}")
    assert (second.id, second.custom.name, second.custom.input) == ("id1", "g", "input")
    assert (message.role, message.refusal) == ("assistant", "no")
    assert not message.HasField("content")
    assert not message.HasField("reasoning")
    assert json.loads(message.extra_json) == {
        "audio": {"id": "i", "data": "AABB"},
        "n": 2,
        "l": [1, 2],
        "half": "\ud83d",
    }


# Reason -> the number of the legacy integer states.
LEGACY_NUMBERS = {
    "CONTEXT_LENGTH_EXCEEDED": -3,
    "INVALID_REQUEST": -4,
    "UNSUPPORTED_PARAMETER": -4,
    "UNKNOWN_ROLE": -4,
    "CANCELLED": -2,
    "DEADLINE_EXCEEDED": -2,
    "GATEWAY_DRAINING": -2,
}
STATE_NUMBERS = {
    Snapshot.STATE_SERVER_ERROR: -1,
    Snapshot.STATE_CLOSED: -2,
    Snapshot.STATE_OUT_OF_LIMIT: -3,
    Snapshot.STATE_INVALID_ARGUMENT: -4,
}
REASONS = [
    name.removeprefix("ERROR_REASON_")
    for name in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118  # not a dict
    if name != "ERROR_REASON_UNSPECIFIED"
]


@pytest.mark.parametrize("name", REASONS)
async def test_the_last_snapshots_carry_the_legacy_state_of_the_error(name: str) -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=True, max_delay=5.0)
    await outbox.send([header(), delta("a", 0), delta("b", 1)])
    await outbox.send([delta("c", 1)])
    await outbox.fail(GatewayError(error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{name}"), ""))
    ends = [event.snapshot for event in wire.written[-2:]]
    assert [(end.choice_index, end.message.content) for end in ends] == [(0, "a"), (1, "bc")]
    assert {STATE_NUMBERS[end.state] for end in ends} == {LEGACY_NUMBERS.get(name, -1)}


def test_every_reason_with_a_legacy_state_exists() -> None:
    assert set(LEGACY_STATES) <= set(REASONS)


@pytest.mark.parametrize("cumulative", [False, True])
async def test_an_error_before_the_first_text_that_may_pass_sends_nothing(cumulative: bool) -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=cumulative)
    await outbox.send([header()])
    error = GatewayError(error_reason_pb2.ERROR_REASON_RATE_LIMITED, "", retry_helps=True)
    await outbox.fail(error)
    assert wire.written == []
    assert not outbox.committed


@pytest.mark.parametrize("name", REASONS)
async def test_an_error_before_the_first_text_that_no_retry_mends_is_a_snapshot(name: str) -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=True)
    await outbox.send([header()])
    await outbox.fail(GatewayError(error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{name}"), ""))
    (only,) = (event.snapshot for event in wire.written)
    assert (only.choice_index, only.message.content) == (0, "")
    assert STATE_NUMBERS[only.state] == LEGACY_NUMBERS.get(name, -1)
    assert not outbox.committed, "nothing of the answer was delivered, and nothing is charged"


async def test_an_error_lets_out_the_text_that_was_held() -> None:
    wire = Wire()
    outbox = wire.outbox(max_delay=5.0)
    await outbox.send([header(), delta("a")])
    await outbox.send([delta("b")])
    await outbox.fail(GatewayError(error_reason_pb2.ERROR_REASON_UPSTREAM_STREAM_INTERRUPTED, ""))
    assert wire.texts == ["a", "b"]


async def test_nothing_is_written_after_a_write_that_broke_off() -> None:
    wire = Wire()
    outbox = wire.outbox(cumulative=True)
    await outbox.send([header(), delta("a")])

    def breaks() -> None:
        raise TimeoutError

    wire.during = breaks
    with pytest.raises(TimeoutError):
        await outbox.send([delta("b")])
    wire.during = lambda: None
    count = len(wire.written)
    await outbox.fail(GatewayError(error_reason_pb2.ERROR_REASON_UPSTREAM_TIMEOUT, ""))
    assert len(wire.written) == count


async def test_a_caller_that_does_not_read_is_given_up() -> None:
    written: list[Event] = []

    async def write(message: Event) -> None:
        written.append(message)
        if len(written) > 3:
            await asyncio.Event().wait()

    outbox = Outbox(
        write, cumulative=True, max_delay=0, started=0, now=lambda: 0.0, write_timeout=0.02
    )
    await outbox.send([header(), delta("a")])
    with pytest.raises(GatewayError) as caught:
        await outbox.send([delta("b")])
    assert caught.value.reason_name == "CALLER_STALLED"
    await outbox.fail(caught.value)
    assert len(written) == 4, "gRPC takes no other message until the stalled one is gone"


async def _delivered(*events: Event) -> int:
    outbox = Wire().outbox()
    await outbox.send([header(), delta("first ")])
    await outbox.finish(events)
    return outbox.delivered_bytes


def test_what_is_let_go_with_the_end_counts_as_delivered() -> None:
    """As the text that a stop filter held back: what a call cost may be estimated by it."""
    assert asyncio.run(_delivered(finish())) == len("first ")
    assert asyncio.run(_delivered(delta("\u00e9"), finish())) == len("first ") + 2
