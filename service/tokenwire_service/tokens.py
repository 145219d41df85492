"""Counting and listing tokens with tiktoken: off the event loop, bounded, without a network.

The rank files lie in ranks/, checked by SHA-256, and are loaded on first use (o200k_base takes
about half a second and 90 MiB). tiktoken's encode releases the GIL, so one thread is enough to
keep the event loop free.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import lzma
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import tiktoken
import tiktoken_ext.openai_public

from tokenwire.v1 import chat_pb2, chat_service_pb2, tokenizer_service_pb2
from tokenwire_service.errors import Violation, invalid

T = TypeVar("T")

# SHA-256 of the unpacked rank files: the values tiktoken itself expects.
_SHA256 = {
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}
_FALLBACK = "o200k_base"
# Same ranks; only special tokens differ, and those are counted as plain text here.
_EQUIVALENT = {"o200k_harmony": "o200k_base"}

# OpenAI's published chat layout: https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken
_TOKENS_PER_MESSAGE = 3
_TOKENS_PER_NAME = 1
_TOKENS_OF_REPLY = 3


@dataclass(frozen=True)
class Tokenizer:
    """Which encoding counts for a model, and whether it is the model's own."""

    name: str
    exact: bool


def tokenizer_for(model: str, configured: str | None = None) -> Tokenizer:
    """The tokenizer configured for a model, or else the one its name tells."""
    if configured is not None:
        return Tokenizer(configured, exact=True)
    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:
        return Tokenizer(_FALLBACK, exact=False)
    name = _EQUIVALENT.get(name, name)
    return Tokenizer(name, True) if name in _SHA256 else Tokenizer(_FALLBACK, exact=False)


def load_encoding(name: str) -> tiktoken.Encoding:
    """Builds an encoding from the rank file in the package. Raises ValueError if it differs."""
    packed = resources.files("tokenwire_service").joinpath(f"ranks/{name}.tiktoken.xz").read_bytes()
    try:
        ranks = lzma.decompress(packed)
    except lzma.LZMAError:
        ranks = b""
    if hashlib.sha256(ranks).hexdigest() != _SHA256[name]:
        raise ValueError(f"the rank file of {name} is not the published one")

    def local_ranks(_url: str, expected_hash: str | None = None) -> dict[bytes, int]:
        if expected_hash != _SHA256[name]:
            raise ValueError(f"tiktoken expects another rank file for {name}")
        pairs = (line.split() for line in ranks.splitlines() if line)
        return {binascii.a2b_base64(token): int(rank) for token, rank in pairs}

    # tiktoken's own definition (pattern, special tokens), with our reader in place of its
    # downloader: a copy of the function over other globals, so nothing shared is changed.
    definition = getattr(tiktoken_ext.openai_public, name)
    offline = types.FunctionType(
        definition.__code__, {**definition.__globals__, "load_tiktoken_bpe": local_ranks}
    )
    arguments: dict[str, Any] = offline()
    return tiktoken.Encoding(**arguments)


class TokenCounter:
    """Counts in a thread of its own. `max_bytes` bounds the UTF-8 of one request."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._encodings: dict[str, tiktoken.Encoding] = {}  # touched by the one thread only
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens")

    def close(self) -> None:
        """Ends the thread; what waits is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def count_text(self, tokenizer: Tokenizer, text: str) -> int:
        """Tokens of one text."""
        self._check_size([text], "text")
        return await self._run(lambda: len(self._encode(tokenizer.name, text)), "text")

    async def count_chat(self, tokenizer: Tokenizer, chat: chat_service_pb2.ChatRequest) -> int:
        """Tokens of a call in OpenAI's chat layout: an approximation, for tools above all."""
        texts, overhead = layout(chat)
        self._check_size(texts, "chat")

        def count() -> int:
            return overhead + sum(len(self._encode(tokenizer.name, text)) for text in texts)

        return await self._run(count, "chat")

    async def tokenize(
        self, tokenizer: Tokenizer, texts: list[str]
    ) -> list[tokenizer_service_pb2.TokenList]:
        """The tokens of each text, as ids and as bytes."""
        self._check_size(texts, "texts")

        def split() -> list[tokenizer_service_pb2.TokenList]:
            lists = []
            for text in texts:
                ids = self._encode(tokenizer.name, text)
                pieces = self._encodings[tokenizer.name].decode_tokens_bytes(ids)
                lists.append(tokenizer_service_pb2.TokenList(ids=ids, pieces=pieces))
            return lists

        return await self._run(split, "texts")

    def _check_size(self, texts: list[str], field: str) -> None:
        size = sum(len(text.encode()) for text in texts)
        if size > self._max_bytes:
            raise invalid(
                Violation(field, f"got {size} bytes of text, expected at most {self._max_bytes}")
            )

    def _encode(self, name: str, text: str) -> list[int]:
        encoding = self._encodings.get(name)
        if encoding is None:
            encoding = self._encodings[name] = load_encoding(name)
        try:
            return encoding.encode(text, disallowed_special=())
        except ValueError:  # a million spaces exceed the stack of its regex
            raise _UnsplittableError from None
        except BaseException as error:
            # Other versions panic at them: a PanicException is no Exception, and would end the
            # RPC without a status.
            if type(error).__name__ != "PanicException":
                raise
            raise _UnsplittableError from None

    async def _run(self, work: Callable[[], T], field: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except _UnsplittableError:
            raise invalid(Violation(field, "the tokenizer cannot split this text")) from None


class _UnsplittableError(Exception):
    """The tokenizer gives up on a text."""


def layout(chat: chat_service_pb2.ChatRequest) -> tuple[list[str], int]:
    """(texts, tokens between them) of a call in OpenAI's chat layout."""
    texts: list[str] = []
    overhead = _TOKENS_OF_REPLY
    for message in chat.messages:
        overhead += _TOKENS_PER_MESSAGE
        texts.append(message.role)
        texts.append(message.content)
        texts += [part.text for part in message.parts]
        if message.name:
            overhead += _TOKENS_PER_NAME
            texts.append(message.name)
        for call in message.tool_calls:
            texts += _call_texts(call)
    for tool in chat.tools:
        overhead += _TOKENS_PER_MESSAGE
        texts += [tool.raw_json, tool.function.name, tool.function.description]
        texts += [tool.function.parameters_schema_json, tool.custom.name, tool.custom.description]
    texts.append(chat.response_format.json_schema.schema_json)
    return [text for text in texts if text], overhead


def _call_texts(call: chat_pb2.ToolCall) -> list[str]:
    if call.WhichOneof("call") == "custom":
        return [call.custom.name, call.custom.input]
    return [call.function.name, call.function.arguments_json]
