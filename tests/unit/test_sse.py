"""The event stream reads as the WHATWG standard says, however its bytes are cut, and is bounded."""

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sse_reference import BOM, reference
from tokenwire_service.upstream.sse import Decoder, Event, EventTooLarge

NO_LIMIT = 1 << 30


def feed(chunks: Iterable[bytes], limit: int = NO_LIMIT) -> list[Event]:
    decoder = Decoder(limit)
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


# --- against the standard ---------------------------------------------------------------

# Pieces that matter to the standard, and some that only look so.
pieces = st.sampled_from(
    [
        *(b"data", b"data:", b"data: ", b"data:  ", b" data: x", b"Data: x", b"datax: y"),
        *(b"event:", b"event: e", b"id", b"id:", b"id: 7", b"id: a\0b", b"retry: 10", b"retry: x"),
        *(b":", b": comment", b"x", b"{}", b"[DONE]", b"\xff", b"\xf0\x9f", b"\x98\x80", b"\0"),
        *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"\n\r", b"\n\n"),
        *(BOM, BOM[:1], BOM[1:], "\u2028".encode(), b"\x0b", b"\x0c", b"\x85"),
    ]
)
streams = st.one_of(
    st.lists(pieces, max_size=30).map(b"".join),
    st.lists(pieces, max_size=30).map(lambda p: BOM + b"".join(p)),
    st.binary(max_size=60),
)


@given(streams, st.data())
@settings(max_examples=500)
def test_any_cutting_gives_what_the_standard_says(stream: bytes, data: st.DataObject) -> None:
    expected, retry = reference(stream)
    decoder = Decoder(NO_LIMIT)
    assert decoder.feed(stream) == expected
    assert decoder.retry_ms == retry
    assert feed(bytewise(stream)) == expected
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))  # some chunks are empty
    assert feed(cut(stream, cuts)) == expected


@given(streams)
@example(BOM + b"data: 1\r\n\r\ndata: 2\r\rdata: 3\n\n")
def test_every_cut_in_two_gives_the_same(stream: bytes) -> None:
    expected = feed([stream])
    for at in range(len(stream) + 1):
        assert feed([stream[:at], stream[at:]]) == expected
        assert feed([stream[:at], b"", stream[at:]]) == expected


# --- what providers send ----------------------------------------------------------------

# Name -> (stream, data of the events).
STREAMS: dict[str, tuple[bytes, list[bytes]]] = {
    "comments": (b": OPENROUTER PROCESSING\n\n: keep-alive\n\ndata: a\n\n:\n\n", [b"a"]),
    "blank lines": (b"\n\n\r\n\rdata: a\n\n\n\n", [b"a"]),
    "no space after the colon": (b"data:a\n\ndata:[DONE]\n\n", [b"a", b"[DONE]"]),
    "only one space is taken away": (b"data:  a\n\n", [b" a"]),
    "several lines of data": (b"data: a\ndata:b\ndata\ndata: \n\n", [b"a\nb\n\n"]),
    "LF": (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    "CR": (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "mixed line ends": (b"data: a\r\n\ndata: b\r\r\ndata: c\n\r", [b"a", b"b", b"c"]),
    "BOM": (BOM + b"data: a\n\n", [b"a"]),
    "second BOM belongs to the first line": (BOM + BOM + b"data: a\n\ndata: b\n\n", [b"b"]),
    "BOM later": (b"data: a\n\n" + BOM + b"data: b\n\ndata: c\n\n", [b"a", b"c"]),
    "unterminated last event": (b"data: a\n\ndata: b\n", [b"a"]),
    "unterminated last line": (b"data: a\n\ndata: b", [b"a"]),
    "broken UTF-8 is kept": (b"data: \xff\xf0\x9f\n\n", [b"\xff\xf0\x9f"]),
    "other separators of Unicode are text": (
        "data: a\u2028b\u0085c\x0bd\n\n".encode(),
        ["a\u2028b\u0085c\x0bd".encode()],
    ),
    "a line of 300 KiB": (b"data: " + b"x" * 300 * 1024 + b"\n\n", [b"x" * 300 * 1024]),
    "fields nobody knows": (b"foo: bar\nfoo\ndata: a\n\n", [b"a"]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_real_streams_are_read(name: str) -> None:
    stream, expected = STREAMS[name]
    assert [event.data for event in feed([stream])] == expected
    assert [event.data for event in feed(bytewise(stream))] == expected


def test_a_character_split_over_chunks_is_whole() -> None:
    stream = "data: 😀é\n\n".encode()
    for at in range(len(stream)):
        assert [e.data.decode() for e in feed([stream[:at], stream[at:]])] == ["😀é"]


def test_types_end_with_their_event_and_ids_last() -> None:
    events = feed([b"event: error\nid: 1\ndata: a\n\nevent: lost\n\ndata: b\n\nid\ndata: c\n\n"])
    assert events == [
        Event("error", b"a", "1"),
        Event("message", b"b", "1"),
        Event("message", b"c", ""),
    ]


def test_an_event_comes_with_its_last_byte() -> None:
    decoder = Decoder(NO_LIMIT)
    assert decoder.feed(b"data: a\r") == []
    assert decoder.feed(b"\r") == [Event("message", b"a", "")]  # not only with what follows


def test_a_field_named_error_is_kept() -> None:
    decoder = Decoder(NO_LIMIT)
    assert decoder.error_field is None
    decoder.feed(b'error: {"code":500}\n\n')
    assert decoder.error_field == b'{"code":500}'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        *((b"retry: 1500", 1500), (b"retry:0", 0), (b"retry: 1.5", None), (b"retry: -1", None)),
        *((b"retry", None), (b"retry: \xd9\xa1", None), (b"retry: " + b"0" * 20 + b"7", 7)),
        (b"retry: " + b"9" * 5000, 10**15),
    ],
)
def test_the_reconnection_time_is_digits_only(line: bytes, expected: int | None) -> None:
    decoder = Decoder(NO_LIMIT)
    decoder.feed(line + b"\n")
    assert decoder.retry_ms == expected
    assert reference(line + b"\n") == ([], expected)


# --- bounds -----------------------------------------------------------------------------

LIMIT = 100
OVERSIZED: dict[str, bytes] = {
    "one line without an end": b"data: " + b"x" * LIMIT,
    "one line": b"data: " + b"x" * LIMIT + b"\n\n",
    "a comment": b":" + b"x" * LIMIT + b"\n",
    "a field nobody knows": b"x" * (LIMIT + 1) + b"\n",
    "a type": b"event: " + b"x" * LIMIT + b"\n",
    "an id": b"id: " + b"x" * LIMIT + b"\n",
    "many lines": b"data: xxxx\n" * 20,
    "many empty lines of data": b"data\n" * 200,
    "data, then a comment": b"data: " + b"x" * 60 + b"\n:" + b"x" * 60 + b"\n\n",
}


@pytest.mark.parametrize("name", OVERSIZED)
def test_nothing_grows_beyond_the_bound(name: str) -> None:
    with pytest.raises(EventTooLarge, match="100 bytes"):
        feed([OVERSIZED[name]], LIMIT)
    with pytest.raises(EventTooLarge, match="100 bytes"):
        feed(bytewise(OVERSIZED[name]), LIMIT)


def test_events_up_to_the_bound_pass_one_after_the_other() -> None:
    event = b"data: " + b"x" * (LIMIT - 6) + b"\n\n"
    assert len(feed([event * 50], LIMIT)) == 50
    assert len(feed(bytewise(event * 50), LIMIT)) == 50
    assert len(feed([b": comment\n" * 1000], LIMIT)) == 0


@given(streams, st.integers(1, 30), st.data())
def test_the_bound_is_the_same_for_any_cutting(
    stream: bytes, limit: int, data: st.DataObject
) -> None:
    def outcome(chunks: list[bytes]) -> list[Event] | None:
        try:
            return feed(chunks, limit)
        except EventTooLarge:
            return None

    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert outcome([stream]) == outcome(bytewise(stream)) == outcome(cut(stream, cuts))


def test_a_line_that_comes_byte_by_byte_is_not_read_again_for_every_byte() -> None:
    """Linear work: copying the line at every byte would be a terabyte, and end in the timeout."""
    size = 3 << 19
    decoder = Decoder(NO_LIMIT)
    decoder.feed(b"data: ")
    for _ in range(size):
        decoder.feed(b"x")
    assert decoder.feed(b"\n\n")[0].data == b"x" * size
