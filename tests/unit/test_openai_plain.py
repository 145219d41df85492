"""Plain pieces of text, read the short way, say what the long way says; all else goes that way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwire.v1 import chat_service_pb2
from tokenwire_service.errors import UpstreamFault
from tokenwire_service.upstream import openai_answers, sse
from tokenwire_service.upstream.openai_answers import OpenAIStream
from tokenwire_service.upstream.openai_plain import piece, whole

Event = chat_service_pb2.StreamChatResponse

PLAIN = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1_700_000_000,
    "model": "m",
    "system_fingerprint": "fp",
    "service_tier": "default",
    "choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": None, "finish_reason": None}],
    "usage": None,
}


def event(chunk: object) -> sse.Event:
    data = chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()
    return sse.Event("message", data, "")


def told(events: Sequence[Event]) -> list[Event]:
    """What a caller has of them, however the text was cut."""
    out: list[Event] = []
    for each in events:
        delta = each.delta
        plain = {descriptor.name for descriptor, _ in delta.ListFields()} <= {
            "content",
            "choice_index",
        }
        if each.HasField("delta") and plain and out:
            last = out[-1]
            if last.HasField("delta") and last.delta.choice_index == delta.choice_index:
                others = {d.name for d, _ in last.delta.ListFields()} - {"content", "choice_index"}
                if not others:
                    last.delta.content += delta.content
                    continue
        copy = Event()
        copy.CopyFrom(each)
        out.append(copy)
    return out


def read(events: Sequence[sse.Event], batches: Sequence[int] | None, choices: int = 1) -> Any:
    """(what was told before the end or a fault, what came then, pieces); the long way without
    `batches`."""
    stream, out, pieces = OpenAIStream(choices), [], 0
    try:
        if batches is None:
            for each in events:
                said = stream.feed(each)
                pieces += sum(e.HasField("delta") for e in said)
                out += said
        else:
            at = 0
            for size in (*batches, len(events)):
                pieces += stream.feed_all(events[at : at + size], out)
                at += size
        end = stream.finish(None)
    except UpstreamFault as fault:
        return told(out), (fault.fault, fault.message), 0
    return told(out), end, pieces


HALVES = st.sampled_from(["\ud83d", "\ude00", "x\ud83d", "\ud83d\ude00", "\ude00x"])
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=5) | HALVES
SELDOM = st.sampled_from([None, None, None, None, "", "x", 0, 1, {}, [], {"a": 1}, True])
DELTAS = st.one_of(
    st.fixed_dictionaries({"content": TEXT}),
    st.fixed_dictionaries(
        {"content": TEXT},
        optional={
            "role": st.sampled_from(["assistant", "", None, "tool"]),
            "refusal": SELDOM,
            "reasoning": SELDOM,
            "reasoning_content": SELDOM,
            "tool_calls": SELDOM,
            "annotations": st.just([]),
            "extra": SELDOM,
        },
    ),
    SELDOM,
)
CHOICES = st.fixed_dictionaries(
    {"delta": DELTAS},
    optional={
        "index": st.sampled_from([0, 0, 0, 1, -1, 2**31, None, "0", True]),
        "logprobs": SELDOM,
        "finish_reason": st.sampled_from([None, None, None, "", "stop", "error"]),
        "other": SELDOM,
    },
)
CHUNKS = st.one_of(
    st.builds(
        lambda text: {
            **PLAIN,
            "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        },
        TEXT,
    ),
    st.fixed_dictionaries(
        {"choices": st.lists(CHOICES, max_size=2)},
        optional={
            "id": SELDOM,
            "object": st.sampled_from(["chat.completion.chunk", "error", "", None]),
            "created": st.sampled_from([1, 1.5, None, 10**30]),
            "model": SELDOM,
            "usage": st.sampled_from([None, {}, {"prompt_tokens": 3}]),
            "error": SELDOM,
            "code": SELDOM,
            "type": st.sampled_from(["error", "x"]),
            "more": SELDOM,
        },
    ),
)


@settings(max_examples=400)
@given(
    chunks=st.lists(CHUNKS, max_size=12),
    batches=st.lists(st.integers(0, 4), max_size=6),
    choices=st.integers(1, 2),
    done=st.booleans(),
)
def test_both_ways_say_the_same(
    chunks: list[Any], batches: list[int], choices: int, done: bool
) -> None:
    events = [event(PLAIN), *map(event, chunks)]
    if done:
        events.append(event(b"[DONE]"))
    assert read(events, batches, choices) == read(events, None, choices)


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"[DONE]",
        b"{",
        b"null",
        b'{"choices":[]}',
        b'{"choices":[{"delta":{"content":""}}]}',
        b'{"choices":[{"delta":{"content":"x"}},{"delta":{"content":"y"}}]}',
        b'{"choices":[{"delta":{"content":"x","tool_calls":[{}]}}]}',
        b'{"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}',
        b'{"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":1}}',
        b'{"choices":[{"delta":{"content":"x"}}],"error":null}',
        b'{"choices":[{"delta":{"content":"\\ud83d"}}]}',
        b'{"choices":[{"delta":{"content":"\xff"}}]}',
        b'{"choices":[{"delta":{"content":"x"},"index":-1}]}',
        b"[" * 100_000,
    ],
    ids=range(15),
)
def test_what_is_not_plain_goes_the_long_way(odd: bytes) -> None:
    assert piece(odd) is None


def test_half_a_surrogate_pair_waits_for_the_other_half() -> None:
    chunks = [
        b'{"choices":[{"delta":{"content":"%s"}}]}' % text
        for text in (b"a\\ud83d", b"\\ude00", b"b\\ud83d", b"c")
    ]
    events = [event(PLAIN), *map(event, chunks), event(b"[DONE]")]
    said, _, _ = read(events, [])
    assert "".join(each.delta.content for each in said) == "xa\U0001f600b\ufffdc"


def test_a_plain_piece() -> None:
    assert piece(json.dumps(PLAIN).encode()) == (0, "x")
    assert piece(b' {"choices":[{"index":3,"delta":{"content":"\\u00e9\\ud83d\\ude00"}}]} ') == (
        3,
        "\xe9\U0001f600",
    )


def test_a_joined_delta_stays_sendable() -> None:
    """The smallest limits.message_bytes is 64 KiB."""
    text = "\U0001f600" * 100
    chunk = {"choices": [{"delta": {"content": text}}]}
    stream, out = OpenAIStream(), []
    assert stream.feed_all([event(PLAIN)] + [event(chunk)] * 1000, out) == 1001
    assert max(each.ByteSize() for each in out) < 34_000
    assert "".join(each.delta.content for each in out) == "x" + text * 1000
    assert len(out) < 20


# --- whole answers ------------------------------------------------------------------------

WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_700_000_000,
    "model": "m",
    "service_tier": "default",
    "system_fingerprint": None,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "x", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
    },
}
MESSAGES = st.fixed_dictionaries(
    {"content": TEXT},
    optional={
        "role": st.sampled_from(["assistant", "", None, "tool"]),
        "refusal": SELDOM,
        "reasoning": SELDOM,
        "reasoning_content": SELDOM,
        "tool_calls": SELDOM,
        "annotations": SELDOM,
        "function_call": SELDOM,
        "audio": SELDOM,
        "other": SELDOM,
    },
)
WHOLE_CHOICES = st.fixed_dictionaries(
    {"message": MESSAGES},
    optional={
        "index": st.sampled_from([0, 0, 0, 1, -1, 2**31, None, "0", True]),
        "logprobs": SELDOM,
        "finish_reason": st.sampled_from(["stop", "stop", "length", "error", "", None, 1]),
        "stop_reason": SELDOM,
        "other": SELDOM,
    },
)
ANSWERS = st.fixed_dictionaries(
    {"choices": st.lists(WHOLE_CHOICES, max_size=2)},
    optional={
        "id": st.sampled_from(["a", "", None, 7]),
        "object": st.sampled_from(["chat.completion", "chat.completion", "error", "", None]),
        "created": st.sampled_from([1, 0, -1, 1.5, None, 253_402_300_800, 10**30]),
        "model": st.sampled_from(["m", "", None, []]),
        "system_fingerprint": SELDOM,
        "service_tier": SELDOM,
        "usage": st.sampled_from([None, {}, [], {"prompt_tokens": 3}, {"x": 1}, WHOLE["usage"]]),
        "error": SELDOM,
        "code": SELDOM,
        "prompt_logprobs": SELDOM,
        "more": SELDOM,
    },
)


@settings(max_examples=600)
@given(answer=ANSWERS | MESSAGES.map(lambda m: {**WHOLE, "choices": [{"message": m}]}))
def test_both_ways_read_the_same_answer(answer: Any) -> None:
    body = json.dumps(answer).encode()
    for flat in (False, True):
        said = []
        for way in (
            lambda flat=flat: openai_answers.decode(body, flat_errors=flat),
            lambda flat=flat: openai_answers._decode(body, flat),
        ):
            try:
                said.append(way())
            except UpstreamFault as fault:
                said.append((fault.fault, fault.message))
        assert said[0] == said[1]


def test_a_plain_answer_is_read_the_short_way() -> None:
    body = json.dumps(WHOLE).encode()
    assert whole(body) is not None
    answer = openai_answers.decode(body)
    assert answer == openai_answers._decode(body, False)
    assert answer.choices[0].message.content == "x"
    assert answer.usage.cached_prompt_tokens == 2
    assert answer.header.create_time.seconds == 1_700_000_000


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"null",
        b'{"choices":[]}',
        b'{"choices":[{"message":{"content":"x"}}]}',
        b'{"choices":[{"message":{"content":null},"finish_reason":"stop"}]}',
        b'{"choices":[{"message":{"content":"x"},"finish_reason":"error"}]}',
        b'{"choices":[{"message":{"content":"x","tool_calls":[{}]},"finish_reason":"stop"}]}',
        b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"error":{"a":1}}',
        b'{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"code":1}',
        b'{"choices":[{"message":{"content":"\\ud83d"},"finish_reason":"stop"}]}',
        b"[" * 100_000,
    ],
    ids=range(11),
)
def test_what_is_no_plain_answer_goes_the_long_way(odd: bytes) -> None:
    assert whole(odd) is None
