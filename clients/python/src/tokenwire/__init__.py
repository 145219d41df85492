"""Python client of Tokenwire, the gRPC gateway for LLM chat."""

from tokenwire import aio
from tokenwire.client import AsyncBatch, AsyncClient, AsyncStream, Batch, Client, Stream
from tokenwire.core import BatchResult
from tokenwire.errors import FieldViolation, Reason, TokenwireError
from tokenwire.replies import Accumulator, Choice, Reply, StreamEvent, ToolCall
from tokenwire.requests import BatchItem, CallOptions, ChatOptions, Message, Prompt
from tokenwire.version import __version__

__all__ = [
    "Accumulator",
    "AsyncBatch",
    "AsyncClient",
    "AsyncStream",
    "Batch",
    "BatchItem",
    "BatchResult",
    "CallOptions",
    "ChatOptions",
    "Choice",
    "Client",
    "FieldViolation",
    "Message",
    "Prompt",
    "Reason",
    "Reply",
    "Stream",
    "StreamEvent",
    "TokenwireError",
    "ToolCall",
    "__version__",
    "aio",
]
