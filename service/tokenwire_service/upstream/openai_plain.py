"""Answers of OpenAI's, whole or a chunk of a stream, that bring text and little else, read without
a detour.

Nearly all of them do. msgspec reads those straight into typed fields and refuses whatever else may
be there (tool calls, an error, a field that is not named here, half a surrogate pair): that is for
openai_answers, which reads all there is and is this module's oracle in
tests/unit/test_openai_plain.py. A chunk of 240 bytes takes 1.0 us here and 9.5 us there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from tokenwire_service.upstream.json_text import INT32_MAX


class _Delta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    content: Annotated[str, msgspec.Meta(min_length=1)]
    role: Literal["assistant"] | None = None
    refusal: None = None
    reasoning: None = None
    reasoning_content: None = None
    tool_calls: None = None


class _Choice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: _Delta
    index: Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)] = 0
    logprobs: None = None
    finish_reason: None = None
    matched_stop: None = None  # SGLang
    stop_reason: None = None  # vLLM, as the next
    token_ids: None = None


class _Chunk(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    choices: tuple[_Choice]  # one
    id: str | None = None
    object: Literal["chat.completion.chunk"] | None = None
    created: int | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    obfuscation: str | None = None
    usage: None = None


_decoder = msgspec.json.Decoder(_Chunk)


def piece(data: bytes) -> tuple[int, str] | None:
    """(index of the choice, text) of a chunk that says no more; None for any other."""
    try:
        choice = _decoder.decode(data).choices[0]
    except (ValueError, RecursionError):
        return None
    return choice.index, choice.delta.content


class _Message(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    content: str
    role: Literal["assistant"] | None = None
    refusal: None = None
    reasoning: None = None
    reasoning_content: None = None
    tool_calls: tuple[()] | None = None
    annotations: tuple[()] | None = None
    function_call: None = None
    audio: None = None


class _WholeChoice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    message: _Message
    finish_reason: Literal["stop", "length"]
    index: Annotated[int, msgspec.Meta(ge=0, le=INT32_MAX)] = 0
    logprobs: None = None
    matched_stop: None = None  # SGLang
    stop_reason: None = None  # vLLM, as the next
    token_ids: None = None


class Whole(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """An answer of one text."""

    choices: tuple[_WholeChoice]
    id: str | None = None
    object: Literal["chat.completion"] | None = None
    created: Annotated[int, msgspec.Meta(gt=0, lt=253_402_300_800)] | None = None  # year 10000
    model: str | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    usage: dict[str, Any] | None = None
    prompt_logprobs: None = None  # vLLM, as the others
    prompt_token_ids: None = None
    kv_transfer_params: None = None


_whole_decoder = msgspec.json.Decoder(Whole)


def whole(data: bytes) -> Whole | None:
    """An answer of one text that ended by itself or at its limit; None for any other."""
    try:
        return _whole_decoder.decode(data)
    except (ValueError, RecursionError):
        return None
