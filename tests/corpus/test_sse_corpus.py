"""Framing cases of the WHATWG event stream, each fed in every way of cutting it."""

from __future__ import annotations

import base64
import copy
import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest

from corpus import runner
from tokenwire_service.upstream import sse

_LONG = 12_000  # bytes: cutting a longer input everywhere, and reading it anew, takes minutes


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    """See `read_cases`."""
    return read_cases()


def read_cases() -> list[dict[str, Any]]:
    """The cases, `input` decoded."""
    found: list[dict[str, Any]] = json.loads((runner.CORPUS / "sse/sse_cases.json").read_bytes())[
        "cases"
    ]
    for case in found:
        case["input"] = base64.b64decode(case["input_base64"])
    return found


def fed(pieces: Iterable[bytes]) -> tuple[list[dict[str, str]], int | None]:
    """(the events, the last `retry`) of an input that comes in these pieces."""
    decoder = sse.Decoder(1 << 20)
    events = [
        {"event": event.type, "data": event.data.decode("utf-8", "replace"), "id": event.last_id}
        for piece in pieces
        for event in decoder.feed(piece)
    ]
    return events, decoder.retry_ms


def expected(case: dict[str, Any]) -> tuple[list[dict[str, str]], int | None]:
    """What `fed` must return."""
    return case["expected_events"], next(reversed(case["expected_retry_ms"]), None)


def test_events_come_out_of_an_input_in_one_piece(cases: list[dict[str, Any]]) -> None:
    assert len(cases) == 105
    for case in cases:
        assert fed([case["input"]]) == expected(case), case["name"]


def test_events_come_out_of_an_input_byte_by_byte(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        data = case["input"]
        assert fed(data[i : i + 1] for i in range(len(data))) == expected(case), case["name"]


def literal_splits(case: dict[str, Any], step: int = 1) -> int:
    """Feeds a case in two pieces, with nothing between, cut at every `step`-th place; how many."""
    data = case["input"]
    wanted = expected(case)
    places = range(0, len(data) + 1, step)
    for i in places:
        assert fed([data[:i], b"", data[i:]]) == wanted, (case["name"], i)
    return len(places)


def test_events_come_out_of_an_input_in_any_two_pieces(cases: list[dict[str, Any]]) -> None:
    """`make fuzz` does it at every place of the four long ones too."""
    tried = [literal_splits(case) for case in cases if len(case["input"]) <= _LONG]
    assert len(tried) == 101
    for case in cases:
        if len(case["input"]) > _LONG:
            literal_splits(case, step=len(case["input"]) // 60)


def clone(decoder: sse.Decoder) -> sse.Decoder:
    """A decoder that remembers the same."""
    twin = sse.Decoder(0)
    for name in sse.Decoder.__slots__:
        setattr(twin, name, copy.copy(getattr(decoder, name)))
    return twin


def alike(one: sse.Decoder, other: sse.Decoder) -> bool:
    """Whether they remember the same, and so go on in the same way."""
    return all(getattr(one, name) == getattr(other, name) for name in sse.Decoder.__slots__)


def test_a_long_input_may_be_cut_at_every_place(cases: list[dict[str, Any]]) -> None:
    """At each place of a long input, cut there and around it: the decoder then remembers what it
    does without the cut, so what follows is the same."""
    for case in cases:
        data = case["input"]
        if len(data) <= _LONG:
            continue
        ends = [i for i in range(len(data)) if data[i : i + 1] == b"\n"]
        stations = sorted({0, len(data), *range(0, len(data), 1000), *(end + 1 for end in ends)})
        events: list[sse.Event] = []
        decoder = sse.Decoder(1 << 20)
        for start, end in itertools.pairwise(stations):
            whole = clone(decoder)
            wanted = whole.feed(data[start:end])
            for i in range(start, end + 1):
                pieces = clone(decoder)
                got = pieces.feed(data[start:i]) + pieces.feed(data[i:end])
                assert got == wanted, (case["name"], i)
                assert alike(pieces, whole), (case["name"], i)
            decoder = whole
            events += wanted
        assert [event.data.decode() for event in events] == [
            event["data"] for event in case["expected_events"]
        ]


def test_events_come_out_of_the_pieces_of_other_suites(cases: list[dict[str, Any]]) -> None:
    tried = 0
    for case in cases:
        if sizes := case.get("suite_chunk_sizes"):
            assert sum(sizes) == case["input_len"]
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            pieces = [
                case["input"][start:end] for start, end in zip([0, *ends], ends, strict=False)
            ]
            assert fed(pieces) == expected(case), case["name"]
            tried += 1
    assert tried == 34
