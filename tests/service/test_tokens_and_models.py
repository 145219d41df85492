"""TokenizerService and ModelService, and the request id of every call."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
import sentencepiece
from aiohttp import web

from harness import (
    Start,
    Stubs,
    failing,
    provider,
    request,
    stream_request,
    until,
    upstream,
)
from tokenwire.v1 import chat_service_pb2, model_service_pb2, tokenizer_service_pb2
from tokenwire.v1.chat_pb2 import RoleTemplate
from tokenwire_service import encodings
from tokenwire_service.config import Limits, Model, Retries
from tokenwire_service.simulator import Simulator

Simulated = tuple[Simulator, str]

Count = tokenizer_service_pb2.CountTokensRequest
Tokenize = tokenizer_service_pb2.TokenizeRequest
ListModels = model_service_pb2.ListModelsRequest
GetModel = model_service_pb2.GetModelRequest


# --- tokens -----------------------------------------------------------------------------


async def test_tokens_of_a_text_are_counted_and_listed_alike(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    texts = ["Hello, world!", "", "你好 \U0001f600", "<|endoftext|>", " " * 100]
    split = await gateway.tokens.Tokenize(Tokenize(model="gpt-4o", texts=texts))
    assert split.tokenizer == "o200k_base"
    assert [b"".join(tokens.pieces).decode() for tokens in split.lists] == texts
    for text, tokens in zip(texts, split.lists, strict=True):
        counted = await gateway.tokens.CountTokens(Count(model="gpt-4o", text=text))
        assert counted.total_tokens == len(tokens.ids) == len(tokens.pieces)
        assert counted.exact
    assert simulator[0].stats.requests == 0  # no model was asked


@pytest.mark.parametrize(
    ("model", "tokenizer", "exact"),
    [
        ("gpt-4o", "o200k_base", True),
        ("gpt-4", "cl100k_base", True),
        ("qwen-max", "qwen", False),
        ("qwen3-32b", "qwen", True),
        ("text-davinci-003", "p50k_base", True),
        ("gpt-oss-120b", "o200k_harmony", True),
        ("claude-haiku-4.5", "o200k_base", False),
        ("house", "cl100k_base", True),
        ("old-house", "cl100k_base", True),
    ],
)
async def test_the_tokenizer_follows_configuration_then_name(
    start: Start, simulator: Simulated, model: str, tokenizer: str, exact: bool
) -> None:
    house = Model(name="house", aliases=("old-house",), upstream="test", tokenizer="cl100k_base")
    gateway = await start(upstream(simulator[1]), models=(house,))
    counted = await gateway.tokens.CountTokens(Count(model=model, text="Hello, world!"))
    assert (counted.tokenizer, counted.exact) == (tokenizer, exact)


async def test_tokens_of_a_call_grow_with_each_part_of_it(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    chat = request("Hello, world!")
    totals = []
    for step in range(4):
        if step == 1:
            chat.messages.add(role="assistant", content="Good morning.")
        if step == 2:
            chat.tools.add().function.name = "get_weather"
        if step == 3:
            chat.tools[
                0
            ].function.parameters_schema_json = (
                '{"type": "object", "properties": {"city": {"type": "string"}}}'
            )
        counted = await gateway.tokens.CountTokens(Count(model="gpt-4o", chat=chat))
        assert counted.exact == (step < 2)  # how tools are written was never published
        totals.append(counted.total_tokens)
    assert totals[0] == 11  # 3 of the reply, 3 of the message, "user", and 4 of the text
    assert totals == sorted(set(totals))


async def test_a_text_beyond_the_limit_is_refused(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]), limits=Limits(tokenizer_bytes=1024))
    calls = {
        "text": gateway.tokens.CountTokens(Count(model="m", text="é" * 513)),
        "chat": gateway.tokens.CountTokens(Count(model="m", chat=request("x" * 1025))),
        "texts": gateway.tokens.Tokenize(Tokenize(model="m", texts=["x" * 512, "x" * 513])),
    }
    for field, call in calls.items():
        failure = await failing(call)
        assert failure.reason == "INVALID_REQUEST"
        assert set(failure.fields) == {field}
    fits = await gateway.tokens.CountTokens(Count(model="m", text="é" * 512))
    assert fits.total_tokens > 0


async def test_a_million_blanks_and_special_tokens_are_ordinary_text(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    for model in ("gpt-4", "qwen3"):
        text = "x<|endoftext|>" + " " * 1_000_000 + "<|im_start|>"
        counted = await gateway.tokens.CountTokens(Count(model=model, text=text), timeout=50)
        split = await gateway.tokens.Tokenize(Tokenize(model=model, texts=[text]), timeout=50)
        assert b"".join(split.lists[0].pieces).decode() == text
        assert counted.total_tokens == len(split.lists[0].ids)
        assert counted.exact


async def test_a_caller_who_leaves_frees_the_line_for_others(
    start: Start, simulator: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = encodings.BytePairs.encode

    def counting(self: encodings.BytePairs, chunk: encodings.Chunk) -> list[int]:
        encoded.append(len(chunk.text))
        return encode(self, chunk)

    monkeypatch.setattr(encodings.BytePairs, "encode", counting)
    gateway = await start(upstream(simulator[1]), limits=Limits(tokenizer_bytes=64 << 20))
    text = "All work and no play makes Jack a dull boy. " * 200_000
    gone = [gateway.tokens.CountTokens(Count(model="gpt-4o", text=text)) for _ in range(3)]
    await until(lambda: len(encoded) > 3)
    for call in gone:
        call.cancel()
    short = gateway.tokens.CountTokens(Count(model="gpt-4o", text="x"), timeout=50)
    assert (await short).total_tokens == 1
    for call in gone:
        assert await call.code() is grpc.StatusCode.CANCELLED
    assert sum(encoded) < len(text), "hardly any of what nobody waits for was done"


async def test_one_huge_word_delays_no_other_count(start: Start, simulator: Simulated) -> None:
    gateway = await start(upstream(simulator[1]))
    await gateway.tokens.CountTokens(Count(model="gpt-4o", text="x"))  # loaded
    huge = gateway.tokens.CountTokens(Count(model="gpt-4o", text="a" * 3_000_000))
    await asyncio.sleep(0.1)
    for _ in range(5):
        await gateway.tokens.CountTokens(Count(model="gpt-4o", text="a short text"), timeout=5)
    assert not huge.done()
    huge.cancel()


async def test_chats_are_answered_while_texts_of_every_kind_are_counted(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    for model in ("gpt-4o", "qwen3"):
        await gateway.tokens.CountTokens(Count(model=model, text="x"))  # loaded
    texts = ["words and words " * 20_000, "a" * 200_000, " " * 300_000, "e\u0301" * 100_000]
    counts = [
        asyncio.ensure_future(
            asyncio.wait_for(gateway.tokens.CountTokens(Count(model=model, text=text)), 50)
        )
        for model in ("gpt-4o", "qwen3")
        for text in texts
    ]
    answered = 0
    while not all(count.done() for count in counts):
        await gateway.chat.Chat(request())
        answered += 1
    assert [(await count).total_tokens > 1000 for count in counts] == [True] * 8
    assert answered >= 10


async def test_a_tokenizer_that_cannot_be_loaded_is_the_operators_matter(
    start: Start, simulator: Simulated, tmp_path: Path
) -> None:
    gone = Model(name="house", upstream="test", tokenizer_file=str(tmp_path / "tokenizer.model"))
    gateway = await start(upstream(simulator[1]), models=(gone,))
    failure = await failing(gateway.tokens.CountTokens(Count(model="house", text="x")))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.reason == "TOKENIZER_UNAVAILABLE"
    assert failure.pushback == "-1"
    assert str(tmp_path) not in failure.everything
    assert (await gateway.chat.Chat(request(model="house"))).choices[0].message.content


async def test_a_sentencepiece_model_named_by_the_operator_counts(
    start: Start, simulator: Simulated, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["hello world and all the others"] * 50),
            model_writer=model,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    house = Model(name="house", upstream="test", tokenizer_file=str(path))
    gateway = await start(upstream(simulator[1]), models=(house,))
    text = "hello \U0001f600 world"
    split = await gateway.tokens.Tokenize(Tokenize(model="house", texts=[text, ""]))
    assert split.tokenizer == "sentencepiece:tokenizer.model"
    assert b"".join(split.lists[0].pieces).decode() == " " + text
    assert list(split.lists[1].ids) == []
    counted = await gateway.tokens.CountTokens(Count(model="house", text=text))
    assert (counted.total_tokens, counted.exact) == (len(split.lists[0].ids), True)
    chat = await gateway.tokens.CountTokens(Count(model="house", chat=request(text)))
    assert chat.total_tokens > counted.total_tokens
    assert not chat.exact
    listed = await gateway.models.GetModel(GetModel(name="house"))
    assert listed.model.tokenizer == "sentencepiece:tokenizer.model"


async def test_a_call_is_counted_as_the_upstream_gets_it(
    start: Start, simulator: Simulated
) -> None:
    house = Model(
        name="house",
        upstream="test",
        upstream_model="gpt-4o",
        role_templates=(RoleTemplate(role="narrator", api_role="user", begin="Once: "),),
    )
    gateway = await start(upstream(simulator[1]), models=(house,))
    wrapped = request("hello", model="house")
    wrapped.messages[0].role = "narrator"
    plain = request("Once: hello", model="house")
    totals = [
        await gateway.tokens.CountTokens(Count(model="house", chat=chat))
        for chat in (wrapped, plain)
    ]
    assert totals[0] == totals[1]
    assert totals[0].exact
    wrapped.messages[0].role = "bard"
    failure = await failing(gateway.tokens.CountTokens(Count(model="house", chat=wrapped)))
    assert failure.reason == "UNKNOWN_ROLE"
    assert set(failure.fields) == {"chat.messages[0].role"}


async def test_a_default_that_may_change_the_prompt_makes_a_count_an_approximation(
    start: Start, simulator: Simulated
) -> None:
    house = Model(name="house", upstream="test", upstream_model="qwen3")
    house.defaults.enable_thinking = False
    gateway = await start(upstream(simulator[1]), models=(house,))
    for model, exact in (("qwen3", True), ("house", False)):
        counted = await gateway.tokens.CountTokens(Count(model=model, chat=request()))
        assert counted.exact == exact


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda g: g.tokens.CountTokens(Count(text="x")), "model"),
        (lambda g: g.tokens.CountTokens(Count(model="m")), "input"),
        (
            lambda g: g.tokens.CountTokens(
                Count(model="m", chat=chat_service_pb2.ChatRequest(model="m"))
            ),
            "chat.messages",
        ),
        (lambda g: g.tokens.Tokenize(Tokenize(texts=["x"])), "model"),
        (lambda g: g.tokens.Tokenize(Tokenize(model="m", texts=["x"] * 257)), "texts"),
        (lambda g: g.models.GetModel(GetModel()), "name"),
        (lambda g: g.models.ListModels(ListModels(page_token="x")), "page_token"),
        (lambda g: g.models.ListModels(ListModels(page_token="9" * 5000)), "page_token"),
        (lambda g: g.models.ListModels(ListModels(page_token="-1")), "page_token"),
    ],
)
async def test_a_mistake_is_named_by_its_field(
    start: Start, simulator: Simulated, call: Any, field: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    failure = await failing(call(gateway))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(failure.fields) == {field}


async def test_a_model_that_leads_nowhere_has_no_tokenizer(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1], passthrough=False))
    failure = await failing(gateway.tokens.CountTokens(Count(model="m", text="x")))
    assert failure.code is grpc.StatusCode.NOT_FOUND
    assert failure.reason == "MODEL_NOT_FOUND"


async def test_counting_leaves_the_event_loop_to_the_streams(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    long_text = "All work and no play makes Jack a dull boy. " * 20_000
    counting = asyncio.ensure_future(
        asyncio.wait_for(gateway.tokens.CountTokens(Count(model="gpt-4o", text=long_text)), 30)
    )
    whole = await gateway.chat.Chat(request())  # answered while the count is under way
    assert whole.choices[0].message.content != ""
    assert (await counting).total_tokens > 100_000


# --- models -----------------------------------------------------------------------------


def models(*names: str) -> tuple[Model, ...]:
    return tuple(Model(name=name, upstream="test") for name in names)


async def test_configured_models_come_in_pages(start: Start, simulator: Simulated) -> None:
    names = [f"model-{number}" for number in range(7)]
    gateway = await start(upstream(simulator[1], passthrough=False), models=models(*names))
    listed: list[str] = []
    sizes = []
    token = ""
    while True:
        page = await gateway.models.ListModels(ListModels(page_size=3, page_token=token))
        sizes.append(len(page.models))
        listed += [model.name for model in page.models]
        token = page.next_page_token
        if not token:
            break
    assert sizes == [3, 3, 1]
    assert listed == names
    beyond = await gateway.models.ListModels(ListModels(page_token="1000"))
    assert list(beyond.models) == []


async def test_a_page_has_a_hundred_models_unless_told_otherwise(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": f"m{number}"} for number in range(250)]})

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        first = await gateway.models.ListModels(ListModels())
        whole = await gateway.models.ListModels(ListModels(page_size=1000))
    assert len(first.models) == 100
    assert len(whole.models) == 250
    assert whole.next_page_token == ""


async def test_a_listing_joins_what_is_configured_and_what_the_upstream_serves(
    start: Start, simulator: Simulated
) -> None:
    house = Model(
        name="house",
        aliases=("old-house",),
        upstream="test",
        upstream_model="simulated-large",
        context_window_tokens=8192,
        max_completion_tokens=512,
        capabilities=("tools",),
    )
    shadow = Model(name="simulated-small", upstream="test", tokenizer="cl100k_base")
    gateway = await start(upstream(simulator[1]), models=(house, shadow))
    listed = (await gateway.models.ListModels(ListModels())).models
    assert [model.name for model in listed] == [
        "house",
        "simulated-small",
        "simulated-large",
        "simulated-thinker",
    ]
    assert listed[0] == model_service_pb2.Model(
        name="house",
        aliases=["old-house"],
        upstream="test",
        upstream_model="simulated-large",
        context_window_tokens=8192,
        max_completion_tokens=512,
        capabilities=["tools"],
        tokenizer="o200k_base",
    )
    assert listed[1].tokenizer == "cl100k_base"
    assert listed[1].extra_json == ""
    assert (listed[2].upstream, listed[2].upstream_model) == ("test", "simulated-large")
    assert json.loads(listed[2].extra_json)["owned_by"] == "tokenwire-simulator"


async def test_one_model_is_found_by_name_by_alias_and_at_the_upstream(
    start: Start, simulator: Simulated
) -> None:
    house = Model(name="house", aliases=("old-house",), upstream="test")
    gateway = await start(upstream(simulator[1]), models=(house,))
    for name, found in (
        ("house", "house"),
        ("old-house", "house"),
        ("simulated-small", "simulated-small"),
    ):
        answer = await gateway.models.GetModel(GetModel(name=name))
        assert answer.model.name == found
        assert answer.model.tokenizer == "o200k_base"
    failure = await failing(gateway.models.GetModel(GetModel(name="nobody")))
    assert failure.code is grpc.StatusCode.NOT_FOUND
    assert failure.reason == "MODEL_NOT_FOUND"
    resource = failure.details["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("model", "nobody")


async def test_configured_models_are_known_while_the_upstream_is_down(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    async with provider(answer) as served:
        once = Retries(max_attempts=1)
        gateway = await start(upstream(served.base_url), models=models("house"), retries=once)
        assert (await gateway.models.GetModel(GetModel(name="house"))).model.name == "house"
        assert served.asked == []
        failure = await failing(gateway.models.ListModels(ListModels()))
    assert failure.reason == "UPSTREAM_ERROR"


@pytest.mark.parametrize("status", [404, 405])
async def test_an_upstream_without_a_list_adds_nothing_to_it(start: Start, status: int) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        return web.json_response({"detail": "Not Found"}, status=status)

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url), models=models("house"))
        listed = await gateway.models.ListModels(ListModels())
        assert [model.name for model in listed.models] == ["house"]
        failure = await failing(gateway.models.GetModel(GetModel(name="other")))
    assert failure.reason == "MODEL_NOT_FOUND"


async def test_a_listing_uses_the_second_key_where_the_first_is_refused(start: Start) -> None:
    async def answer(asked: web.Request) -> web.StreamResponse:
        if asked.headers["authorization"].endswith("k1"):
            return web.Response(status=429, headers={"retry-after": "60"})
        return web.json_response({"data": [{"id": "a"}]})

    async with provider(answer) as served:
        gateway = await start(upstream(served.base_url))
        listed = await gateway.models.ListModels(ListModels())
    assert [model.name for model in listed.models] == ["a"]
    assert [asked.path for asked in served.asked] == ["/v1/models"] * 2


# --- request ids ------------------------------------------------------------------------


def calls_of(gateway: Stubs, chat: chat_service_pb2.ChatRequest, **options: Any) -> list[Any]:
    """One call of each kind."""
    items = chat_service_pb2.BatchChatRequest()
    items.items.add(chat=chat)
    return [
        gateway.chat.Chat(chat, **options),
        gateway.chat.StreamChat(stream_request(chat), **options),
        gateway.chat.BatchChat(items, **options),
        gateway.tokens.CountTokens(Count(model="m", text="x"), **options),
        gateway.models.ListModels(ListModels(), **options),
    ]


async def finished(call: Any) -> dict[str, Any]:
    """The trailers of a call that is read to its end."""
    if isinstance(call, grpc.aio.UnaryUnaryCall):
        await call
    else:
        assert [message async for message in call] != []
    return dict(await call.trailing_metadata())


async def test_the_callers_request_id_comes_back_and_stands_in_the_log(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    metadata = (("x-request-id", "abc-123/XYZ"),)
    calls = calls_of(gateway, request(), metadata=metadata)
    for call in calls:
        assert (await finished(call))["x-request-id"] == "abc-123/XYZ"
    assert {call.request_id for call in gateway.events.calls} == {"abc-123/XYZ"}
    assert {attempt.request_id for attempt in gateway.events.attempts} == {"abc-123/XYZ"}
    failure = await failing(gateway.chat.Chat(request(model=""), metadata=metadata))
    assert failure.trailers["x-request-id"] == failure.metadata["requestId"] == "abc-123/XYZ"


@pytest.mark.parametrize("sent", ["", "two words", "x" * 129])
async def test_a_request_id_unfit_for_the_log_is_replaced(
    start: Start, simulator: Simulated, sent: str
) -> None:
    gateway = await start(upstream(simulator[1]))
    metadata = (("x-request-id", sent),)
    trailers = await finished(gateway.chat.Chat(request(), metadata=metadata))
    assert trailers["x-request-id"] != sent
    assert len(trailers["x-request-id"]) == 32


async def test_each_call_without_a_request_id_gets_one_of_its_own(
    start: Start, simulator: Simulated
) -> None:
    gateway = await start(upstream(simulator[1]))
    found = {(await finished(call))["x-request-id"] for call in calls_of(gateway, request())}
    assert len(found) == 5
    assert found == {call.request_id for call in gateway.events.calls}
