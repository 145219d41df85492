"""The dialect of InternLM: chat completions whose errors come as a bare code inside a 200."""

from __future__ import annotations

from tokenwire_service.upstream.openai import OpenAI


class InternLM(OpenAI):
    """The dialect. Code -20003 says that the context is too long: CONTEXT_LENGTH_EXCEEDED, where
    the answer would otherwise be an empty one."""

    flat_errors = True
