"""Answers as real providers send them: read whole, in any cutting, or refused clearly."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.errors import Fault, UpstreamFault
from tokenwire_service.upstream import openai_answers, sse
from tokenwire_service.upstream.openai_answers import OpenAIStream

Event = chat_service_pb2.StreamChatResponse
Finish = chat_pb2.FinishReason.Name
NO_LIMIT = 1 << 30


def bytewise(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


def decode(chunks: Iterable[bytes]) -> list[Event]:
    """All events of one stream. Raises UpstreamFault."""
    framing, decoder = sse.Decoder(NO_LIMIT), OpenAIStream()
    out: list[Event] = []
    for chunk in chunks:
        for event in framing.feed(chunk):
            out += decoder.feed(event)
    return out + decoder.finish(framing.error_field)


def read(stream: bytes, chunks: Sequence[bytes] = ()) -> dict[str, Any]:
    """What a caller has in the end; only what is there."""
    seen: dict[str, Any] = {}
    calls: dict[tuple[int, int], list[Any]] = {}
    events = decode(chunks or [stream])
    check_order(events)
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "header":
            seen["header"] = event.header
        elif kind == "trailer":
            seen["trailer"] = event.trailer
        elif kind == "finish":
            end = event.finish
            name = Finish(end.finish_reason).removeprefix("FINISH_REASON_")
            seen.setdefault("finish", {})[end.choice_index] = (name, end.finish_reason_raw)
            if end.extra_json:
                seen.setdefault("finish_extra", {})[end.choice_index] = json.loads(end.extra_json)
        else:
            delta = event.delta
            assert delta.ListFields(), "an empty delta says nothing"
            for name in ("content", "reasoning", "refusal"):
                if text := getattr(delta, name):
                    texts = seen.setdefault(name, {})
                    texts[delta.choice_index] = texts.get(delta.choice_index, "") + text
            for part in delta.tool_calls:
                assert part.id or part.name or part.arguments, "nor does an empty part"
                call = calls.setdefault((delta.choice_index, part.index), ["", "", "", False])
                # Each of these is said once; arguments are appended.
                assert not (part.id and call[0])
                assert not (part.name and call[1])
                call[:] = [
                    call[0] or part.id,
                    call[1] or part.name,
                    call[2] + part.arguments,
                    call[3] or part.custom,
                ]
            if delta.extra_json:
                seen.setdefault("extra", []).append(json.loads(delta.extra_json))
            seen.setdefault("logprobs", []).extend(delta.logprobs)
            seen.setdefault("annotations", []).extend(delta.annotations)
    seen["calls"] = [tuple(call) for _, call in sorted(calls.items())]
    return {name: value for name, value in seen.items() if value}


def check_order(events: Sequence[Event]) -> None:
    kinds = [event.WhichOneof("event") for event in events]
    begun = [kind for kind, _ in itertools.groupby(kinds)]
    assert begun in (
        ["header", "delta", "finish", "trailer"],
        ["header", "finish", "trailer"],
    )
    assert kinds.count("header") == kinds.count("trailer") == 1
    ended = [event.finish.choice_index for event in events if event.HasField("finish")]
    assert ended == sorted(set(ended)), "one finish per choice, by index"


def fault_of(act: Callable[[], object]) -> UpstreamFault:
    with pytest.raises(UpstreamFault) as caught:
        act()
    return caught.value


# --- making streams ---------------------------------------------------------------------


def data(payload: Any, space: str = " ", end: str = "\n\n") -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)
    return f"data:{space}{text}{end}".encode()


def chunk(*choices: Any, **fields: Any) -> bytes:
    made = {"id": "c1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"}
    return data({**made, "choices": list(choices), **fields})


def choice(delta: Any = None, reason: Any = None, index: Any = 0, **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta or {}, "finish_reason": reason, **fields}


def text(content: Any, index: int = 0) -> bytes:
    return chunk(choice({"content": content}, index=index))


def calling(*parts: Any) -> bytes:
    return chunk(choice({"tool_calls": list(parts)}))


def call(index: Any, call_id: Any, name: Any, arguments: Any, **fields: Any) -> dict[str, Any]:
    made = {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}
    return {k: v for k, v in {**made, **fields}.items() if v is not ...}


DONE = data("[DONE]")
STOP = chunk(choice(reason="stop"))
END = STOP + DONE
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
USED = (5, 2, 7)
A = text("a")

# Name -> (stream, what a caller has in the end; `usage` short for the trailer's).
QUIRKS: dict[str, tuple[bytes, dict[str, Any]]] = {
    # --- framing
    "comments and blank lines": (
        b": OPENROUTER PROCESSING\n\n" + A + b"\n\n: keep-alive\n\n\n" + END,
        {"content": {0: "a"}},
    ),
    "CR": ((A + END).replace(b"\n", b"\r"), {"content": {0: "a"}}),
    "CRLF": ((A + END).replace(b"\n", b"\r\n"), {"content": {0: "a"}}),
    "mixed line ends": (A.replace(b"\n\n", b"\r\n\n") + END, {"content": {0: "a"}}),
    "BOM": (b"\xef\xbb\xbf" + A + END, {"content": {0: "a"}}),
    "no space after the colon": ((A + END).replace(b"data: ", b"data:"), {"content": {0: "a"}}),
    "JSON over several lines of data": (
        b'data: {"choices":\ndata: [{"index":0,"delta":\ndata: {"content":"a"}}]}\n\n' + END,
        {"content": {0: "a"}},
    ),
    "[DONE] with spaces": (A + STOP + b"data:   [DONE]  \n\n", {"content": {0: "a"}}),
    "unterminated [DONE] after a finish": (A + STOP + b"data: [DONE]", {"content": {0: "a"}}),
    "empty data": (b"data:\n\ndata: \n\n" + A + END, {"content": {0: "a"}}),
    "a line over 200 KiB": (text("x" * 300_000) + END, {"content": {0: "x" * 300_000}}),
    "a character split over chunks": (text("é😀") + END, {"content": {0: "é😀"}}),
    "whatever comes after [DONE]": (A + END + b"data: <html>\n\n", {"content": {0: "a"}}),
    # --- choices and deltas
    "empty choices first (Azure) and last": (
        chunk(prompt_filter_results=[]) + A + STOP + chunk(usage=USAGE) + DONE,
        {"content": {0: "a"}, "usage": USED},
    ),
    "choices null beside usage": (
        A + STOP + data({"choices": None, "usage": USAGE}) + DONE,
        {"content": {0: "a"}, "usage": USED},
    ),
    "no choices beside usage": (
        A + STOP + data({"usage": USAGE}) + DONE,
        {"content": {0: "a"}, "usage": USED},
    ),
    "no delta": (chunk({"index": 0}) + A + END, {"content": {0: "a"}}),
    "delta null": (chunk({"index": 0, "delta": None}) + A + END, {"content": {0: "a"}}),
    "null content": (text(None) + A + END, {"content": {0: "a"}}),
    "role only": (chunk(choice({"role": "assistant", "content": ""})) + END, {}),
    "content as a list (Mistral)": (
        text([{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]) + END,
        {"content": {0: "abc"}},
    ),
    "thinking within content (Mistral)": (
        text([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}])
        + text([{"type": "text", "text": "a"}])
        + END,
        {"content": {0: "a"}, "reasoning": {0: "hm"}},
    ),
    "message beside delta (Writer)": (
        chunk(choice({"content": "a"}, message={"content": "a"})) + END,
        {"content": {0: "a"}},
    ),
    "message instead of delta": (
        chunk({"index": 0, "message": {"content": "a"}}) + END,
        {"content": {0: "a"}},
    ),
    "no index": (chunk({"delta": {"content": "a"}}) + END, {"content": {0: "a"}}),
    "an index no choice can have is its place": (
        chunk(*(choice({"content": "ab"[i]}, index=odd) for i, odd in enumerate((-1, 10**400))))
        + chunk(choice({"content": "c"}, index=True), choice({"content": "d"}, index=None))
        + DONE,
        {"content": {0: "ac", 1: "bd"}, "finish": {0: ("OTHER", ""), 1: ("OTHER", "")}},
    ),
    "several choices": (
        chunk(choice({"content": "a"}, index=0), choice({"content": "b"}, index=1))
        + text("c", 1)
        + text("d", 0)
        + chunk(choice(reason="stop", index=1), choice(reason="length", index=0))
        + DONE,
        {
            "content": {0: "ad", 1: "bc"},
            "finish": {0: ("LENGTH", "length"), 1: ("STOP", "stop")},
        },
    ),
    "one choice never finished": (
        text("a", 0) + text("b", 1) + chunk(choice(reason="stop", index=0)) + DONE,
        {"content": {0: "a", 1: "b"}, "finish": {0: ("STOP", "stop"), 1: ("OTHER", "")}},
    ),
    "reasoning_content": (
        chunk(choice({"reasoning_content": "hm", "content": None})) + A + END,
        {"content": {0: "a"}, "reasoning": {0: "hm"}},
    ),
    "reasoning": (
        chunk(choice({"reasoning": "hm"})) + A + END,
        {"content": {0: "a"}, "reasoning": {0: "hm"}},
    ),
    "refusal": (chunk(choice({"refusal": "no"})) + END, {"refusal": {0: "no"}}),
    # --- tool calls
    "a call in pieces": (
        calling(call(0, "i", "f", ""))
        + calling(call(0, ..., ..., "{", function={"arguments": "{"}))
        + calling({"index": 0, "function": {"arguments": "}"}})
        + chunk(choice(reason="tool_calls"))
        + DONE,
        {"calls": [("i", "f", "{}", False)], "finish": {0: ("TOOL_CALLS", "tool_calls")}},
    ),
    "no index (Mistral)": (
        calling(call(..., "i", "f", "{}"), call(..., "j", "g", "[]")) + END,
        {"calls": [("i", "f", "{}", False), ("j", "g", "[]", False)]},
    ),
    "index null": (calling(call(None, "i", "f", "{}")) + END, {"calls": [("i", "f", "{}", False)]}),
    "no id (Google)": (calling(call(0, ..., "f", "{}")) + END, {"calls": [("", "f", "{}", False)]}),
    "neither index nor id: of the last": (
        calling(call(..., "i", "f", "{")) + calling({"function": {"arguments": "}"}}) + END,
        {"calls": [("i", "f", "{}", False)]},
    ),
    "index first, then the id alone": (
        calling(call(0, "i", "f", "{"), call(1, "j", "g", "["))
        + calling({"id": "i", "function": {"arguments": "}"}})
        + calling({"id": "j", "function": {"arguments": "]"}})
        + END,
        {"calls": [("i", "f", "{}", False), ("j", "g", "[]", False)]},
    ),
    "index from 1": (calling(call(1, "i", "f", "{}")) + END, {"calls": [("i", "f", "{}", False)]}),
    "index 0 for every call (Google)": (
        calling(call(0, "i", "f", "{}"), call(0, "j", "f", "[]")) + END,
        {"calls": [("i", "f", "{}", False), ("j", "f", "[]", False)]},
    ),
    "index 0 for every call, one after the other": (
        calling(call(0, "i", "f", "{"))
        + calling(call(0, ..., ..., ..., function={"arguments": "}"}))
        + calling(call(0, "j", "g", "["))
        + calling(call(0, ..., ..., ..., function={"arguments": "]"}))
        + END,
        {"calls": [("i", "f", "{}", False), ("j", "g", "[]", False)]},
    ),
    "calls side by side with neither index nor id": (
        calling(call(..., ..., "f", "{}"), call(..., ..., "f", "[]")) + END,
        {"calls": [("", "f", "{}", False), ("", "f", "[]", False)]},
    ),
    "neither index nor id: of the last of several": (
        calling(call(0, "i", "f", "{}"), call(1, "j", "g", "["))
        + calling({"function": {"arguments": "]"}})
        + END,
        {"calls": [("i", "f", "{}", False), ("j", "g", "[]", False)]},
    ),
    "neither index nor id: another name begins another call": (
        calling(call(..., ..., "f", "{"))
        + calling(call(..., ..., "f", "}"))
        + calling(call(..., ..., "g", "[]"))
        + END,
        {"calls": [("", "f", "{}", False), ("", "g", "[]", False)]},
    ),
    "another id in every part of one call (old vLLM)": (
        calling(call(0, "i", "f", "{"))
        + calling({"index": 0, "id": "j", "function": {"arguments": "}"}})
        + END,
        {"calls": [("i", "f", "{}", False)]},
    ),
    "id and name in every chunk": (
        calling(call(0, "i", "f", "{")) + calling(call(0, "i", "f", "}")) + END,
        {"calls": [("i", "f", "{}", False)]},
    ),
    "the first id and name that are not empty": (
        calling(call(0, "", None, "{")) + calling(call(0, "i", "f", "}")) + END,
        {"calls": [("i", "f", "{}", False)]},
    ),
    "arguments null": (
        calling(call(0, "i", "f", None)) + calling(call(0, None, None, "{}")) + END,
        {"calls": [("i", "f", "{}", False)]},
    ),
    "arguments as an object": (
        calling(call(0, "i", "f", {"q": 1})) + END,
        {"calls": [("i", "f", '{"q":1}', False)]},
    ),
    "arguments as an empty object": (
        calling(call(0, "i", "f", {})) + END,
        {"calls": [("i", "f", "{}", False)]},
    ),
    "no function at all": (
        calling({"index": 0, "id": "i"}, {"index": 0, "function": None}) + END,
        {"calls": [("i", "", "", False)]},
    ),
    "a custom call": (
        calling({"index": 0, "id": "i", "type": "custom", "custom": {"name": "c", "input": "x"}})
        + calling({"index": 0, "custom": {"input": "y"}})
        + END,
        {"calls": [("i", "c", "xy", True)]},
    ),
    "a custom call whose name comes late": (
        calling({"index": 0, "type": "custom", "custom": {"input": "x"}})
        + calling({"index": 0, "id": "i", "custom": {"name": "c", "input": "y"}})
        + END,
        {"calls": [("i", "c", "xy", True)]},
    ),
    "tool calls with finish_reason stop": (
        calling(call(0, "i", "f", "{}")) + END,
        {"calls": [("i", "f", "{}", False)], "finish": {0: ("STOP", "stop")}},
    ),
    # --- usage and ends
    "usage in every chunk: the last wins": (
        chunk(choice({"content": "a"}), usage={"completion_tokens": 1, "total_tokens": 6})
        + chunk(choice({"content": "b"}), usage=USAGE)
        + END,
        {"content": {0: "ab"}, "usage": USED},
    ),
    "usage null and empty after the last": (
        A + chunk(choice(reason="stop"), usage=USAGE) + chunk(usage=None) + chunk(usage={}) + DONE,
        {"content": {0: "a"}, "usage": USED},
    ),
    "usage beside choices that are not empty (LiteLLM)": (
        A + STOP + chunk(choice(), usage=USAGE) + DONE,
        {"content": {0: "a"}, "usage": USED},
    ),
    "finish_reason twice": (
        A + STOP + chunk(choice(reason="length")) + DONE,
        {"content": {0: "a"}, "finish": {0: ("LENGTH", "length")}},
    ),
    "finish_reason, then null and empty ones": (
        A + STOP + chunk(choice(reason=None)) + chunk(choice(reason="")) + DONE,
        {"content": {0: "a"}, "finish": {0: ("STOP", "stop")}},
    ),
    "finish_reason eos": (
        A + chunk(choice(reason="eos")) + DONE,
        {"content": {0: "a"}, "finish": {0: ("STOP", "eos")}},
    ),
    "finish_reason nobody knows": (
        A + chunk(choice(reason="moon")) + DONE,
        {"content": {0: "a"}, "finish": {0: ("OTHER", "moon")}},
    ),
    "finish_reason empty and [DONE]": (
        A + chunk(choice(reason="")) + DONE,
        {"content": {0: "a"}, "finish": {0: ("OTHER", "")}},
    ),
    "finish_reason beside the last text": (
        chunk(choice({"content": "a"}, reason="stop")) + DONE,
        {"content": {0: "a"}, "finish": {0: ("STOP", "stop")}},
    ),
    "text after the finish_reason": (STOP + A + DONE, {"content": {0: "a"}}),
    "finish_details instead of finish_reason": (
        A + chunk({"index": 0, "delta": {}, "finish_details": {"type": "max_tokens"}}),
        {"content": {0: "a"}, "finish": {0: ("LENGTH", "")}},
    ),
    "another id in every chunk": (
        b"".join(chunk(choice({"content": "x"}), id=f"id-{i}") for i in range(226)) + END,
        {"content": {0: "x" * 226}, "header.id": "id-0"},
    ),
    "no [DONE] (Perplexity, Writer)": (A + STOP, {"content": {0: "a"}}),
    "no finish_reason (Snowflake)": (
        A + DONE,
        {"content": {0: "a"}, "finish": {0: ("OTHER", "")}},
    ),
    "nothing but an end": (END, {"finish": {0: ("STOP", "stop")}}),
    # --- text
    "surrogates split over chunks": (
        data('{"choices":[{"index":0,"delta":{"content":"a\\ud83d"}}]}')
        + data('{"choices":[{"index":0,"delta":{"content":"\\ude00b"}}]}')
        + END,
        {"content": {0: "a😀b"}},
    ),
    "surrogates split over three chunks": (
        data('{"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}')
        + text("")
        + chunk(choice({"role": "assistant"}))
        + data('{"choices":[{"index":0,"delta":{"content":"\\ude00"}}]}')
        + END,
        {"content": {0: "😀"}},
    ),
    "surrogates of two choices at once": (
        data('{"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}')
        + data('{"choices":[{"index":1,"delta":{"content":"\\ud83e"}}]}')
        + data('{"choices":[{"index":0,"delta":{"content":"\\ude00"}}]}')
        + data('{"choices":[{"index":1,"delta":{"content":"\\udd16"}}]}')
        + DONE,
        {"content": {0: "😀", 1: "🤖"}},
    ),
    "surrogates split in reasoning and in arguments": (
        data('{"choices":[{"index":0,"delta":{"reasoning":"\\ud83d","content":"x"}}]}')
        + data('{"choices":[{"index":0,"delta":{"reasoning":"\\ude00"}}]}')
        + data(
            '{"choices":[{"index":0,"delta":{"tool_calls":'
            '[{"index":0,"id":"i","function":{"name":"f","arguments":"\\ud83d"}}]}}]}'
        )
        + data(
            '{"choices":[{"index":0,"delta":{"tool_calls":'
            '[{"index":0,"function":{"arguments":"\\ude00"}}]}}]}'
        )
        + END,
        {"content": {0: "x"}, "reasoning": {0: "😀"}, "calls": [("i", "f", "😀", False)]},
    ),
    "a high half and no low one": (
        data('{"choices":[{"index":0,"delta":{"content":"a\\ud83d"}}]}') + text("b") + END,
        {"content": {0: "a\ufffdb"}},
    ),
    "a high half at the end": (
        data('{"choices":[{"index":0,"delta":{"content":"a\\ud83d"}}]}') + END,
        {"content": {0: "a\ufffd"}},
    ),
    "a high half at the end of arguments, and nothing else": (
        data(
            '{"choices":[{"index":0,"delta":{"tool_calls":'
            '[{"index":0,"function":{"arguments":"\\ud83d"}}]}}]}'
        )
        + END,
        {"calls": [("", "", "\ufffd", False)]},
    ),
    "a low half alone": (
        data('{"choices":[{"index":0,"delta":{"content":"\\ude00a"}}]}') + END,
        {"content": {0: "\ufffda"}},
    ),
    "halves where a value of another type stands": (
        data('{"choices":[{"index":0,"delta":{"content":"a","x":"\\ud83d"}}]}')
        + data('{"choices":[{"index":0,"delta":{"reasoning":{"a":1},"refusal":[1]}}]}')
        + END,
        {"content": {0: "a"}},
    ),
    "bytes that are no UTF-8": (
        b'data: {"choices":[{"index":0,"delta":{"content":"a\xff"}}]}\n\n' + END,
        {"content": {0: "a\ufffd"}},
    ),
    "a number larger than any float": (
        data('{"choices":[{"index":0,"delta":{"content":"a"}}],"created":1e400,"x":-1e400}') + END,
        {"content": {0: "a"}},
    ),
    "integers of 400 digits": (
        data(
            '{"created":%s,"usage":{"prompt_tokens":%s},"choices":[{"index":0,"delta":'
            '{"content":"a"},"logprobs":{"content":[{"token":"a","logprob":%s}]}}]}'
            % (("9" * 400,) * 3)
        )
        + END,
        {"content": {0: "a"}},
    ),
}


@pytest.mark.parametrize("name", QUIRKS)
def test_a_stream_is_survived(name: str) -> None:
    stream, expected = QUIRKS[name]
    got = read(stream)
    for part, value in expected.items():
        if part == "usage":
            usage = got["trailer"].usage
            value_got: Any = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
        elif part == "header.id":
            value_got = got["header"].id
        else:
            value_got = got.get(part)
        assert value_got == value
    for part in ("content", "reasoning", "refusal", "calls"):
        assert (part in got) == (part in expected), part
    if len(stream) < 10_000:
        assert read(stream, bytewise(stream)) == got


# Name -> what stands in a stream.
NOT_THE_PROTOCOL: dict[str, bytes] = {
    "HTML": data("<html></html>"),
    "NaN": data('{"choices":[],"x":NaN}'),
    "Infinity": data('{"choices":[],"x":-Infinity}'),
    "an integer of 5,000 digits": data('{"choices":[],"created":' + "9" * 5000 + "}"),
    "arrays 1,000 deep": data("[" * 1000 + "]" * 1000),
    "arrays 100,000 deep": data("[" * 100_000 + "]" * 100_000),
    "objects 100,000 deep": data('{"a":' * 100_000 + "1" + "}" * 100_000),
    "100,000 opened": data('{"choices":' + "[" * 100_000),
    "cut JSON": data('{"choices":[{"delta"'),
    "a scalar": data("1"),
    "an empty array": data("[]"),
    "two in an array": data([{"choices": []}, {"choices": []}]),
    "choices as an object": data({"choices": {}}),
    "choices of text": data({"choices": ["a"]}),
    "index as text": chunk(choice({"content": "a"}, index="0")),
    "index between two": chunk(choice({"content": "a"}, index=0.5)),
    "delta as text": data({"choices": [{"delta": "a"}]}),
    "content as an object": text({"a": 1}),
    "content as a number": text(7),
    "tool_calls as an object": chunk(choice({"tool_calls": {"a": 1}})),
    "tool_calls of text": chunk(choice({"tool_calls": ["a"]})),
    # --- other dialects
    "OpenAI Responses": data({"type": "response.created", "response": {}}),
    "Anthropic": b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n',
    "Google": data({"candidates": [{"content": {"parts": [{"text": "a"}]}}]}),
    "Ollama": data({"model": "m", "message": {"content": "a"}, "done": False}),
    "legacy completions": data(
        {"object": "text_completion", "choices": [{"text": "a", "index": 0}]}
    ),
}

# Name -> (stream, fault).
REFUSED: dict[str, tuple[bytes, Fault]] = {
    **{name: (stream, Fault.PROTOCOL) for name, stream in NOT_THE_PROTOCOL.items()},
    # --- no proof of completion
    "nothing": (b"", Fault.PROTOCOL),
    "an empty stream that ends well (llama_cpp.server)": (DONE, Fault.PROTOCOL),
    "chunks without a choice": (chunk(usage=USAGE) + DONE, Fault.PROTOCOL),
    "cut after text": (A, Fault.TRUNCATED),
    "cut before the finish of one choice": (
        text("a", 0) + text("b", 1) + chunk(choice(reason="stop", index=0)),
        Fault.TRUNCATED,
    ),
    "cut within the last event": (A + STOP[:-1], Fault.TRUNCATED),
    "cut with usage seen": (A + chunk(usage=USAGE), Fault.TRUNCATED),
    "[DONE] only at the beginning of a text": (A + data("[DONE]ish"), Fault.PROTOCOL),
    # --- errors inside a 200
    "an error event (Groq)": (
        A + b'event: error\ndata: {"error":{"message":"m","code":"tool_use_failed"}}\n\n',
        Fault.OUTPUT_INVALID,
    ),
    "an error event without an error": (b'event: error\ndata: {"x":1}\n\n', Fault.SERVER_ERROR),
    "an error beside a finish, then [DONE] (OpenRouter)": (
        A + chunk(choice(reason="error"), error={"code": 502, "message": "m"}) + DONE,
        Fault.SERVER_ERROR,
    ),
    "an error within a choice (OpenRouter)": (
        A + chunk(choice(error={"code": 429, "message": "m"})),
        Fault.RATE_LIMITED,
    ),
    "an SSE field error (llama.cpp)": (
        A + b'error: {"code":500,"message":"m","type":"server_error"}\n\n',
        Fault.SERVER_ERROR,
    ),
    "an SSE field error after a finish": (
        A + END + b'error: {"code":503,"message":"m"}\n\n',
        Fault.OVERLOADED,
    ),
    "an SSE field error that is no JSON": (A + b"error: out of memory\n\n", Fault.PROTOCOL),
    "data with an error": (
        data({"error": {"message": "m", "code": "rate_limit_exceeded"}}),
        Fault.RATE_LIMITED,
    ),
    "data with an error of text": (data({"error": "overloaded"}), Fault.SERVER_ERROR),
    "a flat error (vLLM)": (
        data({"object": "error", "message": "m", "type": "BadRequestError", "code": 400}),
        Fault.REFUSED,
    ),
    "an error in an array (Google)": (
        data([{"error": {"code": 429, "message": "m"}}]),
        Fault.RATE_LIMITED,
    ),
    "too long, inside a 200 (InternLM)": (
        data({"error": {"code": -20003, "message": "m"}}),
        Fault.CONTEXT_TOO_LONG,
    ),
    "an error with type error (Anthropic)": (
        data({"type": "error", "error": {"type": "overloaded_error", "message": "m"}}),
        Fault.OVERLOADED,
    ),
    # --- no events at all
    "JSON lines instead of events": (
        b'{"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n',
        Fault.PROTOCOL,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_stream_is_refused_with_a_clear_fault(name: str) -> None:
    stream, expected = REFUSED[name]
    fault = fault_of(lambda: decode([stream]))
    assert fault.fault is expected
    assert len(str(fault)) < 300
    if len(stream) < 10_000:
        assert fault_of(lambda: decode(bytewise(stream))) == fault


@pytest.mark.parametrize("name", NOT_THE_PROTOCOL)
def test_what_is_not_the_protocol_is_refused_at_once_and_wherever_it_stands(name: str) -> None:
    assert fault_of(lambda: decode([A + NOT_THE_PROTOCOL[name] + END])).fault is Fault.PROTOCOL


def test_an_error_says_what_the_upstream_said() -> None:
    error = {"message": "slow down", "code": "slow_down", "param": "p"}
    fault = fault_of(lambda: decode([data({"error": error})]))
    assert (fault.message, fault.code, fault.param) == ("slow down", "slow_down", "p")


def test_text_before_an_error_was_handed_out() -> None:
    decoder = OpenAIStream()
    framing = sse.Decoder(NO_LIMIT)
    events = framing.feed(A + data({"error": {"message": "m"}}))
    assert [e.WhichOneof("event") for e in decoder.feed(events[0])] == ["header", "delta"]
    fault_of(lambda: decoder.feed(events[1]))


def test_garbage_that_echoes_a_key_is_never_quoted_with_half_of_it() -> None:
    """The whole key is recognised and removed later; half of it would not be."""
    for before in range(40, 90):
        key = "sk-" + "k" * 40
        for after in ("", " y", '"y', "y"):
            garbage = data("x" * before + " " + key + after)
            fault = fault_of(lambda stream=garbage: decode([stream]))
            assert key in fault.message or "sk-" not in fault.message


def test_an_answer_that_cannot_be_read_is_quoted_in_short() -> None:
    assert fault_of(lambda: openai_answers.decode(b" Sure,\nhere ")).message.endswith(
        ": 'Sure, here'"
    )
    long = fault_of(lambda: openai_answers.decode(b"word " * 100)).message
    assert "word word" in long
    assert len(long) < 200


# --- facts of the whole response --------------------------------------------------------


def test_the_header_is_sent_once_right_before_the_first_text() -> None:
    decoder = OpenAIStream()
    framing = sse.Decoder(NO_LIMIT)
    first = chunk(choice({"role": "assistant"}), system_fingerprint="fp", service_tier="flex", x=1)
    sent = [decoder.feed(event) for event in framing.feed(first + A + A)]
    assert [[e.WhichOneof("event") for e in events] for events in sent] == [
        [],
        ["header", "delta"],
        ["delta"],
    ]
    header = sent[1][0].header
    assert (header.id, header.model) == ("c1", "m")
    assert (header.system_fingerprint, header.service_tier) == ("fp", "flex")
    assert header.create_time.seconds == 1_700_000_000
    assert json.loads(header.extra_json) == {"x": 1}


def test_the_first_of_each_fact_wins_also_where_it_comes_late() -> None:
    stream = (
        chunk(choice({"role": "assistant"}), id=None, model="", created=None)
        + chunk(choice({"content": "a"}), id="i", model="first", created=1)
        + chunk(choice({"content": "b"}), id="j", model="second", created=2)
        + END
    )
    header = read(stream)["header"]
    assert (header.id, header.model, header.create_time.seconds) == ("i", "first", 1)


@pytest.mark.parametrize("created", [-1, 0, 1e18, 10**30, "x", None, [], 253_402_300_800])
def test_an_impossible_time_is_left_out(created: Any) -> None:
    stream = chunk(choice({"content": "a"}), created=created) + END
    assert not read(stream)["header"].HasField("create_time")


def test_unknown_fields_are_kept_where_they_stood_and_empty_ones_are_not() -> None:
    stream = (
        chunk(choice({"content": "a", "audio": {"id": 9007199254740993}, "n": None}), early=[1])
        + chunk(choice({"role": "assistant", "empty": []}), late=1, obfuscation="zz")
        + chunk(choice(reason="stop", content_filter_results={"hate": False}), late=2, none={})
        + DONE
    )
    got = read(stream)
    assert got["extra"] == [{"audio": {"id": 9007199254740993}}]
    assert json.loads(got["header"].extra_json) == {"early": [1]}
    assert json.loads(got["trailer"].extra_json) == {"late": 2}
    assert got["finish_extra"] == {0: {"content_filter_results": {"hate": False}}}


def test_half_a_surrogate_in_an_unknown_field_stays_an_escape() -> None:
    stream = data('{"choices":[{"index":0,"delta":{"x":"\\ud83d"}}]}') + END
    assert read(stream)["extra"] == [{"x": "\ud83d"}]


def test_usage_is_read_in_every_spelling() -> None:
    spelled: list[dict[str, Any]] = [
        {"prompt_tokens_details": {"cached_tokens": 3}},
        {"prompt_cache_hit_tokens": 3},  # DeepSeek
        {"cached_tokens": 3},  # Moonshot
    ]
    for extra in spelled:
        usage = read(A + chunk(choice(reason="stop"), usage={**USAGE, **extra}))["trailer"].usage
        assert (usage.cached_prompt_tokens, usage.total_tokens) == (3, 7)
        assert json.loads(usage.extra_json) == extra
        assert not usage.HasField("reasoning_tokens")
    more = {
        **USAGE,
        "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    usage = read(A + chunk(choice(reason="stop"), usage=more))["trailer"].usage
    assert usage.HasField("cached_prompt_tokens"), "0 is told apart from unset"
    assert (usage.cache_write_tokens, usage.reasoning_tokens) == (1, 2)
    assert not usage.estimated


@pytest.mark.parametrize("count", [-1, 2**31, 1e300, "7", None, True, [1], 10**30])
def test_an_impossible_count_is_none(count: Any) -> None:
    usage = {**USAGE, "prompt_tokens": count, "cached_tokens": count}
    got = read(A + chunk(choice(reason="stop"), usage=usage))["trailer"].usage
    assert (got.prompt_tokens, got.total_tokens) == (0, 7)
    assert not got.HasField("cached_prompt_tokens")


def test_no_usage_is_not_a_usage_of_zero() -> None:
    assert not read(A + END)["trailer"].HasField("usage")


def test_the_usage_seen_so_far_is_known_when_a_stream_breaks() -> None:
    decoder = OpenAIStream()
    for event in sse.Decoder(NO_LIMIT).feed(chunk(choice({"content": "a"}), usage=USAGE)):
        decoder.feed(event)
    fault_of(lambda: decoder.finish(None))
    assert decoder.usage is not None
    assert decoder.usage.total_tokens == 7


def test_log_probabilities_are_read_with_their_alternatives() -> None:
    tokens = [
        {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -3}],
        },
        {"token": "?", "logprob": -9999, "bytes": None, "top_logprobs": None},
        {"token": "x", "bytes": [256, "y"]},
        "nothing",
    ]
    got = read(chunk(choice({"content": "a"}, logprobs={"content": tokens})) + END)["logprobs"]
    assert [(t.token, t.logprob, t.raw_bytes) for t in got] == [
        ("a", -0.5, b"a"),
        ("?", -9999.0, b""),
        ("x", 0.0, b""),
    ]
    assert [(t.token, t.logprob) for t in got[0].top] == [("a", -0.5), ("b", -3.0)]


def test_log_probabilities_of_another_shape_ride_along() -> None:
    odd = {"tokens": ["a"], "token_logprobs": [-0.5]}
    got = read(chunk(choice({"content": "a"}, logprobs=odd)) + END)
    assert got["finish_extra"] == {0: {"logprobs": odd}}


def test_annotations_count_characters() -> None:
    cited = {"start_index": 1, "end_index": 2, "url": "https://e", "title": "t"}
    annotations = [{"type": "url_citation", "url_citation": cited}, {"type": "x"}, "y"]
    got = read(chunk(choice({"content": "a", "annotations": annotations})) + END)["annotations"]
    assert got == [chat_pb2.Annotation(start_offset=1, end_offset=2, url="https://e", title="t")]


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        *(("stop", "STOP"), ("end_turn", "STOP"), ("eos", "STOP"), ("length", "LENGTH")),
        *(("max_tokens", "LENGTH"), ("tool_calls", "TOOL_CALLS"), ("function_call", "TOOL_CALLS")),
        *(("content_filter", "CONTENT_FILTER"), ("weird", "OTHER"), ("STOP", "OTHER")),
        *(("model_length", "LENGTH"), ("sensitive", "CONTENT_FILTER")),
    ],
)
def test_an_end_is_named_alike_both_ways(raw: str, name: str) -> None:
    assert read(A + chunk(choice(reason=raw)))["finish"] == {0: (name, raw)}
    whole = openai_answers.decode(json.dumps(answer({"content": "a"}, raw)).encode()).choices[0]
    assert Finish(whole.finish_reason) == f"FINISH_REASON_{name}"
    assert whole.finish_reason_raw == raw


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        ("error", Fault.SERVER_ERROR),  # OpenRouter, Mistral, vLLM: the model behind it broke off
        ("network_error", Fault.SERVER_ERROR),  # Zhipu: inference failed
        ("abort", Fault.SERVER_ERROR),  # vLLM, SGLang: the server gave the request up
        ("insufficient_system_resource", Fault.OVERLOADED),  # DeepSeek: it ran out of machines
    ],
)
def test_an_end_that_is_a_failure_is_none(reason: str, fault: Fault) -> None:
    """What came is only a part, and the upstream says so."""
    for stream in (A + chunk(choice(reason=reason)) + DONE, A + chunk(choice(reason=reason))):
        assert fault_of(lambda stream=stream: read(stream)).fault is fault
    body = json.dumps(answer({"content": "a"}, reason)).encode()
    assert fault_of(lambda: openai_answers.decode(body)).fault is fault


# --- any chunk, any cutting -------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["\ud83d", "\ude00", "a\ud83d", "\ude00b", "", "stop", "[DONE]", "custom"]),
)
KEYS = [
    *("choices", "delta", "message", "index", "content", "finish_reason", "usage", "error", "x"),
    *("tool_calls", "function", "custom", "name", "arguments", "input", "id", "type", "object"),
    *("reasoning", "reasoning_content", "refusal", "logprobs", "token", "logprob", "bytes"),
    *("top_logprobs", "annotations", "url_citation", "start_index", "text", "thinking", "model"),
    *("created", "prompt_tokens", "prompt_tokens_details", "cached_tokens", "finish_details"),
    *("code", "role", "detail", "\ud83d"),
]
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=6)
    ),
    max_leaves=15,
)


@st.composite
def chunklike(draw: st.DrawFn) -> Any:
    """A chunk in which anything may stand anywhere."""

    def maybe(value: Any) -> Any:
        return draw(anything) if draw(st.integers(0, 6)) == 0 else value

    delta = draw(st.dictionaries(st.sampled_from(KEYS), anything, max_size=4))
    function = draw(st.dictionaries(st.sampled_from(KEYS), anything, max_size=3))
    delta["tool_calls"] = maybe(
        [maybe({"index": maybe(0), "id": maybe("i"), "function": function})]
    )
    delta["content"] = maybe("text")
    one = {"index": maybe(0), "delta": maybe(delta), "finish_reason": maybe(None)}
    one["logprobs"] = maybe({"content": [maybe({"token": "a", "logprob": maybe(-1)})]})
    made = {"id": "c", "object": "chat.completion.chunk", "choices": maybe([maybe(one)])}
    return {**made, "usage": maybe({"prompt_tokens": maybe(1)})}


def dumped(payload: Any) -> bytes:
    return json.dumps(payload).encode()


def survives(events: Iterable[sse.Event]) -> None:
    decoder = OpenAIStream()
    out: list[Event] = []
    try:
        for event in events:
            out += decoder.feed(event)
        out += decoder.finish(None)
    except UpstreamFault as fault:
        str(fault)
    for event in out:
        event.SerializeToString()


@given(st.lists(st.one_of(anything, chunklike()), max_size=4))
@settings(max_examples=200)
@example([{"choices": [{"delta": {"content": "\ud83d", "reasoning": {"a": 1}}}]}])
def test_no_chunk_raises_anything_but_a_fault(payloads: list[Any]) -> None:
    survives(sse.Event("message", dumped(payload), "") for payload in payloads)


@given(st.binary(max_size=100), st.sampled_from(["message", "error", ""]))
def test_no_bytes_raise_anything_but_a_fault(payload: bytes, kind: str) -> None:
    survives([sse.Event(kind, payload, "")])
    try:
        OpenAIStream().finish(payload)
    except UpstreamFault as fault:
        str(fault)


@given(st.one_of(anything, chunklike()))
@settings(max_examples=200)
def test_no_whole_answer_raises_anything_but_a_fault(payload: Any) -> None:
    try:
        openai_answers.decode(dumped(payload)).SerializeToString()
    except UpstreamFault as fault:
        str(fault)
    try:
        for model in openai_answers.decode_models(dumped(payload)):
            model.SerializeToString()
    except UpstreamFault as fault:
        str(fault)


@pytest.mark.parametrize("place", ["delta", "choice", "chunk", "arguments", "whole"])
def test_however_deep_it_is_it_is_read_or_refused(place: str) -> None:
    """Close to where Python's recursion ends, reading may work and writing again not."""
    outcomes = set()
    for depth in range(880, 1000):
        deep = "[" * depth + "]" * depth
        delta = f'{{"content":"a","x":{deep}}}' if place == "delta" else '{"content":"a"}'
        if place == "arguments":
            delta = f'{{"tool_calls":[{{"index":0,"function":{{"arguments":{deep}}}}}]}}'
        beside = f',"x":{deep}' if place == "choice" else ""
        end = f',"x":{deep}' if place in ("chunk", "whole") else ""
        made = f'{{"choices":[{{"index":0,"delta":{delta}{beside}}}]{end}}}'
        try:
            if place == "whole":
                openai_answers.decode(made.encode())
            else:
                decode([data(made) + END])
            outcomes.add("read")
        except UpstreamFault as fault:
            outcomes.add(fault.fault.value)
    assert outcomes == {"read", "protocol"}


pieces = st.text(max_size=6)


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, dict[str, Any]]:
    """A good stream, and what is said in it."""
    said: dict[str, Any] = {"content": {}, "reasoning": {}, "arguments": {}}
    stream = draw(st.sampled_from([b"", b"\xef\xbb\xbf", b": hello\n\n"]))
    choices = draw(st.integers(1, 3))
    for _ in range(draw(st.integers(0, 12))):
        index, piece = draw(st.integers(0, choices - 1)), draw(pieces)
        field = draw(st.sampled_from(["content", "reasoning", "arguments"]))
        delta: dict[str, Any] = {field: piece}
        if field == "arguments":
            position = draw(st.integers(0, 1))
            delta = {"tool_calls": [call(position, f"i{position}", "f", piece)]}
            said[field].setdefault((index, position), []).append(piece)
        else:
            said[field].setdefault(index, []).append(piece)
        escaped = draw(st.booleans())  # then surrogates of one chunk come as escapes
        payload = {"object": "chat.completion.chunk", "choices": [choice(delta, index=index)]}
        stream += data(json.dumps(payload, ensure_ascii=escaped))
        stream += draw(st.sampled_from([b"", b": keep-alive\n\n", b"\n"]))
    for index in range(choices):
        stream += chunk(choice(reason="stop", index=index))
    stream += chunk(usage=USAGE) + draw(st.sampled_from([DONE, b""]))
    end = draw(st.sampled_from([b"\n", b"\r", b"\r\n"]))
    return stream.replace(b"\n", end), said


@given(answers(), st.data())
@settings(max_examples=150)
def test_any_cutting_gives_what_was_said(
    answer_and_said: tuple[bytes, dict[str, Any]], draw: st.DataObject
) -> None:
    stream, said = answer_and_said
    got = read(stream)
    for field in ("content", "reasoning"):
        texts = {index: "".join(parts) for index, parts in said[field].items()}
        assert got.get(field, {}) == {index: whole for index, whole in texts.items() if whole}
    assert [arguments for _, _, arguments, _ in got.get("calls", [])] == [
        "".join(parts) for parts in renumbered(said["arguments"])
    ]
    assert got["trailer"].usage.total_tokens == 7
    cuts = draw.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    edges = [0, *sorted(cuts), len(stream)]
    assert read(stream, [stream[a:b] for a, b in itertools.pairwise(edges)]) == got
    assert read(stream, bytewise(stream)) == got


def renumbered(arguments: dict[tuple[int, int], list[str]]) -> list[list[str]]:
    """Calls of a choice are numbered in the order in which they begin."""
    begun: dict[int, list[list[str]]] = {}
    for (index, _), parts in arguments.items():  # in order of their first part
        begun.setdefault(index, []).append(parts)
    return [parts for index in sorted(begun) for parts in begun[index]]


# --- whole answers ----------------------------------------------------------------------


def answer(message: Any = None, reason: Any = "stop", **fields: Any) -> dict[str, Any]:
    made = {"index": 0, "message": message, "finish_reason": reason}
    return {"id": "c1", "object": "chat.completion", "model": "m", "choices": [made], **fields}


def whole(payload: Any, before: bytes = b"") -> chat_service_pb2.ChatResponse:
    return openai_answers.decode(before + dumped(payload))


def test_a_whole_answer_is_read() -> None:
    message = {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "hm",
        "refusal": "no",
        "annotations": [{"url_citation": {"start_index": 0, "end_index": 1, "url": "u"}}],
        "tool_calls": [
            {"id": "i", "type": "function", "function": {"name": "f", "arguments": "{"}},
            {"id": "j", "type": "custom", "custom": {"name": "c", "input": "x"}},
        ],
        "audio": {"id": 9007199254740993},
    }
    got = whole(
        answer(
            message,
            "tool_calls",
            usage={**USAGE, "cost": 0.1},
            created=1_700_000_000,
            system_fingerprint="fp",
            service_tier="flex",
            citations=["c"],
        )
    )
    header = got.header
    assert (header.id, header.model, header.system_fingerprint) == ("c1", "m", "fp")
    assert (header.service_tier, header.create_time.seconds) == ("flex", 1_700_000_000)
    assert json.loads(header.extra_json) == {"citations": ["c"]}
    [one] = got.choices
    assert (one.index, Finish(one.finish_reason)) == (0, "FINISH_REASON_TOOL_CALLS")
    said = one.message
    assert (said.role, said.content, said.reasoning, said.refusal) == (
        *("assistant", "a", "hm", "no"),
    )
    assert said.annotations[0].url == "u"
    assert json.loads(said.extra_json) == {"audio": {"id": 9007199254740993}}
    first, second = said.tool_calls
    assert (first.id, first.function.name, first.function.arguments_json) == ("i", "f", "{")
    assert (second.id, second.custom.name, second.custom.input) == ("j", "c", "x")
    assert got.usage.total_tokens == 7
    assert json.loads(got.usage.extra_json) == {"cost": 0.1}


def test_what_stands_beside_a_whole_message_is_kept() -> None:
    made = answer({"content": "a"})
    made["choices"][0].update(
        logprobs={"content": [{"token": "a", "logprob": -0.5}]}, content_filter_results={"x": 1}
    )
    [got] = whole(made).choices
    assert [(t.token, t.logprob) for t in got.logprobs] == [("a", -0.5)]
    assert json.loads(got.extra_json) == {"content_filter_results": {"x": 1}}
    made["choices"][0]["logprobs"] = {"tokens": ["a"]}
    [odd] = whole(made).choices
    assert json.loads(odd.extra_json)["logprobs"] == {"tokens": ["a"]}
    assert not odd.logprobs


# Name -> (message of the only choice, text of it, arguments of its calls).
WHOLE: dict[str, tuple[Any, str | None, list[str]]] = {
    "null content": ({"content": None}, None, []),
    "no content": ({"role": "assistant"}, None, []),
    "empty content": ({"content": ""}, "", []),
    "content as a list": (
        {"content": [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}]},
        "ab",
        [],
    ),
    "a lone surrogate": ({"content": "a\ud83d"}, "a\ufffd", []),
    "a pair of surrogates": ({"content": "\ud83d\ude00"}, "😀", []),
    "no role": ({"content": "a"}, "a", []),
    "tool_calls null": ({"content": "a", "tool_calls": None}, "a", []),
    "arguments as an object": (
        {"tool_calls": [{"function": {"name": "f", "arguments": {"q": 1}}}]},
        None,
        ['{"q":1}'],
    ),
    "arguments null": ({"tool_calls": [{"function": {"arguments": None}}]}, None, [""]),
    "no function": ({"tool_calls": [{"id": "i"}]}, None, [""]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_answer_is_survived(name: str) -> None:
    message, content, arguments = WHOLE[name]
    got = whole(answer(message)).choices[0].message
    assert got.HasField("content") == (content is not None)
    assert got.content == (content or "")
    assert [c.function.arguments_json for c in got.tool_calls] == arguments
    assert got.role == "assistant"


def test_white_space_that_keeps_a_connection_alive_is_skipped() -> None:
    assert whole(answer({"content": "a"}), b" \n" * 2893).choices[0].message.content == "a"


def test_a_choice_that_never_began_has_not_ended() -> None:
    """Two were asked for and one came: complete only if the provider says that nothing follows."""
    (event,) = sse.Decoder(NO_LIMIT).feed(chunk(choice({"content": "hi"}, "stop")))
    (done,) = sse.Decoder(NO_LIMIT).feed(b"data: [DONE]\n\n")
    cut, whole = OpenAIStream(2), OpenAIStream(2)
    cut.feed(event)
    with pytest.raises(UpstreamFault) as caught:
        cut.finish(None)
    assert caught.value.fault is Fault.TRUNCATED
    whole.feed(event)
    whole.feed(done)
    assert [e.WhichOneof("event") for e in whole.finish(None)] == ["finish", "trailer"]


def test_two_choices_of_one_index_are_never_mixed() -> None:
    """As one stream they would read as one text, where several were asked for."""
    both = chunk(choice({"content": "one"}, "stop"), choice({"content": "two"}, "stop"))
    decoder, [event] = OpenAIStream(choices=2), sse.Decoder(NO_LIMIT).feed(both)
    assert fault_of(lambda: decoder.feed(event)).fault is Fault.PROTOCOL
    assert read(both + DONE)["content"] == {0: "onetwo"}  # two pieces of the one


def test_choices_keep_the_index_they_have() -> None:
    made = answer({"content": "a"})
    made["choices"] = [{"index": 1, "message": {"content": "b"}}, {"message": {"content": "c"}}]
    assert [(c.index, c.message.content) for c in whole(made).choices] == [(1, "b"), (1, "c")]


@pytest.mark.parametrize(
    ("choice_fields", "raw"), [({}, ""), ({"finish_details": {"type": "stop"}}, "")]
)
def test_an_answer_that_has_ended_never_says_that_it_has_not(
    choice_fields: dict[str, Any], raw: str
) -> None:
    made = answer({"content": "a"}, reason=None)
    made["choices"][0].update(choice_fields)
    [got] = whole(made).choices
    expected = "STOP" if choice_fields else "OTHER"
    assert Finish(got.finish_reason) == f"FINISH_REASON_{expected}"
    assert got.finish_reason_raw == raw


# Name -> (body, fault).
WHOLE_REFUSED: dict[str, tuple[bytes, Fault]] = {
    "empty": (b"", Fault.PROTOCOL),
    "white space": (b"  \n", Fault.PROTOCOL),
    "HTML": (b"<!doctype html><html></html>", Fault.PROTOCOL),
    "cut": (dumped(answer({"content": "a"}))[:-5], Fault.PROTOCOL),
    "a stream": (A + END, Fault.PROTOCOL),
    "an array": (b"[]", Fault.PROTOCOL),
    "a scalar": (b"1", Fault.PROTOCOL),
    "no choices": (dumped({"id": "c"}), Fault.PROTOCOL),
    "empty choices": (dumped({"choices": []}), Fault.PROTOCOL),
    "choices as an object": (dumped({"choices": {"a": 1}}), Fault.PROTOCOL),
    "choices of text": (dumped({"choices": ["a"]}), Fault.PROTOCOL),
    "a choice of nothing": (dumped({"choices": [{}]}), Fault.PROTOCOL),
    "message of text": (dumped(answer("a")), Fault.PROTOCOL),
    "content as a number": (dumped(answer({"content": 1})), Fault.PROTOCOL),
    "tool_calls as text": (dumped(answer({"tool_calls": "a"})), Fault.PROTOCOL),
    "tool_calls of text": (dumped(answer({"tool_calls": ["a"]})), Fault.PROTOCOL),
    "NaN": (b'{"choices":[{"message":{"content":"a"}}],"x":NaN}', Fault.PROTOCOL),
    "5,000 digits": (
        b'{"choices":[{"message":{"content":"a"}}],"x":' + b"9" * 5000 + b"}",
        Fault.PROTOCOL,
    ),
    "100,000 deep": (b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}", Fault.PROTOCOL),
    "Anthropic": (
        dumped({"type": "message", "content": [{"type": "text", "text": "a"}]}),
        Fault.PROTOCOL,
    ),
    "an error": (dumped({"error": {"code": "insufficient_quota"}}), Fault.QUOTA_EXHAUSTED),
    "an error of text": (dumped({"error": "overloaded"}), Fault.SERVER_ERROR),
    "an error within a choice": (
        dumped({"choices": [{"message": {"content": "a"}, "error": {"code": 429}}]}),
        Fault.RATE_LIMITED,
    ),
    "a flat error": (dumped({"object": "error", "code": 404, "message": "m"}), Fault.REFUSED),
}


@pytest.mark.parametrize("name", WHOLE_REFUSED)
def test_a_whole_answer_is_refused_with_a_clear_fault(name: str) -> None:
    body, expected = WHOLE_REFUSED[name]
    fault = fault_of(lambda: openai_answers.decode(body))
    assert fault.fault is expected
    assert len(str(fault)) < 300


# --- lists of models --------------------------------------------------------------------


def test_the_list_of_models_is_read_and_kept() -> None:
    entries = [{"id": "m", "owned_by": "o", "n": 9007199254740993}, {"id": "x\ud83d"}]
    listed = openai_answers.decode_models(dumped({"data": [*entries, {"id": 7}, {}, "text"]}))
    assert [(m.name, m.upstream_model) for m in listed] == [("m", "m"), ("x\ufffd", "x\ufffd")]
    assert json.loads(listed[0].extra_json) == entries[0]


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"data":{}}', b"<html>", b"1"])
def test_what_is_no_list_of_models_is_refused(body: bytes) -> None:
    assert fault_of(lambda: openai_answers.decode_models(body)).fault is Fault.PROTOCOL
