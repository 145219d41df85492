"""Framing cases of the WHATWG event stream, each fed in every way of cutting it."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from corpus import runner
from tokenwire_service.upstream import sse

_EVERY_SPLIT = 2000  # bytes; longer inputs are cut around line ends, and here and there


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
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


def splits(data: bytes) -> Iterable[int]:
    """Where to cut an input in two."""
    everywhere = range(len(data) + 1)
    if len(data) <= _EVERY_SPLIT:
        return everywhere
    ends = [i for i in everywhere if b"\n" in data[max(0, i - 2) : i + 2]]
    return {*ends[:50], *ends[-50:], *random.Random(0).sample(everywhere, 100)}


def test_events_come_out_of_an_input_in_any_two_pieces(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        data = case["input"]
        for i in splits(data):
            pieces = [data[:i], b"", data[i:]]
            assert fed(pieces) == expected(case), (case["name"], i)


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
