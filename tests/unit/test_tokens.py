"""Counting is right, off the event loop, bounded, fair, and ended with the call."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from harness import request, until
from tokenwire.v1 import chat_service_pb2, error_reason_pb2
from tokenwire_service import encodings, layouts
from tokenwire_service.encodings import CHUNK, BytePairs, Chunk, EncodingError
from tokenwire_service.errors import GatewayError
from tokenwire_service.settings import Model
from tokenwire_service.tokens import TokenCounter, Tokenizer, tokenizer_for

O200K = Tokenizer("o200k_base", exact=True, layout=layouts.OPENAI, proven=True)
CL100K = Tokenizer("cl100k_base", exact=True, layout=layouts.OPENAI, proven=True)

Encodings = dict[str, BytePairs]


@pytest.fixture(scope="module")
def loaded() -> Encodings:
    """Encodings, read once: they take half a second each."""
    return {name: encodings.load(name) for name in ("o200k_base", "cl100k_base")}


@pytest.fixture
async def counter(
    loaded: Encodings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[TokenCounter]:
    monkeypatch.setattr(encodings, "load", loaded.__getitem__)
    counting = TokenCounter(4 << 20)
    yield counting
    counting.close()
    for thread in threading.enumerate():
        if thread.name.startswith("tokens"):
            thread.join(20)
            assert not thread.is_alive()


async def counted(
    counter: TokenCounter, tokenizer: Tokenizer, chat: chat_service_pb2.ChatRequest
) -> int:
    total, _ = await counter.count_chat(tokenizer, chat, layouts.as_written(chat))
    return total


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
    assert await counter.count_chat(tokenizer, chat, layouts.as_written(chat)) == (total, True)


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
            chat.tools.add().function.parameters_schema_json = (
                '{"properties":{"word":{"type":"string"}}}'
            )
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
    for layout in (layouts.OPENAI, layouts.CHATML):  # tools as types, and as JSON
        tokenizer = Tokenizer("o200k_base", exact=True, layout=layout)
        plain = await counted(counter, tokenizer, request())
        assert await counted(counter, tokenizer, grown(field)) > plain


# --- which tokenizer --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name", "exact"),
    [
        ("gpt-4o-mini", "o200k_base", True),
        ("gpt-4.1", "o200k_base", True),
        ("o1", "o200k_base", True),
        ("o3-mini", "o200k_base", True),
        ("o4-mini-2025-04-16", "o200k_base", True),
        ("gpt-5", "o200k_base", True),
        ("gpt-5.2_2025-12-11", "o200k_base", True),
        ("openai/gpt-5-mini", "o200k_base", True),
        ("ft:gpt-4o:acme::abc", "o200k_base", True),
        ("GPT-4O", "o200k_base", True),
        ("gpt-4", "cl100k_base", True),
        ("gpt-4-turbo", "cl100k_base", True),
        ("gpt-35-turbo", "cl100k_base", True),
        ("gpt-3.5-turbo-0125", "cl100k_base", True),
        ("gpt-oss-120b", "o200k_harmony", True),
        ("openai/gpt-oss-20b", "o200k_harmony", True),
        ("openai.gpt-oss-safeguard-20b", "o200k_harmony", True),
        ("gpt-oss:120b", "o200k_harmony", True),
        ("text-davinci-003", "p50k_base", True),
        ("davinci", "p50k_base", False),
        ("qwen3", "qwen", True),
        ("qwen/qwen3-32b", "qwen", True),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen", True),
        ("qwen-7b-chat", "qwen", True),
        ("qwen-max", "qwen", False),  # a name for whatever is newest
        ("qwen3.5-plus", "qwen", False),  # has a vocabulary of its own
        ("gpt-40", "o200k_base", False),
        ("o10", "o200k_base", False),
        ("deepseek-r1-distill-qwen-32b", "o200k_base", False),
        ("claude-haiku-4.5", "o200k_base", False),
        ("", "o200k_base", False),
    ],
)
def test_a_models_name_tells_its_tokenizer(model: str, name: str, exact: bool) -> None:
    found = tokenizer_for(model)
    assert (found.name, found.exact) == (name, exact)
    assert exact or not found.proven


@pytest.mark.parametrize("name", encodings.VENDORED)
def test_a_configured_tokenizer_wins_over_the_name(name: str) -> None:
    configured = Model(name="house", upstream="u", upstream_model="gpt-4o", tokenizer=name)  # type: ignore[arg-type]
    found = tokenizer_for("gpt-4o", configured)
    assert (found.name, found.exact) == (name, True)
    # The layout goes with the model; it is proven for its own tokens alone.
    assert found.layout is layouts.OPENAI
    assert found.proven == name.startswith("o200k")


def test_a_configured_file_wins_over_the_name_and_is_told_by_its_own() -> None:
    configured = Model(name="house", upstream="u", tokenizer_file="/secret/place/tokenizer.model")
    found = tokenizer_for("internlm2_5-7b-chat", configured)
    assert (found.name, found.exact, found.proven) == ("sentencepiece:tokenizer.model", True, False)


# --- bounds -----------------------------------------------------------------------------


async def test_a_million_blanks_and_special_tokens_are_ordinary_text(
    counter: TokenCounter,
) -> None:
    blanks = " " * 1_000_000
    # As tiktoken's table has it: 128 blanks are one token in both, more in none.
    assert await counter.count_text(O200K, blanks) == 7_813
    assert await counter.count_text(O200K, f"x{blanks}<|endoftext|>y") > 7_813
    [tokens] = await counter.tokenize(O200K, [f"x{blanks}<|endoftext|>y"])
    assert b"".join(tokens.pieces) == f"x{blanks}<|endoftext|>y".encode()
    assert await counted(counter, O200K, request(blanks)) > 7_813


class Slow:
    """An encoding whose chunks wait until they are let go; it tells what it encoded."""

    def __init__(self, chunks: int = 3) -> None:
        self.go = threading.Event()
        self.encoded: list[str] = []
        self._chunks = chunks

    def chunks(self, text: str) -> Iterator[Chunk]:
        for i in range(self._chunks if text.startswith("long") else 1):
            yield Chunk(f"{text}-{i}")

    def encode(self, chunk: Chunk) -> list[int]:
        assert self.go.wait(10)
        self.encoded.append(chunk.text)
        return [1]

    def pieces(self, ids: list[int]) -> list[bytes]:
        return [b"x"] * len(ids)


@pytest.fixture
async def slow(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[TokenCounter, Slow]]:
    encoding = Slow()
    monkeypatch.setattr(encodings, "load", lambda _name: encoding)
    counting = TokenCounter(1 << 20)
    yield counting, encoding
    encoding.go.set()
    counting.close()


async def test_calls_take_turns_chunk_by_chunk(slow: tuple[TokenCounter, Slow]) -> None:
    counter, encoding = slow
    both = [asyncio.create_task(counter.count_text(O200K, text)) for text in ("long", "short")]
    encoding.go.set()
    assert await asyncio.gather(*both) == [3, 1]
    assert encoding.encoded.index("short-0") < encoding.encoded.index("long-2")


async def test_a_cancelled_call_leaves_the_line(slow: tuple[TokenCounter, Slow]) -> None:
    counter, encoding = slow
    encoding.go.set()
    await counter.count_text(O200K, "warm")
    encoding.go.clear()
    gone = asyncio.create_task(counter.count_text(O200K, "long"))
    waiting = asyncio.create_task(counter.tokenize(O200K, ["long too"]))
    await asyncio.sleep(0.05)  # the first chunk is under way, the other call in line
    for task in (gone, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    encoding.go.set()
    assert await counter.count_text(O200K, "next") == 1
    assert encoding.encoded == ["warm-0", "long-0", "next-0"]


async def test_what_cannot_be_cut_delays_no_other_text(
    loaded: Encodings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blocking(BytePairs):
        def __init__(self) -> None:
            self.go = threading.Event()
            self.entered = False

        def chunks(self, text: str) -> Iterator[Chunk]:
            return loaded["o200k_base"].chunks(text)

        def encode(self, chunk: Chunk) -> list[int]:
            if len(chunk.text) > 1_000_000:
                self.entered = True
                assert self.go.wait(20)
            return loaded["o200k_base"].encode(chunk)

    blocking = Blocking()
    monkeypatch.setattr(encodings, "load", lambda _name: blocking)
    counter = TokenCounter(4 << 20)
    try:
        huge = asyncio.create_task(counter.count_text(O200K, "a" * 1_000_001))
        await until(lambda: blocking.entered)
        assert await counter.count_text(O200K, "a long text, " * 20_000) > 60_000
        assert not huge.done()
        huge.cancel()
        with pytest.raises(asyncio.CancelledError):
            await huge
    finally:
        blocking.go.set()
        counter.close()


async def test_one_load_serves_all_who_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    loads = []

    def load(name: str) -> Slow:
        loads.append(name)
        assert go.wait(10)
        ready = Slow()
        ready.go.set()
        return ready

    monkeypatch.setattr(encodings, "load", load)
    counter = TokenCounter(100)
    try:
        first, second = (asyncio.create_task(counter.count_text(O200K, "x")) for _ in range(2))
        await until(lambda: loads != [])
        first.cancel()  # who came first may leave
        with pytest.raises(asyncio.CancelledError):
            await first
        go.set()
        assert await second == 1
        assert await counter.count_text(O200K, "x") == 1
        harmony = Tokenizer("o200k_harmony", exact=True)
        assert await counter.count_text(harmony, "x") == 1  # the same ranks
        assert loads == ["o200k_base"]
    finally:
        counter.close()


async def test_a_tokenizer_that_cannot_be_loaded_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(_name: str) -> Slow:
        if broken:
            raise EncodingError("the rank file of o200k_base is not the published one")
        ready = Slow()
        ready.go.set()
        return ready

    broken = True
    monkeypatch.setattr(encodings, "load", load)
    counter = TokenCounter(100)
    try:
        for _ in range(2):
            with pytest.raises(GatewayError, match="rank file of o200k_base is not") as caught:
                await counter.count_text(O200K, "x")
            assert caught.value.reason == error_reason_pb2.ERROR_REASON_TOKENIZER_UNAVAILABLE
        gone = Tokenizer("sentencepiece:m", exact=True, file=tmp_path / "m")
        with pytest.raises(GatewayError, match="No such file") as caught:
            await counter.tokenize(gone, ["x"])
        assert str(tmp_path) not in str(caught.value)
        broken = False
        assert await counter.count_text(O200K, "x") == 1
    finally:
        counter.close()


async def test_a_text_the_tokenizer_gives_up_on_is_the_callers_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class GivesUp(Slow):
        def encode(self, chunk: Chunk) -> list[int]:
            raise encodings.UnsplittableError

    monkeypatch.setattr(encodings, "load", lambda _name: GivesUp())
    counter = TokenCounter(100)
    try:
        for field, call in (
            ("text", counter.count_text(O200K, "x")),
            ("texts", counter.tokenize(O200K, ["x"])),
            ("chat", counted(counter, O200K, request("x"))),
        ):
            with pytest.raises(GatewayError, match="cannot split this text") as caught:
                await call
            assert [violation.field for violation in caught.value.violations] == [field]
    finally:
        counter.close()


@pytest.mark.parametrize(
    "text",
    [
        "a long text, " * 10_000,
        "a" * 200_000,
        " " * 200_000,
        "e\u0301" * 100_000,
    ],
    ids=["words", "one word", "blanks", "marks"],
)
async def test_the_event_loop_goes_on_while_it_counts(counter: TokenCounter, text: str) -> None:
    await counter.count_text(O200K, "x")  # loaded
    turns = 0
    counting = asyncio.create_task(counter.count_text(O200K, text))
    while not counting.done():
        turns += 1
        await asyncio.sleep(0)
    assert await counting > 1000
    assert turns > 50, "counting held the event loop"


async def test_the_size_of_all_texts_together_is_bounded_in_bytes(counter: TokenCounter) -> None:
    small = TokenCounter(10)
    schema = request("x")
    schema.tools.add().function.parameters_schema_json = "[" * 11
    try:
        for field, call in (
            ("text", small.count_text(O200K, "ä" * 5 + "a")),
            ("texts", small.tokenize(O200K, ["ä" * 3, "ä" * 3])),
            ("chat", counted(small, O200K, request("ä" * 6))),
            ("chat", counted(small, O200K, schema)),
        ):
            with pytest.raises(GatewayError) as caught:
                await call
            assert [violation.field for violation in caught.value.violations] == [field]
            assert "at most 10" in caught.value.violations[0].description
        assert await small.count_text(O200K, "ä" * 5) > 0  # exactly the bound
    finally:
        small.close()


async def test_chunks_count_as_their_text(counter: TokenCounter, loaded: Encodings) -> None:
    text = "The quick brown fox; it's 12,345 o'clock\n\n" * (4 * CHUNK // 40)
    assert len(list(loaded["o200k_base"].chunks(text))) > 3
    whole = sum(len(loaded["o200k_base"].encode(chunk)) for chunk in [Chunk(text)])
    assert await counter.count_text(O200K, text) == whole
