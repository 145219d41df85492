"""Counting and listing tokens off the event loop: bounded, fair, and ended with the call.

Encoding runs in two threads, because tiktoken and sentencepiece release the GIL. One serves text
in chunks of milliseconds, a chunk of each call in turn, so that a long text delays nobody. What
cannot be cut (four million letters without a space take seconds) and the loading of a tokenizer
go to the other, where they delay only their like. A call that ends takes what it has in line with
it: at most one chunk is finished in vain.

Each tokenizer is loaded at its first use and kept: there are as many as ranks/ has files (some
270 MB all together) and the configuration names, whatever callers send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from tokenwire.v1 import chat_service_pb2, error_reason_pb2, tokenizer_service_pb2
from tokenwire_service import encodings, layouts
from tokenwire_service.encodings import Chunk, Encoding
from tokenwire_service.errors import GatewayError, Violation, invalid
from tokenwire_service.settings import Model
from tokenwire_service.upstream.request import Turn

T = TypeVar("T")

_LONG = 131_072  # characters of a chunk that goes to the thread of those that cannot be cut


@dataclass(frozen=True)
class Tokenizer:
    """What counts for a model.

    `exact`: whether it is the model's own. `proven`: whether `layout` is too, for calls of the
    shape that the layout names. `file`: a sentencepiece model, if that counts.
    """

    name: str
    exact: bool
    layout: layouts.Layout = layouts.UNKNOWN
    proven: bool = False
    file: Path | None = None


def tokenizer_for(model: str, configured: Model | None = None) -> Tokenizer:
    """The tokenizer configured for a model, or else the one its name tells.

    `model`: its name at the upstream, which tells the layout of a call in any case.
    """
    family = layouts.family_of(model)
    if configured is not None and configured.tokenizer_file is not None:
        path = Path(configured.tokenizer_file)
        return Tokenizer(f"sentencepiece:{path.name}", True, family.layout, file=path)
    if configured is not None and configured.tokenizer is not None:
        name = configured.tokenizer
        same = encodings.file_of(name) == encodings.file_of(family.tokenizer)
        return Tokenizer(name, True, family.layout, family.proven and same)
    proven = family.exact and family.proven
    return Tokenizer(family.tokenizer, family.exact, family.layout, proven)


class TokenCounter:
    """Counts in threads of its own. `max_bytes` bounds the UTF-8 of one request.

    All methods raise INVALID_REQUEST for text beyond the bound, and TOKENIZER_UNAVAILABLE where
    the tokenizer cannot be loaded.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._loaded: dict[str, Encoding] = {}
        self._loading: dict[str, asyncio.Future[Encoding | str]] = {}
        self._chunks = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens-chunks")
        self._long = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens-long")

    def close(self) -> None:
        """Ends the threads; what waits is dropped."""
        for thread in (self._chunks, self._long):
            thread.shutdown(wait=False, cancel_futures=True)

    async def count_text(self, tokenizer: Tokenizer, text: str) -> int:
        """Tokens of one text."""
        self._check_size([text], "text")
        return await self._count(await self._encoding(tokenizer), [text], "text")

    async def count_chat(
        self, tokenizer: Tokenizer, chat: chat_service_pb2.ChatRequest, turns: Sequence[Turn]
    ) -> tuple[int, bool]:
        """(tokens of a call in the layout of its model, whether that is surely their number)."""
        self._check_size(layouts.texts_to_parse(chat), "chat")
        laid, proven = await self._run(
            self._chunks,
            lambda: (
                layouts.lay(tokenizer.layout, chat, turns),
                layouts.is_proven(tokenizer.layout, chat, turns),
            ),
        )
        self._check_size(laid.texts, "chat")
        total = await self._count(await self._encoding(tokenizer), laid.texts, "chat")
        return laid.between + total, proven and tokenizer.proven

    async def tokenize(
        self, tokenizer: Tokenizer, texts: list[str]
    ) -> list[tokenizer_service_pb2.TokenList]:
        """The tokens of each text, as ids and as bytes."""
        self._check_size(texts, "texts")
        encoding = await self._encoding(tokenizer)
        lists = []
        for text in texts:
            found = tokenizer_service_pb2.TokenList()

            def split(chunk: Chunk, into: tokenizer_service_pb2.TokenList = found) -> None:
                ids = encoding.encode(chunk)
                into.ids.extend(ids)
                into.pieces.extend(encoding.pieces(ids))

            for chunk in await self._cut(encoding, text):
                await self._encoded(partial(split, chunk), chunk, "texts")
            lists.append(found)
        return lists

    async def _count(self, encoding: Encoding, texts: list[str], field: str) -> int:
        total = 0
        for text in texts:
            for chunk in await self._cut(encoding, text):
                count = partial(lambda chunk: len(encoding.encode(chunk)), chunk)
                total += await self._encoded(count, chunk, field)
        return total

    async def _cut(self, encoding: Encoding, text: str) -> list[Chunk]:
        if len(text) <= encodings.CHUNK:
            return list(encoding.chunks(text))
        return await self._run(self._chunks, lambda: list(encoding.chunks(text)))

    def _check_size(self, texts: list[str], field: str) -> None:
        size = sum(len(text.encode()) for text in texts)
        if size > self.max_bytes:
            raise invalid(
                Violation(field, f"got {size} bytes of text, expected at most {self.max_bytes}")
            )

    async def _encoded(self, work: Callable[[], T], chunk: Chunk, field: str) -> T:
        thread = self._long if len(chunk.text) > _LONG else self._chunks
        try:
            return await self._run(thread, work)
        except encodings.UnsplittableError:
            raise invalid(Violation(field, "the tokenizer cannot split this text")) from None

    async def _run(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """Runs `work` when its turn comes; never, if the caller is gone by then."""
        return await asyncio.get_running_loop().run_in_executor(thread, work)

    async def _encoding(self, tokenizer: Tokenizer) -> Encoding:
        key = encodings.file_of(tokenizer.name) if tokenizer.file is None else str(tokenizer.file)
        if (encoding := self._loaded.get(key)) is not None:
            return encoding
        if (loading := self._loading.get(key)) is None:
            loading = asyncio.get_running_loop().run_in_executor(
                self._long, partial(_load, key, tokenizer.file)
            )
            self._loading[key] = loading
            loading.add_done_callback(lambda _: self._loading.pop(key))
        loaded = await asyncio.shield(loading)  # others may wait for it too
        if isinstance(loaded, str):
            raise GatewayError(
                error_reason_pb2.ERROR_REASON_TOKENIZER_UNAVAILABLE,
                f"the tokenizer {tokenizer.name} of the gateway cannot be loaded: {loaded}",
            )
        self._loaded[key] = loaded
        return loaded


def _load(key: str, file: Path | None) -> Encoding | str:
    """The encoding, or why it cannot be loaded: a caller who left is not told."""
    try:
        return encodings.load(key) if file is None else encodings.load_sentencepiece(file)
    except encodings.EncodingError as error:
        return str(error)
