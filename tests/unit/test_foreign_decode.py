"""The answers of foreign upstreams, whole and streamed, and what must never pass for one."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.folding import Growing
from tokenwire_service.upstream import anthropic_answers, gemini_answers, sse
from tokenwire_service.upstream.anthropic import Anthropic
from tokenwire_service.upstream.dashscope import DashScope
from tokenwire_service.upstream.dashscope_answers import CUMULATIVE
from tokenwire_service.upstream.dialect import Dialect, Encoded
from tokenwire_service.upstream.gemini import Gemini
from tokenwire_service.upstream.json_text import json_object

ANTHROPIC, GEMINI, DASHSCOPE = Anthropic(), Gemini(), DashScope()
SPEAKERS: dict[str, Callable[[], Encoded]] = {
    "anthropic": lambda: Encoded(ANTHROPIC, "", b"x"),
    "gemini": lambda: Encoded(GEMINI, "", b"x"),
    "dashscope": lambda: Encoded(DASHSCOPE, "", b"x"),
    "dashscope cumulative": lambda: Encoded(DASHSCOPE, "", b"x", notes=frozenset({CUMULATIVE})),
}
ALL = pytest.mark.parametrize("speaker", SPEAKERS)

Event = chat_service_pb2.StreamChatResponse


def stream(*events: Any) -> bytes:
    """A stream of JSON events; Anthropic's are named by their type."""
    return b"".join(
        b"event: %s\ndata: %s\n\n"
        % (str(event.get("type", "message")).encode(), json.dumps(event).encode())
        for event in events
    )


def decoded(encoded: Encoded, pieces: Iterable[bytes]) -> list[Event]:
    """All events of a stream that comes in these pieces. Raises UpstreamFault."""
    events, decoder = sse.Decoder(1 << 23), encoded.dialect.stream_decoder(encoded)
    told = []
    for piece in pieces:
        for event in events.feed(piece):
            told += decoder.feed(event)
    return told + decoder.finish(events.error_field)


def told(speaker: str, body: bytes, choices: int = 1) -> list[Event]:
    encoded = SPEAKERS[speaker]()
    request = Encoded(encoded.dialect, "", b"x", choices=choices, notes=encoded.notes)
    found = decoded(request, [body])
    kinds = [event.WhichOneof("event") for event in found]
    assert (kinds[0], kinds[-1]) == ("header", "trailer")
    return found


def folded(events: Iterable[Event]) -> dict[int, chat_pb2.ChatMessage]:
    """The messages that deltas add up to, by choice."""
    growing: dict[int, Growing] = {}
    for event in events:
        if event.WhichOneof("event") == "delta":
            growing.setdefault(event.delta.choice_index, Growing()).add(event.delta)
    return {index: each.message() for index, each in growing.items()}


def fault(speaker: str, *pieces: bytes, choices: int = 1) -> UpstreamFault:
    encoded = SPEAKERS[speaker]()
    request = Encoded(encoded.dialect, "", b"x", choices=choices, notes=encoded.notes)
    with pytest.raises(UpstreamFault) as caught:
        decoded(request, pieces)
    return caught.value


def whole(dialect: Dialect, answer: Any) -> chat_service_pb2.ChatResponse:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return dialect.decode(Encoded(dialect, "", b"x"), body)


def whole_fault(dialect: Dialect, answer: Any) -> UpstreamFault:
    with pytest.raises(UpstreamFault) as caught:
        whole(dialect, answer)
    return caught.value


def finish(events: list[Event]) -> chat_service_pb2.Finish:
    return next(event.finish for event in events if event.WhichOneof("event") == "finish")


def plain(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


# --- streams that are right --------------------------------------------------------------

START = {
    "type": "message_start",
    "message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [],
        "stop_reason": None,
        "usage": {
            "input_tokens": 10,
            "cache_read_input_tokens": 5,
            "cache_creation_input_tokens": 2,
            "output_tokens": 1,
            "service_tier": "standard",
        },
        "context_management": {"applied_edits": []},
        "novelty": 1,
    },
}


def opened(index: int, **block: Any) -> Any:
    return {"type": "content_block_start", "index": index, "content_block": block}


def grown(index: int, **delta: Any) -> Any:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def closed(index: int) -> Any:
    return {"type": "content_block_stop", "index": index}


def stopped(reason: str | None, **more: Any) -> list[Any]:
    usage = {"output_tokens": 9, "output_tokens_details": {"thinking_tokens": 4}}
    end = {"type": "message_delta", "delta": {"stop_reason": reason, **more}, "usage": usage}
    return [end, {"type": "message_stop"}]


CITATION = {
    "type": "web_search_result_location",
    "url": "https://example.com/",
    "title": "t",
    "cited_text": "c",
    "encrypted_index": "e",
}
THOUGHT = {"type": "thinking", "thinking": "hm, so", "signature": "c2ln"}
CALL = {"type": "tool_use", "id": "t1", "name": "look", "input": {"q": 1.5}}
SEARCH = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}}
BLOCKS = [
    THOUGHT,
    {"type": "text", "text": "Hé "},
    SEARCH,
    {"type": "text", "text": "yes", "citations": [CITATION]},
    CALL,
    {"type": "tool_use", "id": "t2", "name": "rest", "input": {}},
]
ANTHROPIC_EVENTS = [
    START,
    {"type": "ping"},
    opened(0, type="thinking", thinking="", signature=""),
    grown(0, type="thinking_delta", thinking="hm, "),
    grown(0, type="thinking_delta", thinking="so"),
    grown(0, type="signature_delta", signature="c2ln"),
    closed(0),
    opened(1, type="text", text=""),
    grown(1, type="text_delta", text="H"),
    {"type": "ping"},
    grown(1, type="text_delta", text="é "),
    closed(1),
    opened(2, type="server_tool_use", id="s1", name="web_search", input={}),
    grown(2, type="input_json_delta", partial_json='{"query": "x"}'),
    closed(2),
    opened(3, type="text", text=""),
    grown(3, type="citations_delta", citation=CITATION),
    grown(3, type="text_delta", text="yes"),
    closed(3),
    opened(4, type="tool_use", id="t1", name="look", input={}),
    grown(4, type="input_json_delta", partial_json=""),
    grown(4, type="input_json_delta", partial_json='{"q": '),
    grown(4, type="input_json_delta", partial_json="1.50}"),
    closed(4),
    opened(5, type="tool_use", id="t2", name="rest", input={}),
    grown(5, type="input_json_delta", partial_json=""),
    closed(5),
    {"type": "new_event", "x": 1},
    *stopped("tool_use", stop_sequence=None, container={"id": "c"}),
]
ANTHROPIC_ANSWER = {
    **START["message"],
    "content": BLOCKS,
    "stop_reason": "tool_use",
    "container": {"id": "c"},
}


def test_anthropic_stream() -> None:
    events = told("anthropic", stream(*ANTHROPIC_EVENTS))
    header = events[0].header
    assert (header.id, header.model, header.service_tier) == ("msg_1", "claude-x", "standard")
    assert json.loads(header.extra_json)["novelty"] == 1
    message = folded(events)[0]
    assert (message.content, message.reasoning) == ("Hé yes", "hm, so")
    calls = [(c.id, c.function.name, c.function.arguments_json) for c in message.tool_calls]
    assert calls == [("t1", "look", '{"q": 1.50}'), ("t2", "rest", "{}")]
    (annotation,) = message.annotations
    assert (annotation.start_offset, annotation.end_offset) == (3, 6)
    assert (annotation.url, annotation.title) == ("https://example.com/", "t")
    assert json.loads(message.extra_json) == {"anthropic": {"content": BLOCKS}}
    assert plain(finish(events)) == {
        "finish_reason": "FINISH_REASON_TOOL_CALLS",
        "finish_reason_raw": "tool_use",
        "extra_json": '{"container":{"id":"c"}}',
    }
    usage = events[-1].trailer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (17, 9, 26)
    assert (usage.cached_prompt_tokens, usage.cache_write_tokens) == (5, 2)
    assert usage.reasoning_tokens == 4
    assert json.loads(events[-1].trailer.extra_json) == {"new_event": {"type": "new_event", "x": 1}}


def test_anthropic_whole_says_what_the_stream_says() -> None:
    answer = whole(ANTHROPIC, ANTHROPIC_ANSWER)
    streamed = folded(told("anthropic", stream(*ANTHROPIC_EVENTS)))[0]
    (choice,) = answer.choices
    for call in streamed.tool_calls:  # exactly as the model wrote them, where a stream shows it
        call.function.arguments_json = json.dumps(
            json.loads(call.function.arguments_json), separators=(",", ":")
        )
    streamed.extra_json = choice.message.extra_json
    assert choice.message == streamed
    assert choice.finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    assert json.loads(choice.extra_json) == {"container": {"id": "c"}}
    assert (answer.usage.prompt_tokens, answer.header.id) == (17, "msg_1")


def test_anthropic_says_early_what_is_known_of_the_end() -> None:
    start = {"type": "message_start", "message": {**START["message"], "container": {"id": "c"}}}
    ended = finish(told("anthropic", stream(start, *stopped("end_turn"))))
    assert json.loads(ended.extra_json) == {"container": {"id": "c"}}


@pytest.mark.parametrize("speaker", ["anthropic", "gemini"])
def test_what_is_too_long_to_go_back_is_not_kept(
    speaker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"anthropic": anthropic_answers, "gemini": gemini_answers}[speaker]
    monkeypatch.setattr(module, "_NATIVE_CHARACTERS", 5)
    message = folded(told(speaker, stream(*GOOD[speaker])))[0]
    assert (message.content, message.extra_json) == ("Hé yes", "")


def test_a_foreign_event_among_good_ones_is_a_fault() -> None:
    other = {"object": "chat.completion.chunk", "choices": []}
    for speaker, events in GOOD.items():
        body = stream(*events[:2], other, *events[2:])
        assert fault(speaker, body).fault is Fault.PROTOCOL


def test_what_the_contract_holds_is_not_kept_twice() -> None:
    events = told(
        "anthropic",
        stream(
            START,
            opened(0, type="text", text="a"),
            closed(0),
            opened(1, type="tool_use", id="i", name="f", input={"x": 1}, caller={"type": "direct"}),
            closed(1),
            *stopped("tool_use"),
        ),
    )
    message = folded(events)[0]
    assert message.extra_json == ""
    assert message.tool_calls[0].function.arguments_json == '{"x":1}'
    assert whole(GEMINI, gemini_chunk({"text": "a"}, reason="STOP")).choices[0].message == (
        chat_pb2.ChatMessage(role="assistant", content="a")
    )


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("end_turn", "STOP"),
        ("stop_sequence", "STOP"),
        ("max_tokens", "LENGTH"),
        ("model_context_window_exceeded", "LENGTH"),
        ("tool_use", "TOOL_CALLS"),
        ("refusal", "CONTENT_FILTER"),
        ("pause_turn", "OTHER"),
        ("new", "OTHER"),
    ],
)
def test_anthropic_finish_reasons(raw: str, expected: str) -> None:
    ended = finish(told("anthropic", stream(START, *stopped(raw, stop_details={"x": 1}))))
    wanted = chat_pb2.FinishReason.Value(f"FINISH_REASON_{expected}")
    assert (ended.finish_reason, ended.finish_reason_raw) == (wanted, raw)
    assert json.loads(ended.extra_json) == {"stop_details": {"x": 1}}
    (choice,) = whole(ANTHROPIC, {"content": [], "stop_reason": raw}).choices
    assert (choice.finish_reason, choice.finish_reason_raw) == (wanted, raw)


def gemini_chunk(*parts: Any, reason: str | None = None, index: int = 0, **more: Any) -> Any:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": list(parts)}}
    if index:  # protobuf leaves a zero out
        candidate["index"] = index
    if reason is not None:
        candidate["finishReason"] = reason
    return {"candidates": [candidate], "responseId": "r1", "modelVersion": "gemini-x", **more}


GEMINI_USAGE = {
    "promptTokenCount": 10,
    "toolUsePromptTokenCount": 3,
    "candidatesTokenCount": 4,
    "thoughtsTokenCount": 6,
    "cachedContentTokenCount": 2,
    "totalTokenCount": 23,
}
GEMINI_EVENTS = [
    gemini_chunk({"text": "hm, ", "thought": True}, usageMetadata={"promptTokenCount": 10}),
    gemini_chunk({"text": "so", "thought": True}),
    gemini_chunk({"text": "Hé "}),
    gemini_chunk({"text": "yes"}, novelty=1),
    gemini_chunk(
        {"functionCall": {"name": "look", "args": {"q": 1.5}}, "thoughtSignature": "c2ln"},
        {"functionCall": {"id": "g2", "name": "rest"}},
        reason="STOP",
        usageMetadata=GEMINI_USAGE,
    ),
]


def test_gemini_stream() -> None:
    events = told("gemini", stream(*GEMINI_EVENTS))
    assert (events[0].header.id, events[0].header.model) == ("r1", "gemini-x")
    message = folded(events)[0]
    assert (message.content, message.reasoning) == ("Hé yes", "hm, so")
    calls = [(c.id, c.function.name, c.function.arguments_json) for c in message.tool_calls]
    assert calls == [("tokenwire-call-r1-0-0", "look", '{"q":1.5}'), ("g2", "rest", "{}")]
    assert json.loads(message.extra_json)["gemini"]["parts"] == [
        {"text": "hm, so", "thought": True},
        {"text": "Hé yes"},
        {"functionCall": {"name": "look", "args": {"q": 1.5}}, "thoughtSignature": "c2ln"},
        {"functionCall": {"id": "g2", "name": "rest"}},
    ]
    ended = finish(events)
    assert ended.finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    assert ended.finish_reason_raw == "STOP"
    usage = events[-1].trailer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (13, 10, 23)
    assert (usage.cached_prompt_tokens, usage.reasoning_tokens) == (2, 6)
    assert json.loads(events[-1].trailer.extra_json) == {"novelty": 1}


def test_gemini_candidates_each_end() -> None:
    events = [
        gemini_chunk({"text": "a"}),
        gemini_chunk({"text": "b"}, index=1),
        gemini_chunk(reason="MAX_TOKENS", index=1),
        gemini_chunk({"text": "c"}, reason="STOP"),
    ]
    found = told("gemini", stream(*events), choices=2)
    assert {i: m.content for i, m in folded(found).items()} == {0: "ac", 1: "b"}
    assert fault("gemini", stream(*events[:3]), choices=2).fault is Fault.TRUNCATED
    assert fault("gemini", stream(events[0], events[3]), choices=2).fault is Fault.TRUNCATED
    assert whole_fault(GEMINI, events[0]).fault is Fault.PROTOCOL


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("STOP", "STOP"),
        ("MAX_TOKENS", "LENGTH"),
        ("SAFETY", "CONTENT_FILTER"),
        ("RECITATION", "CONTENT_FILTER"),
        ("SPII", "CONTENT_FILTER"),
        ("LANGUAGE", "OTHER"),
        ("MALFORMED_FUNCTION_CALL", "OTHER"),
    ],
)
def test_gemini_finish_reasons(raw: str, expected: str) -> None:
    chunk = gemini_chunk({"text": "a"}, reason=raw)
    chunk["candidates"][0]["finishMessage"] = "why"
    ended = finish(told("gemini", stream(chunk)))
    assert ended.finish_reason == chat_pb2.FinishReason.Value(f"FINISH_REASON_{expected}")
    assert ended.finish_reason_raw == raw
    assert json.loads(ended.extra_json) == {"finishMessage": "why"}


def test_a_model_that_broke_its_own_format_gave_no_answer() -> None:
    chunk = gemini_chunk(reason="MALFORMED_FUNCTION_CALL")
    assert fault("gemini", stream(chunk)).fault is Fault.OUTPUT_INVALID
    assert whole_fault(GEMINI, chunk).fault is Fault.OUTPUT_INVALID


def test_a_prompt_that_was_blocked_has_no_answer() -> None:
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {}}
    for found in (fault("gemini", stream(blocked)), whole_fault(GEMINI, blocked)):
        assert (found.fault, found.code) == (Fault.CONTENT_FILTERED, "SAFETY")


def test_gemini_logprobs() -> None:
    chunk = gemini_chunk({"text": "a"}, reason="STOP")
    chunk["candidates"][0]["logprobsResult"] = {
        "chosenCandidates": [{"token": "a", "logProbability": -0.5}],
        "topCandidates": [{"candidates": [{"token": "b", "logProbability": -1}, 7]}],
    }
    (token,) = whole(GEMINI, chunk).choices[0].logprobs
    assert (token.token, token.logprob) == ("a", -0.5)
    assert [(top.token, top.logprob) for top in token.top] == [("b", -1.0)]


def dash(content: Any = "", reason: str = "null", index: int | None = None, **more: Any) -> Any:
    usage = more.pop("usage", {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8})
    message = {"role": "assistant", "content": content, **more}
    choice: dict[str, Any] = {"finish_reason": reason, "message": message}
    if index is not None:
        choice["index"] = index
    return {"output": {"choices": [choice]}, "usage": usage, "request_id": "q1"}


def call(arguments: str, name: str = "", call_id: str = "", index: int = 0) -> Any:
    function = {"name": name, "arguments": arguments}
    return [{"index": index, "id": call_id, "type": "function", "function": function}]


DASH_EVENTS = {
    "dashscope": [
        dash(reasoning_content="hm, "),
        dash(reasoning_content="so"),
        dash("Hé "),
        dash([{"text": "yes"}]),
        dash(tool_calls=call('{"q": ', "look", "t1")),
        dash(tool_calls=call("1.50}")),
        dash(reason="tool_calls", usage={"input_tokens": 5, "output_tokens": 9, "x_tokens": 1}),
    ],
    "dashscope cumulative": [
        dash(reasoning_content="hm, "),
        dash(reasoning_content="hm, so"),
        dash("Hé ", reasoning_content="hm, so"),
        dash("Hé yes"),
        dash("Hé yes", tool_calls=call('{"q": ', "look", "t1")),
        dash(
            "Hé yes",
            "tool_calls",
            tool_calls=call('{"q": 1.50}', "look", "t1"),
            usage={"input_tokens": 5, "output_tokens": 9, "x_tokens": 1},
        ),
    ],
}


@pytest.mark.parametrize("speaker", DASH_EVENTS)
def test_dashscope_stream(speaker: str) -> None:
    body = stream(*DASH_EVENTS[speaker])
    events = told(speaker, body.replace(b"event: message", b"id:1\nevent:result\n:HTTP_STATUS/200"))
    assert events[0].header.id == "q1"
    contents = [e.delta.content for e in events if e.WhichOneof("event") == "delta"]
    assert [content for content in contents if content] == ["Hé ", "yes"]
    message = folded(events)[0]
    assert (message.content, message.reasoning) == ("Hé yes", "hm, so")
    (made,) = message.tool_calls
    assert (made.id, made.function.name, made.function.arguments_json) == (
        "t1",
        "look",
        '{"q": 1.50}',
    )
    assert finish(events).finish_reason_raw == "tool_calls"
    usage = events[-1].trailer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 9, 14)
    assert json.loads(usage.extra_json) == {"x_tokens": 1}


def test_dashscope_whole_and_as_text() -> None:
    logged = {"content": [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}]}
    answer = dash("a", "stop", reasoning_content="r", novelty=1)
    answer["output"]["choices"][0]["logprobs"] = logged
    answer["output"]["search_info"] = {"x": 1}
    response = whole(DASHSCOPE, answer)
    (choice,) = response.choices
    assert (choice.message.content, choice.message.reasoning) == ("a", "r")
    assert json.loads(choice.message.extra_json) == {"novelty": 1}
    assert choice.logprobs[0].raw_bytes == b"a"
    assert json.loads(response.header.extra_json) == {"search_info": {"x": 1}}
    text = {"output": {"text": "b", "finish_reason": "stop"}, "usage": {"input_tokens": 1}}
    assert whole(DASHSCOPE, text).choices[0].message.content == "b"
    assert folded(told("dashscope", stream(text)))[0].content == "b"
    assert whole_fault(DASHSCOPE, dash("a")).fault is Fault.PROTOCOL


def test_a_cumulative_answer_that_takes_back_what_it_said_is_a_fault() -> None:
    for field in ({"content": "ab"}, {"reasoning_content": "ab"}):
        other = {name: text[::-1] for name, text in field.items()}
        body = stream(dash(**field), dash(**other), dash(reason="stop"))
        assert fault("dashscope cumulative", body).fault is Fault.PROTOCOL
    shorter = stream(dash("abc"), dash("ab"), dash("abc", "stop"))
    assert fault("dashscope cumulative", shorter).fault is Fault.PROTOCOL


def test_a_server_that_does_not_heed_incremental_output_is_found_out() -> None:
    text = "This text is long enough to be sure of it."
    body = stream(dash(text), dash(text + " More."), dash(text + " More. End.", "stop"))
    assert fault("dashscope", body).fault is Fault.PROTOCOL
    short = stream(dash("ha"), dash("haha"), dash("haha", "stop"))
    assert folded(told("dashscope", short))[0].content == "hahahahaha"


def test_dashscope_choices_count_their_own_tokens() -> None:
    def used(output: int) -> Any:
        return {"input_tokens": 5, "output_tokens": output, "total_tokens": 5 + output}

    events = [
        dash("a", index=0, usage=used(1)),
        dash("b", index=1, usage=used(1)),
        dash("c", "stop", index=0, usage=used(2)),
        dash("d", "length", index=1, usage=used(3)),
    ]
    found = told("dashscope", stream(*events), choices=2)
    assert {i: m.content for i, m in folded(found).items()} == {0: "ac", 1: "bd"}
    assert found[-1].trailer.usage.completion_tokens == 5
    assert found[-1].trailer.usage.total_tokens == 10
    assert fault("dashscope", stream(*events[:3]), choices=2).fault is Fault.TRUNCATED


# --- what is no answer -------------------------------------------------------------------

GOOD: dict[str, list[Any]] = {
    "anthropic": ANTHROPIC_EVENTS,
    "gemini": GEMINI_EVENTS,
    **DASH_EVENTS,
}
ERRORS: dict[str, list[tuple[Any, Fault]]] = {
    "anthropic": [
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "x"}},
            Fault.OVERLOADED,
        ),
        ({"type": "error", "error": {"type": "rate_limit_error"}}, Fault.RATE_LIMITED),
        ({"type": "error", "error": {"type": "api_error"}}, Fault.SERVER_ERROR),
        ({"type": "error", "error": {"type": "timeout_error"}}, Fault.SERVER_ERROR),
        ({"type": "error", "error": {"type": "invalid_request_error"}}, Fault.REFUSED),
        (
            {
                "type": "error",
                "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"},
            },
            Fault.CONTEXT_TOO_LONG,
        ),
        ({"type": "error", "error": {"type": "authentication_error"}}, Fault.KEY_REJECTED),
        ({"type": "error", "error": {"type": "billing_error"}}, Fault.QUOTA_EXHAUSTED),
        ({"type": "error"}, Fault.SERVER_ERROR),
    ],
    "gemini": [
        ({"error": {"code": 503, "message": "x", "status": "UNAVAILABLE"}}, Fault.OVERLOADED),
        ({"error": {"code": 429, "message": "x", "status": "R"}}, Fault.RATE_LIMITED),
        ({"error": {"code": 500, "status": "INTERNAL"}}, Fault.SERVER_ERROR),
        ({"error": {"code": 400, "message": "API key not valid."}}, Fault.KEY_REJECTED),
    ],
    "dashscope": [
        ({"code": "Throttling.RateQuota", "message": "x"}, Fault.RATE_LIMITED),
        ({"code": "Throttling", "message": "x"}, Fault.RATE_LIMITED),
        ({"code": "Arrearage", "message": "x"}, Fault.QUOTA_EXHAUSTED),
        ({"code": "InvalidApiKey", "message": "x", "request_id": "r"}, Fault.KEY_REJECTED),
        ({"code": "InvalidParameter", "message": "x"}, Fault.REFUSED),
        (
            {"code": "InvalidParameter", "message": "Range of input length should be [1, 30720]"},
            Fault.CONTEXT_TOO_LONG,
        ),
        ({"code": "DataInspectionFailed", "message": "x"}, Fault.CONTENT_FILTERED),
        ({"code": "ServiceUnavailable", "message": "x"}, Fault.OVERLOADED),
        ({"code": "InternalError.Algo", "message": "x"}, Fault.SERVER_ERROR),
        ({"code": "InternalError", "output": {"choices": []}}, Fault.SERVER_ERROR),
    ],
}
ERRORS["dashscope cumulative"] = ERRORS["dashscope"]


@pytest.mark.parametrize(
    ("speaker", "error", "expected"),
    [(speaker, error, expected) for speaker in ERRORS for error, expected in ERRORS[speaker]],
)
def test_an_error_is_itself_and_no_end(speaker: str, error: Any, expected: Fault) -> None:
    good = GOOD[speaker]
    assert fault(speaker, stream(error)).fault is expected
    assert fault(speaker, stream(*good[:3], error)).fault is expected
    dialect = SPEAKERS[speaker]().dialect
    assert whole_fault(dialect, error).fault is expected


@ALL
def test_a_stream_that_was_cut_is_never_an_answer(speaker: str) -> None:
    good = GOOD[speaker]
    for end in range(len(good)):
        found = fault(speaker, stream(*good[:end]))
        assert found.fault in (Fault.TRUNCATED, Fault.PROTOCOL)
        assert found.fault is (Fault.TRUNCATED if end else Fault.PROTOCOL)


@ALL
def test_a_stream_of_another_language_is_never_an_answer(speaker: str) -> None:
    openai = {
        "id": "c",
        "object": "chat.completion.chunk",
        "choices": [{"delta": {"content": "x"}}],
    }
    others = [stream(openai), b"data: [DONE]\n\n", stream(openai) + b"data: [DONE]\n\n", b""]
    others += [stream(*GOOD[other]) for other in GOOD if other.split()[0] != speaker.split()[0]]
    for body in others:
        assert fault(speaker, body).fault is Fault.PROTOCOL
    dialect = SPEAKERS[speaker]().dialect
    assert whole_fault(dialect, openai).fault is Fault.PROTOCOL
    assert whole_fault(dialect, b"[]").fault is Fault.PROTOCOL
    assert whole_fault(dialect, b"<html>").fault is Fault.PROTOCOL
    assert whole_fault(dialect, {}).fault is Fault.PROTOCOL


@pytest.mark.parametrize(
    "events",
    [
        [START, START],
        [START, {"type": "message_stop"}],
        [START, *stopped(None)],
        [START, {"x": 1}],
        [START, opened(1, type="text"), opened(0, type="text")],
        [START, {"type": "content_block_start", "index": 0}],
        [START, grown(0, type="text_delta", text="x")],
        [START, closed(0)],
        [START, opened(0, type="text"), closed(0), grown(0, type="text_delta", text="x")],
        [START, opened(0, type="tool_use"), grown(0, type="text_delta", text="x")],
        [opened(0, type="text", text="x")],
        [{"type": "message_start"}],
    ],
)
def test_anthropic_events_out_of_their_order_are_a_fault(events: list[Any]) -> None:
    assert fault("anthropic", stream(*events)).fault is Fault.PROTOCOL


def test_nothing_follows_message_stop() -> None:
    body = stream(*ANTHROPIC_EVENTS, {"type": "error", "error": {}}, opened(9, type="text"))
    assert told("anthropic", body) == told("anthropic", stream(*ANTHROPIC_EVENTS))


@pytest.mark.parametrize(
    ("speaker", "answer"),
    [
        ("anthropic", {"content": [], "stop_reason": None}),
        ("anthropic", {"content": [7], "stop_reason": "end_turn"}),
        ("gemini", {"candidates": []}),
        ("gemini", {"candidates": 7}),
        ("gemini", {"candidates": [{"content": 7, "finishReason": "STOP"}]}),
        ("gemini", {"candidates": [{"content": {"parts": [7]}, "finishReason": "STOP"}]}),
        ("gemini", gemini_chunk({"text": "a"}, reason="FINISH_REASON_UNSPECIFIED")),
        ("gemini", gemini_chunk({"functionCall": {"args": {}}}, reason="STOP")),
        ("dashscope", {"output": {}}),
        ("dashscope", {"output": {"choices": [{"message": 7, "finish_reason": "stop"}]}}),
        ("dashscope", dash(7, "stop")),
        ("dashscope", dash(tool_calls=[7], reason="stop")),
        ("dashscope", dash(tool_calls=call("", "f", "i", index=3), reason="stop")),
        ("dashscope", dash("a", reason="")),
    ],
)
def test_a_whole_answer_that_is_none_is_a_fault(speaker: str, answer: Any) -> None:
    assert whole_fault(SPEAKERS[speaker]().dialect, answer).fault is Fault.PROTOCOL


# --- hostile bytes -----------------------------------------------------------------------


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_half_surrogates_find_each_other(speaker: str) -> None:
    halves = ("a\ud83d", "\ude00b\ud83d")
    if speaker == "anthropic":
        texts = [grown(0, type="text_delta", text=half) for half in halves]
        body = stream(START, opened(0, type="text", text=""), *texts, *stopped("end_turn"))
    elif speaker == "gemini":
        body = stream(
            gemini_chunk({"text": halves[0]}), gemini_chunk({"text": halves[1]}, reason="STOP")
        )
    elif speaker == "dashscope":
        body = stream(dash(halves[0]), dash(halves[1], "stop"))
    else:
        body = stream(dash(halves[0]), dash("".join(halves), "stop"))
    assert folded(told(speaker, body))[0].content == "a😀b\ufffd"


@pytest.mark.parametrize("dialect", [ANTHROPIC, GEMINI, DASHSCOPE])
def test_numbers_of_any_size_and_odd_values_survive(dialect: Dialect) -> None:
    odd = {"huge": 10**400, "float": 1e308, "half": "\ud83d", "deep": [[[[1]]]]}
    answers = {
        ANTHROPIC: {
            "content": [{"type": "thinking", "thinking": "\ud83d", "signature": "s", **odd}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 10**400, "output_tokens": -1, "x": 10**400},
        },
        GEMINI: gemini_chunk(
            {"text": "\ud83d", "thought": True, **odd}, reason="STOP", usageMetadata={"x": 10**400}
        ),
        DASHSCOPE: dash("\ud83d", "stop", usage={"input_tokens": 10**400}, **odd),
    }
    response = whole(dialect, answers[dialect])
    assert "\ufffd" in str(response.choices[0].message) or "\\357\\277\\275" in str(response)
    assert response.usage.prompt_tokens == 0
    extra = response.choices[0].message.extra_json
    assert json_object(extra, "extra_json")  # callers may send it back


@pytest.mark.parametrize("dialect", [ANTHROPIC, GEMINI, DASHSCOPE])
def test_deep_nesting_is_a_fault_and_no_crash(dialect: Dialect) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    for body in (deep, b'{"content":%s}' % deep, b'{"output":%s,"candidates":%s}' % (deep, deep)):
        assert whole_fault(dialect, body).fault is Fault.PROTOCOL
    assert whole_fault(dialect, b'{"content": NaN, "candidates": NaN}').fault is Fault.PROTOCOL


@ALL
@given(data=st.data())
def test_however_a_stream_is_cut_it_says_the_same(speaker: str, data: st.DataObject) -> None:
    body = stream(*GOOD[speaker])
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=12)))
    ends = [0, *cuts, len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(ends)]
    assert decoded(SPEAKERS[speaker](), pieces) == decoded(SPEAKERS[speaker](), [body])


_NAMES = """
    type index delta text content content_block message candidates parts output choices
    finish_reason finishReason tool_calls function functionCall args usage usageMetadata
    stop_reason STOP content_block_start content_block_delta message_start message_delta
    message_stop text_delta input_json_delta partial_json citation citations error logprobs
    logprobsResult
"""
_WORDS = st.sampled_from(_NAMES.split())
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _WORDS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS, inner, max_size=5),
    max_leaves=15,
)


@ALL
@given(data=st.data())
def test_any_json_ends_in_events_or_a_fault(speaker: str, data: st.DataObject) -> None:
    good = GOOD[speaker]
    place = data.draw(st.integers(0, len(good) - 1))
    event = data.draw(_JSON)
    if data.draw(st.booleans()) and isinstance(event, dict):
        event = {**good[place], **event}
    body = [stream(*good[:place]), b"data: %s\n\n" % json.dumps(event).encode(), stream(*good)]
    with contextlib.suppress(UpstreamFault):
        decoded(SPEAKERS[speaker](), body)
    encoded = SPEAKERS[speaker]()
    for answer in (event, {**good[-1], **(event if isinstance(event, dict) else {})}):
        with contextlib.suppress(UpstreamFault):
            encoded.dialect.decode(encoded, json.dumps(answer).encode())
        with contextlib.suppress(UpstreamFault):
            encoded.dialect.decode_models(json.dumps(answer).encode())


@ALL
@given(body=st.binary(max_size=200))
def test_any_bytes_end_in_a_fault(speaker: str, body: bytes) -> None:
    encoded = SPEAKERS[speaker]()
    with pytest.raises(UpstreamFault):
        decoded(encoded, [body])
    with pytest.raises(UpstreamFault):
        encoded.dialect.decode(encoded, body)
    assert isinstance(encoded.dialect.classify(400, {}, body), UpstreamFault)


# --- models ------------------------------------------------------------------------------


def models(dialect: Dialect, answer: Any) -> list[tuple[str, int, int]]:
    found = dialect.decode_models(json.dumps(answer).encode())
    assert all(json.loads(model.extra_json) for model in found)
    return [(m.name, m.context_window_tokens, m.max_completion_tokens) for m in found]


def test_model_lists() -> None:
    claude = {"id": "claude-x", "display_name": "X", "max_input_tokens": 9, "max_tokens": 3}
    assert models(ANTHROPIC, {"data": [claude, {"id": 7}, 7]}) == [("claude-x", 9, 3)]
    gemini = [
        {"name": "models/g", "inputTokenLimit": 9, "outputTokenLimit": 3},
        {"name": "models/e", "supportedGenerationMethods": ["embedContent"]},
        {"name": "tunedModels/t", "supportedGenerationMethods": ["generateContent"]},
    ]
    assert models(GEMINI, {"models": gemini}) == [("g", 9, 3), ("tunedModels/t", 0, 0)]
    entries = {"models": [{"model": "qwen-plus", "name": "Qwen"}, {"name": "q"}, {}]}
    assert models(DASHSCOPE, {"output": entries}) == [("qwen-plus", 0, 0), ("q", 0, 0)]
    for dialect in (ANTHROPIC, GEMINI, DASHSCOPE):
        with pytest.raises(UpstreamFault):
            dialect.decode_models(b"{}")
