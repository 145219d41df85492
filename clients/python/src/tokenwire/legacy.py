"""What lagent's `stream_chat` yields, (state, text so far, None), of this client's streams.

For code that moves over from GPTAPI and AsyncGPTAPI: see docs/from-lagent.md. The text is put
together here from deltas, so that the network carries each piece of it once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from enum import IntEnum

from tokenwire.client import AsyncStream, Stream
from tokenwire.errors import TokenwireError


class ModelStatusCode(IntEnum):
    """The states of lagent.schema.ModelStatusCode, with their numbers."""

    END = 0
    STREAM_ING = 1
    SERVER_ERR = -1
    SESSION_CLOSED = -2
    SESSION_OUT_OF_LIMIT = -3
    SESSION_INVALID_ARG = -4
    SESSION_READY = 2


_STATES = {
    "CONTEXT_LENGTH_EXCEEDED": ModelStatusCode.SESSION_OUT_OF_LIMIT,
    "INVALID_REQUEST": ModelStatusCode.SESSION_INVALID_ARG,
    "UNSUPPORTED_PARAMETER": ModelStatusCode.SESSION_INVALID_ARG,
    "UNKNOWN_ROLE": ModelStatusCode.SESSION_INVALID_ARG,
    "CANCELLED": ModelStatusCode.SESSION_CLOSED,
    "DEADLINE_EXCEEDED": ModelStatusCode.SESSION_CLOSED,
    "GATEWAY_DRAINING": ModelStatusCode.SESSION_CLOSED,
}

State = tuple[ModelStatusCode, str, None]


def state_of(error: TokenwireError) -> ModelStatusCode:
    """The state that an error is; the gateway's cumulative streams end in the same."""
    return _STATES.get(error.reason or error.code.name, ModelStatusCode.SERVER_ERR)


def states(stream: Stream) -> Iterator[State]:
    """Yields STREAM_ING for each piece of text, then END. An error's state is yielded with the
    text that had come, and then the error is raised: lagent yields none, and says END."""
    try:
        for event in stream:
            if event.text and event.choice_index == 0:
                yield ModelStatusCode.STREAM_ING, stream.text, None
    except TokenwireError as error:
        yield state_of(error), stream.text, None
        raise
    yield ModelStatusCode.END, stream.text, None


async def async_states(stream: AsyncStream) -> AsyncIterator[State]:
    """The same of an asyncio stream."""
    try:
        async for event in stream:
            if event.text and event.choice_index == 0:
                yield ModelStatusCode.STREAM_ING, stream.text, None
    except TokenwireError as error:
        yield state_of(error), stream.text, None
        raise
    yield ModelStatusCode.END, stream.text, None
