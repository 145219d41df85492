"""Where fuzzing starts: the project's own samples, and the corpus where there is one."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

from corpus import runner

_CHUNK = (
    b'{"id":"c","object":"chat.completion.chunk","model":"m","choices":[{"index":0,'
    b'"delta":{"role":"assistant","content":"hi","reasoning_content":"r","tool_calls":[{"index":0,'
    b'"id":"i","type":"function","function":{"name":"f","arguments":"{}"}}]},'
    b'"logprobs":null,"finish_reason":null}],"usage":null}'
)
_END = (
    b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}'
)
_FRAMES = (
    b"data: a\n\ndata:b\r\n\r\ndata\r\r",
    b"\xef\xbb\xbfevent: e\nid: 7\nretry: 10\n:c\ndata: 1\ndata: 2\n\n",
    b"id: a\0b\ndata: x\n\nerror: {}\n",
)
_ANSWER = (
    b'{"id":"c","object":"chat.completion","model":"m","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"hi","refusal":null,"tool_calls":[]},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}'
)
_ERROR = b'{"error":{"message":"m","type":"t","param":null,"code":"rate_limit_exceeded"}}'
_MOST = 1024  # bytes of a seed: longer ones cost more than they teach


def seeds(target: str) -> Iterator[bytes]:
    """Inputs of one target, small ones first."""
    stream = b"data: " + _CHUNK + b"\n\ndata: " + _END + b"\n\n"
    match target:
        case "event_stream":
            yield from (b"\x07" + frame for frame in (*_FRAMES, stream))
        case "openai_stream":
            yield from (b"\0" + body for body in (stream, stream + b"data: [DONE]\n\n"))
            yield b"\0data: " + _ERROR + b"\n\n"
        case "openai_answer":
            yield from (_ANSWER, _ERROR)
        case "openai_error":
            yield from (bytes([status]) + b"12\n" + _ERROR for status in (0, 1, 4, 29, 100))
    if runner.CORPUS.is_dir():
        yield from (seed for seed in _recorded(target) if len(seed) <= _MOST)


def _recorded(target: str) -> Iterator[bytes]:
    match target:
        case "event_stream":
            cases = json.loads((runner.CORPUS / "sse/sse_cases.json").read_bytes())["cases"]
            yield from (b"\x3f" + base64.b64decode(case["input_base64"]) for case in cases)
        case "openai_stream":
            for kind in ("streams", "streams_foreign"):
                for item in runner.items(kind):
                    body = item.data["body"].encode()
                    yield b"\0" + body
                    yield b"\0" + body[: _MOST // 2]  # the start of a long one
        case "openai_answer":
            for item in runner.items("responses"):
                yield item.data["body"].encode()
        case "openai_error":
            for item in runner.items("errors"):
                body = item.data["body"]
                text = body if isinstance(body, str) else json.dumps(body)
                yield bytes([item.data["status"] % 200]) + b"\n" + text.encode()
