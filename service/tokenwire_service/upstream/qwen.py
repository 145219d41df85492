"""The dialect of Qwen on DashScope's compatible mode: chat completions with two shapes of error."""

from __future__ import annotations

from tokenwire_service.upstream.openai import OpenAI


class Qwen(OpenAI):
    """The dialect. What Qwen takes is a profile of its own; its native API is another dialect."""

    # DashScope's gateway reports errors as {"code", "message", "request_id"}, its compatible mode
    # as {"error": {...}}; both happen after a 200.
    flat_errors = True
