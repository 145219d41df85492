"""Turns a request into one answer, in OpenAI's shapes, streamed or plain: both say the same."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any, Final

from tokenwire_service.simulator import invent, prose
from tokenwire_service.simulator.faults import INVALID_BYTE, Directives, encode
from tokenwire_service.simulator.request import Call

DONE: Final = b"data: [DONE]\n\n"
_FINGERPRINT: Final = "fp_simulated"
_UNLIKELY: Final = (
    " perhaps",
    " tea",
    "…",
    " rain",
    " owl",
    "\n",
    " the",
    " umbrella",
    "?",
    " and",
)


@dataclass(frozen=True, slots=True)
class _Choice:
    """One choice: its deltas, each one token, and why it ends."""

    deltas: Sequence[Mapping[str, Any]]
    finish_reason: str


class Answer:
    """The whole answer to one call, decided before its first byte is sent.

    ident names the completion; created is in Unix seconds. Lone surrogates of scripted texts
    travel as JSON escapes.
    """

    def __init__(self, call: Call, *, ident: str, created: int, azure: bool = False) -> None:
        self._call = call
        self._ident = ident
        self._created = created
        self._azure = azure
        self._choices = [_choose(call, ident, index) for index in range(call.n)]
        self._invalid_bytes = False
        self.prompt_tokens = _count_prompt(call)

    @property
    def ticks(self) -> int:
        """Pace units of the stream: the tokens of the longest choice, or the raw events."""
        if self._call.directives.raw_events is not None:
            return len(self._call.directives.raw_events)
        return max(len(choice.deltas) for choice in self._choices)

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts. Every delta is one token."""
        deltas = [delta for choice in self._choices for delta in choice.deltas]
        reasoning = sum("reasoning_content" in delta for delta in deltas)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(deltas),
            "total_tokens": self.prompt_tokens + len(deltas),
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def with_piece(self, piece: str, at: float) -> None:
        """Slips a piece of text into every choice after this share of it. Range of at: [0, 1].

        INVALID_BYTE will be sent as the byte 0xFF.
        """
        self._invalid_bytes = piece == INVALID_BYTE
        self._choices = [
            _Choice(
                [
                    *choice.deltas[: _share(at, len(choice.deltas))],
                    {"content": piece},
                    *choice.deltas[_share(at, len(choice.deltas)) :],
                ],
                choice.finish_reason,
            )
            for choice in self._choices
        ]

    def plain(self) -> bytes:
        """The body of an answer that is not streamed."""
        directives = self._call.directives
        if directives.raw_events is not None:
            return b"".join(_raw(event) for event in directives.raw_events)
        return self._encode(
            {
                "id": self._ident,
                "object": "chat.completion",
                "created": self._created,
                "model": self._call.model,
                "choices": [
                    {
                        "index": index,
                        "message": _message(choice.deltas),
                        "logprobs": self._logprobs(choice.deltas),
                        "finish_reason": choice.finish_reason,
                    }
                    for index, choice in enumerate(self._choices)
                ],
                "usage": self.usage,
                "service_tier": "default",
                "system_fingerprint": _FINGERPRINT,
            }
        )

    def head(self) -> bytes:
        """The events before the first token: the role of every choice."""
        if self._call.directives.raw_events is not None:
            return b""
        events = []
        if self._azure:
            blank = {"id": "", "object": "", "created": 0, "model": "", "choices": []}
            safe = {"filtered": False, "severity": "safe"}
            filtered = {"hate": safe, "self_harm": safe, "sexual": safe, "violence": safe}
            results = [{"prompt_index": 0, "content_filter_results": filtered}]
            events.append(self._event(blank | {"prompt_filter_results": results}))
        for index, choice in enumerate(self._choices):
            speaks = not any("tool_calls" in delta for delta in choice.deltas)
            first = {"role": "assistant", "content": "" if speaks else None, "refusal": None}
            events.append(self._chunk(index, first))
        return b"".join(events)

    def body(self) -> Iterator[bytes]:
        """The events of each tick: one token of every choice that is still speaking."""
        if (raw := self._call.directives.raw_events) is not None:
            yield from (b"data: " + _raw(event) + b"\n\n" for event in raw)
            return
        for tick in range(self.ticks):
            yield b"".join(
                self._chunk(index, choice.deltas[tick])
                for index, choice in enumerate(self._choices)
                if tick < len(choice.deltas)
            )

    def tail(self) -> bytes:
        """The events after the last token: finish reasons, usage, [DONE]."""
        events = []
        if self._call.directives.raw_events is None:
            events += [
                self._chunk(index, {}, choice.finish_reason)
                for index, choice in enumerate(self._choices)
            ]
            if self._call.include_usage:
                events.append(self._event(self._frame([]) | {"usage": self.usage}))
        if self._call.directives.done:
            events.append(DONE)
        return b"".join(events)

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._ident,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._call.model,
            "service_tier": "default",
            "system_fingerprint": _FINGERPRINT,
            "choices": choices,
        }

    def _chunk(self, index: int, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs([delta]) if delta.get("content") else None,
            "finish_reason": finish,
        }
        frame = self._frame([choice])
        if self._call.include_usage:
            frame["usage"] = None
        if self._call.include_obfuscation:
            frame["obfuscation"] = _digest(json.dumps(delta).encode(), size=4).hex()
        return self._event(frame)

    def _logprobs(self, deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        if not self._call.logprobs:
            return None
        tokens = [delta["content"] for delta in deltas if delta.get("content")]
        return {
            "content": [_logprob(token, self._call.top_logprobs) for token in tokens],
            "refusal": None,
        }

    def _event(self, value: object) -> bytes:
        return b"data: " + self._encode(value) + b"\n\n"

    def _encode(self, value: object) -> bytes:
        data = encode(value)
        if self._invalid_bytes:
            data = data.replace(INVALID_BYTE.encode(), b"\xff").replace(b"\\uffff", b"\xff")
        return data


def _choose(call: Call, ident: str, index: int) -> _Choice:
    directives = call.directives
    if directives.raw_events is not None:
        return _Choice([], "stop")
    if directives.chunks is not None:
        return _Choice([{"content": chunk} for chunk in directives.chunks], "stop")
    random = Random(int.from_bytes(_digest(call.source + b"#%d" % index)))
    talk = _listen(call.messages)
    deltas: list[Mapping[str, Any]] = []
    reasoning = directives.reasoning
    if reasoning is None and call.effort:
        reasoning = prose.think(talk, call.effort, random)
    deltas += [{"reasoning_content": piece} for piece in prose.tokenize(reasoning or "")]
    reason = "stop"
    if directives.text is None and (calls := _tools_to_call(call, talk)):
        reason = "tool_calls"
        for number, tool in enumerate(calls):
            call_id = "call_" + _digest(f"{ident}/{index}/{number}".encode(), size=12).hex()
            deltas += _call_deltas(number, call_id, tool, talk.prompt)
    else:
        text = _text(call, directives, talk, random)
        ends = [at for stop in call.stop if (at := text.find(stop)) >= 0]
        pieces = prose.tokenize(text[: min(ends)] if ends else text)
        deltas += [{"content": piece} for piece in pieces[: directives.tokens]]
    if call.max_tokens is not None and len(deltas) > call.max_tokens:
        return _Choice(deltas[: call.max_tokens], "length")
    return _Choice(deltas, reason)


def _listen(messages: Sequence[Mapping[str, Any]]) -> prose.Talk:
    names = {
        call.get("id"): (call.get("function") or call.get("custom") or {}).get("name", "the tool")
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(call, dict)
    }
    results: list[tuple[str, str]] = []
    for message in reversed(messages):
        if message["role"] not in ("tool", "function"):
            break
        name = names.get(message.get("tool_call_id"), message.get("name") or "the tool")
        results.insert(0, (str(name), _text_of(message)))
    said = [message for message in messages if message["role"] == "user"]
    parts = said[-1]["content"] if said else []
    return prose.Talk(
        prompt=_text_of(said[-1] if said else messages[-1]),
        earlier=_text_of(said[-2]) if len(said) > 1 else "",
        results=results,
        attachments=sum(part["type"] != "text" for part in parts if isinstance(part, dict)),
    )


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part["text"]) for part in content if "text" in part)
    return content if isinstance(content, str) else ""


def _tools_to_call(call: Call, talk: prose.Talk) -> list[invent.Tool]:
    if talk.results or call.tool_mode == "none":
        return []
    wanted = invent.asked_for(call.tools, talk.prompt)
    if not wanted and call.tool_mode == "required":
        wanted = [invent.best_for(call.tools, talk.prompt)]
    return wanted if call.parallel else wanted[:1]


def _call_deltas(
    number: int, call_id: str, tool: invent.Tool, prompt: str
) -> Iterator[dict[str, Any]]:
    kind, field = ("custom", "input") if tool.custom else ("function", "arguments")
    if tool.custom:
        text = prose.shorten(prompt, 200)
    else:
        value = invent.value_for(tool.schema or {"type": "object"}, prompt)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    start = {"index": number, "id": call_id, "type": kind, kind: {"name": tool.name, field: ""}}
    yield {"tool_calls": [start]}
    for piece in prose.tokenize(text):
        yield {"tool_calls": [{"index": number, kind: {field: piece}}]}


def _text(call: Call, directives: Directives, talk: prose.Talk, random: Random) -> str:
    if directives.text is not None:
        return directives.text
    if call.schema is not None:
        value: Any = invent.value_for(call.schema, talk.prompt, everything=True)
        if not call.schema:
            words = prose.keywords(talk.prompt[:2000])[:5]
            value = {"answer": prose.reply(talk, random), "words": words}
        return json.dumps(value, ensure_ascii=False)
    text = prose.reply(talk, random)
    pieces = len(prose.tokenize(text)) if directives.tokens else 0
    more = []
    while directives.tokens and pieces < directives.tokens:
        more.append("\n\n" + prose.story(talk, random))
        pieces += len(prose.tokenize(more[-1]))
    return text + "".join(more)


def _message(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            kind, field = ("custom", "input") if "custom" in part else ("function", "arguments")
            if "id" in part:
                calls[part["index"]] = {
                    "id": part["id"],
                    "type": kind,
                    kind: {"name": part[kind]["name"], field: ""},
                }
            else:
                calls[part["index"]][kind][field] += part[kind][field]
    text = "".join(delta["content"] for delta in deltas if "content" in delta)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not calls else None,
        "refusal": None,
        "annotations": [],
    }
    if calls:
        message["tool_calls"] = list(calls.values())
    if any("reasoning_content" in delta for delta in deltas):
        message["reasoning_content"] = "".join(d.get("reasoning_content", "") for d in deltas)
    return message


def _logprob(token: str, alternatives: int) -> dict[str, Any]:
    likely = -_digest(token.encode("utf-8", "surrogatepass"), size=1)[0] / 512
    own = _likelihood(token, likely)
    others = [_likelihood(other, likely - 2 - rank) for rank, other in enumerate(_UNLIKELY * 2)]
    top = [own, *(other for other in others if other["token"] != token)]
    return own | {"top_logprobs": top[:alternatives]}


def _likelihood(token: str, logprob: float) -> dict[str, Any]:
    return {
        "token": token,
        "logprob": round(logprob, 6),
        "bytes": list(token.encode("utf-8", "surrogatepass")),
    }


def _count_prompt(call: Call) -> int:
    # Four more for each message and three to begin the answer: how chat models are counted.
    count = 3
    for message in call.messages:
        count += 4 + len(prose.tokenize(_text_of(message)))
        if calls := message.get("tool_calls"):
            count += len(prose.tokenize(json.dumps(calls)))
    return count + (len(prose.tokenize(json.dumps(call.offered))) if call.offered else 0)


def _share(at: float, length: int) -> int:
    return min(length, int(at * length))


def _digest(data: bytes, size: int = 8) -> bytes:
    return blake2b(data, digest_size=size).digest()


def _raw(event: str) -> bytes:
    return event.encode("utf-8", "surrogatepass")
