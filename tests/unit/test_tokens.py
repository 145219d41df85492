"""Counting is right, off the event loop, bounded, and needs nothing but the package."""

import asyncio
import lzma
import socket
import threading
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import NoReturn

import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import request
from tokenwire.v1 import chat_service_pb2, error_reason_pb2
from tokenwire_service import tokens
from tokenwire_service.errors import GatewayError
from tokenwire_service.tokens import TokenCounter, Tokenizer, load_encoding, tokenizer_for

O200K = Tokenizer("o200k_base", exact=True)
CL100K = Tokenizer("cl100k_base", exact=True)


@pytest.fixture(scope="module")
def loaded() -> dict[str, tiktoken.Encoding]:
    """Both encodings, read once: they take half a second each."""
    return {name: load_encoding(name) for name in ("o200k_base", "cl100k_base")}


@pytest.fixture
async def counter(
    loaded: dict[str, tiktoken.Encoding], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[TokenCounter]:
    monkeypatch.setattr(tokens, "load_encoding", loaded.__getitem__)
    counting = TokenCounter(4 << 20)
    yield counting
    counting.close()
    for thread in threading.enumerate():
        if thread.name.startswith("tokens"):
            thread.join(10)
            assert not thread.is_alive()


# --- ids --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "text", "ids"),
    [
        (O200K, "hello world", [24912, 2375]),
        (CL100K, "hello world", [15339, 1917]),
        (O200K, "", []),
        (CL100K, "", []),
    ],
)
async def test_known_texts_have_their_known_ids(
    counter: TokenCounter, tokenizer: Tokenizer, text: str, ids: list[int]
) -> None:
    assert [list(each.ids) for each in await counter.tokenize(tokenizer, [text])] == [ids]
    assert await counter.count_text(tokenizer, text) == len(ids)


async def test_each_text_is_split_on_its_own(counter: TokenCounter) -> None:
    lists = await counter.tokenize(O200K, ["hello world", "", "hello"])
    assert [list(each.ids) for each in lists] == [[24912, 2375], [], [24912]]
    assert [list(each.pieces) for each in lists] == [[b"hello", b" world"], [], [b"hello"]]
    assert await counter.tokenize(O200K, []) == []


@pytest.mark.parametrize("tokenizer", [O200K, CL100K], ids=lambda tokenizer: tokenizer.name)
@pytest.mark.parametrize(
    "text", ["<|endoftext|>", "a<|im_start|>b", "<|endofprompt|><|fim_prefix|>"]
)
async def test_the_text_of_a_special_token_is_plain_text(
    counter: TokenCounter, tokenizer: Tokenizer, text: str
) -> None:
    [split] = await counter.tokenize(tokenizer, [text])
    assert len(split.ids) > 3
    assert b"".join(split.pieces) == text.encode()


@given(st.text(max_size=60))
@settings(max_examples=60)
def test_the_pieces_are_the_text(loaded: dict[str, tiktoken.Encoding], text: str) -> None:
    for encoding in loaded.values():
        ids = encoding.encode(text, disallowed_special=())
        assert b"".join(encoding.decode_tokens_bytes(ids)) == text.encode()


# --- chats ------------------------------------------------------------------------------

# The example of OpenAI's cookbook and the counts that its API reported for it.
EXAMPLE = [
    (
        "system",
        "",
        "You are a helpful, pattern-following assistant that translates corporate jargon into "
        "plain English.",
    ),
    ("system", "example_user", "New synergies will help drive top-line growth."),
    ("system", "example_assistant", "Things working well together will increase revenue."),
    (
        "system",
        "example_user",
        "Let's circle back when we have more bandwidth to touch base on opportunities for "
        "increased leverage.",
    ),
    (
        "system",
        "example_assistant",
        "Let's talk later when we're less busy about how to do better.",
    ),
    (
        "user",
        "",
        "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    ),
]


@pytest.mark.parametrize(("tokenizer", "total"), [(CL100K, 129), (O200K, 124)])
async def test_a_chat_counts_as_the_provider_counts_it(
    counter: TokenCounter, tokenizer: Tokenizer, total: int
) -> None:
    chat = chat_service_pb2.ChatRequest()
    for role, name, content in EXAMPLE:
        chat.messages.add(role=role, name=name, content=content)
    assert await counter.count_chat(tokenizer, chat) == total


def grown(field: str) -> chat_service_pb2.ChatRequest:
    """A chat that has one more thing in it."""
    chat = request()
    message = chat.messages[0]
    match field:
        case "message":
            chat.messages.add(role="user", content="word")
        case "name":
            message.name = "word"
        case "part":
            message.ClearField("content")
            message.parts.add(text="hello")
            message.parts.add(text="word")
        case "call":
            message.tool_calls.add().function.arguments_json = "word"
        case "custom call":
            message.tool_calls.add().custom.input = "word"
        case "function":
            chat.tools.add().function.name = "word"
        case "schema":
            chat.tools.add().function.parameters_schema_json = '{"word":1}'
        case "custom tool":
            chat.tools.add().custom.description = "word"
        case "raw tool":
            chat.tools.add(raw_json='{"word":1}')
        case "format":
            chat.response_format.json_schema.schema_json = '{"word":1}'
    return chat


@pytest.mark.parametrize(
    "field",
    [
        *("message", "name", "part", "call", "custom call", "function", "schema"),
        *("custom tool", "raw tool", "format"),
    ],
)
async def test_all_that_the_model_sees_is_counted(counter: TokenCounter, field: str) -> None:
    plain = await counter.count_chat(O200K, request())
    assert await counter.count_chat(O200K, grown(field)) > plain


# --- which tokenizer --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "configured", "expected"),
    [
        ("gpt-4o-mini", None, O200K),
        ("gpt-4", None, CL100K),
        ("gpt-oss-120b", None, O200K),  # o200k_harmony: the same ranks
        ("text-davinci-003", None, Tokenizer("o200k_base", exact=False)),  # has another one
        ("qwen-max", None, Tokenizer("o200k_base", exact=False)),
        ("", None, Tokenizer("o200k_base", exact=False)),
        ("qwen-max", "cl100k_base", CL100K),
        ("gpt-4", "o200k_base", O200K),
    ],
)
def test_the_tokenizer_is_the_configured_one_or_told_by_the_name(
    model: str, configured: str | None, expected: Tokenizer
) -> None:
    assert tokenizer_for(model, configured) == expected


# --- bounds -----------------------------------------------------------------------------


async def test_text_that_the_tokenizer_cannot_split_is_refused_and_nothing_breaks(
    counter: TokenCounter,
) -> None:
    for field, call in (
        ("text", counter.count_text(O200K, " " * 1_000_000)),
        ("texts", counter.tokenize(O200K, [" " * 1_000_000])),
        ("chat", counter.count_chat(O200K, request(" " * 1_000_000))),
    ):
        with pytest.raises(GatewayError) as caught:
            await call
        assert caught.value.reason == error_reason_pb2.ERROR_REASON_INVALID_REQUEST
        assert [violation.field for violation in caught.value.violations] == [field]
    assert await counter.count_text(O200K, "hello world") == 2


async def test_a_panic_of_the_tokenizer_is_a_refusal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):  # what Rust extensions raise
        pass

    class Panicking:
        def encode(self, text: str, disallowed_special: object) -> NoReturn:
            raise PanicException(text)

    monkeypatch.setattr(tokens, "load_encoding", lambda _name: Panicking())
    counting = TokenCounter(100)
    try:
        with pytest.raises(GatewayError, match="cannot split this text"):
            await counting.count_text(O200K, "x")
    finally:
        counting.close()


async def test_the_event_loop_goes_on_while_it_counts(counter: TokenCounter) -> None:
    turns = 0
    counting = asyncio.create_task(counter.count_text(O200K, "a long text, " * 10_000))
    while not counting.done():
        turns += 1
        await asyncio.sleep(0)
    assert await counting > 30_000
    assert turns > 50, "counting held the event loop"


async def test_the_size_of_all_texts_together_is_bounded_in_bytes() -> None:
    small = TokenCounter(10)
    try:
        for field, call in (
            ("text", small.count_text(O200K, "ä" * 5 + "a")),
            ("texts", small.tokenize(O200K, ["ä" * 3, "ä" * 3])),
            ("chat", small.count_chat(O200K, request("ä" * 6))),
        ):
            with pytest.raises(GatewayError) as caught:
                await call
            assert [violation.field for violation in caught.value.violations] == [field]
            assert "at most 10" in caught.value.violations[0].description
    finally:
        small.close()


async def test_a_text_of_exactly_the_bound_is_counted(
    loaded: dict[str, tiktoken.Encoding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "load_encoding", loaded.__getitem__)
    small = TokenCounter(10)
    try:
        assert await small.count_text(O200K, "ä" * 5) > 0
    finally:
        small.close()


# --- rank files -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o200k_base", "cl100k_base"])
def test_no_network_is_needed_and_tiktoken_stays_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # empty: no earlier download helps
    before = tiktoken_ext.openai_public.load_tiktoken_bpe
    assert load_encoding(name).encode("hello world")
    assert tiktoken_ext.openai_public.load_tiktoken_bpe is before
    assert list(tmp_path.iterdir()) == []


def packed(name: str) -> bytes:
    return resources.files("tokenwire_service").joinpath(f"ranks/{name}.tiktoken.xz").read_bytes()


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "exchanged", "no archive"])
def test_a_rank_file_that_is_not_the_published_one_is_refused(
    damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = packed("cl100k_base")
    content = {
        "changed": lzma.compress(lzma.decompress(whole).replace(b" 7\n", b" 8\n", 1), preset=0),
        "cut": whole[:-1000],
        "empty": b"",
        "exchanged": packed("o200k_base"),
        "no archive": b"hello",
    }[damage]
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks/cl100k_base.tiktoken.xz").write_bytes(content)
    monkeypatch.setattr(resources, "files", lambda _package: tmp_path)
    with pytest.raises(ValueError, match="rank file of cl100k_base is not the published one"):
        load_encoding("cl100k_base")


def test_a_tiktoken_that_expects_other_ranks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def definition() -> NoReturn:
        load_tiktoken_bpe("https://other", expected_hash="0" * 64)  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError

    monkeypatch.setattr(tiktoken_ext.openai_public, "cl100k_base", definition)
    with pytest.raises(ValueError, match="tiktoken expects another rank file"):
        load_encoding("cl100k_base")
