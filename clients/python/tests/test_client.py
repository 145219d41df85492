"""Both clients against a gateway on a real socket: what each call sends and gives back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from tokenwire import Accumulator, Client, TokenwireError
from tokenwire.core import Core
from tokenwire.testing import FakeGateway, tool_call
from tokenwire.v1.chat_pb2 import ChatMessage, Usage
from tokenwire.v1.chat_service_pb2 import (
    BatchChatItem,
    BatchChatResponse,
    ChatRequest,
    ChatResponse,
    Delta,
    StreamChatResponse,
    StreamMode,
)
from tokenwire.v1.model_service_pb2 import GetModelResponse, ListModelsResponse
from tokenwire.v1.tokenizer_service_pb2 import TokenizeResponse, TokenList

# --- chat ---------------------------------------------------------------------------


def test_chat(client: Any, gateway: FakeGateway) -> None:
    gateway.reply("Hello", " world", usage=Usage(prompt_tokens=3, completion_tokens=2))

    reply = client.call("chat", "Hi", model="m", temperature=0.0, request_id="r-1")

    assert reply.text == "Hello world"
    assert reply.message == ChatMessage(role="assistant", content="Hello world")
    assert reply.finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 2)
    assert (reply.header.model, reply.header.upstream) == ("m", "fake")
    assert reply.request_id == "r-1"
    assert reply.reasoning == reply.refusal == ""
    assert reply.tool_calls == ()
    [call] = gateway.calls
    assert call.request.model == "m"
    assert call.request.messages[0].content == "Hi"
    assert call.request.params.HasField("temperature")
    assert call.metadata["x-request-id"] == "r-1"


def test_tools_there_and_back(client: Any, gateway: FakeGateway) -> None:
    gateway.reply(
        tool_call("weather", {"city": "Oslo"}, id="c1"),
        tool_call("weather", {"city": "Rome"}, id="c2", index=1),
    ).reply("Cold and warm.")
    tools = [{"name": "weather", "parameters": {"type": "object"}}]

    asked = client.call("chat", "Oslo or Rome?", model="m", tools=tools)
    answers = [call.answer({"city": call.arguments["city"]}) for call in asked.tool_calls]
    told = client.call("chat", [{"role": "user", "content": "?"}, asked, *answers], model="m")

    assert asked.finish_reason == "tool_calls"
    assert asked.text == ""
    assert not asked.message.HasField("content")  # null, as upstreams want it back
    assert told.text == "Cold and warm."
    _, assistant, first, second = gateway.calls[1].request.messages
    assert assistant == asked.message
    assert [first.tool_call_id, second.tool_call_id] == ["c1", "c2"]
    assert (first.role, json.loads(first.content)) == ("tool", {"city": "Oslo"})


def test_a_ready_request_is_sent_as_it_is(client: Any, gateway: FakeGateway) -> None:
    gateway.reply("ok").reply("ok")
    request = ChatRequest(model="m", messages=[ChatMessage(role="environment", content="x")])
    before = ChatRequest.FromString(request.SerializeToString())

    client.call("chat", request)
    client.call("chat", request, model="other", seed=7)

    assert gateway.calls[0].request == before == request
    assert (gateway.calls[1].request.model, gateway.calls[1].request.params.seed) == ("other", 7)


def test_several_choices(client: Any, gateway: FakeGateway) -> None:
    gateway.reply(Delta(choice_index=1, content="zwei"), Delta(content="one"), Delta(content="!"))

    reply = client.call("chat", "Count", model="m", choice_count=2)

    assert [choice.text for choice in reply.choices] == ["one!", "zwei"]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "stop"]


def test_an_answer_in_json(client: Any, gateway: FakeGateway) -> None:
    gateway.reply('{"ok": true}').reply('{"ok": tr', finish_reason="length")
    schema = {"type": "object", "title": "Is it ok?"}

    assert client.call("chat", "?", model="m", json_schema=schema).json() == {"ok": True}
    with pytest.raises(ValueError, match=r"answer \(finish_reason 'length'\) is not JSON"):
        client.call("chat", "?", model="m", json_schema=schema).json()

    sent = gateway.calls[0].request.response_format.json_schema
    assert sent.name == "Is_it_ok_"
    assert json.loads(sent.schema_json) == schema


def test_ten_megabytes_there_and_back(client: Any, gateway: FakeGateway) -> None:
    gateway.reply("é" * 5_000_000)

    reply = client.call("chat", "x" * 10_000_000, model="m")

    assert len(reply.text) == 5_000_000
    assert len(gateway.calls[0].request.messages[0].content) == 10_000_000


# --- streams ------------------------------------------------------------------------


def test_stream(client: Any, gateway: FakeGateway) -> None:
    gateway.reply(Delta(reasoning="Hm"), Delta(reasoning="m."), "Hel", StreamChatResponse(), "lo")

    stream, events, error = client.read("stream", "Hi", model="m", max_delay=0.25)

    assert error is None
    assert [event.kind for event in events] == ["header", *["delta"] * 4, "finish", "trailer"]
    assert "".join(event.text for event in events) == "Hello"
    assert "".join(event.reasoning for event in events) == "Hmm."
    assert (stream.text, stream.reasoning, stream.finish_reason) == ("Hello", "Hmm.", "stop")
    assert stream.message == stream.reply().message
    assert stream.header.model == stream.reply().header.model == "m"
    assert stream.usage.completion_tokens == stream.reply().usage.completion_tokens == 1
    assert stream.time_to_first_token is not None
    assert (
        stream.request_id == stream.reply().request_id == gateway.calls[0].metadata["x-request-id"]
    )
    assert gateway.calls[0].request.max_delay.ToMilliseconds() == 250


def test_a_stream_gives_what_chat_gives(client: Any, gateway: FakeGateway) -> None:
    parts = ["a", tool_call("f", "{"), Delta(tool_calls=[{"arguments": "}"}]), "b"]
    gateway.reply(*parts).reply(*parts)

    whole = client.call("chat", "Hi", model="m")
    stream, _, _ = client.read("stream", "Hi", model="m")

    whole.proto.header.id = stream.header.id
    assert stream.reply().proto == whole.proto


def test_cumulative_mode_reads_the_same(client: Any, gateway: FakeGateway) -> None:
    gateway.reply("Hel", "lo ", "world")

    stream, events, error = client.read("stream", "Hi", model="m", mode="cumulative")

    assert error is None
    assert gateway.calls[0].request.mode == StreamMode.STREAM_MODE_CUMULATIVE
    assert [e.text for e in events if e.kind == "snapshot"] == ["Hel", "lo ", "world"]
    assert stream.reply().text == stream.text == "Hello world"
    assert stream.finish_reason == "stop"


def test_text_deltas_of_one_choice(client: Any, gateway: FakeGateway) -> None:
    parts = ["a", Delta(choice_index=1, content="x"), Delta(reasoning="no"), "b"]
    gateway.reply(*parts).reply(*parts)

    assert client.texts("Hi", model="m") == ["a", "b"]
    assert client.texts("Hi", model="m", choice_index=1) == ["x"]


def test_many_deltas_before_an_error_all_arrive(client: Any, gateway: FakeGateway) -> None:
    gateway.fail("UPSTREAM_STREAM_INTERRUPTED", after=[f"{i} " for i in range(2000)])

    stream, _, error = client.read("stream", "Hi", model="m")

    assert error.reason == "UPSTREAM_STREAM_INTERRUPTED"
    assert error.partial_text == stream.text == "".join(f"{i} " for i in range(2000))
    assert not stream.is_complete


def test_a_failed_stream_has_no_reply(client: Any, gateway: FakeGateway) -> None:
    gateway.fail("RATE_LIMITED", after=["Hel"], retry_after=2.5, metadata={"attempts": "3"})

    stream, events, error = client.read("stream", "Hi", model="m", request_id="r-2")

    assert [event.kind for event in events] == ["header", "delta"]
    assert isinstance(error, TokenwireError)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert (error.retry_after, error.attempts, error.request_id) == (2.5, 3, "r-2")
    assert (error.partial_text, error.partial.header.model) == ("Hel", "m")
    assert stream.usage is None
    with pytest.raises(TokenwireError, match="RATE_LIMITED"):
        stream.reply()


@pytest.mark.parametrize("parts", [[], ["Hel", "lo"]])
def test_ok_without_a_trailer_is_an_error(
    client: Any, gateway: FakeGateway, parts: list[str]
) -> None:
    gateway.cut(*parts)

    stream, _, error = client.read("stream", "Hi", model="m")

    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "STREAM_INCOMPLETE")
    assert error.partial_text == "".join(parts)
    assert error.request_id == error.partial.request_id == gateway.calls[0].metadata["x-request-id"]
    with pytest.raises(TokenwireError, match="STREAM_INCOMPLETE"):
        stream.reply()


# --- errors, deadlines, retries -----------------------------------------------------


def test_an_error_says_everything(client: Any, gateway: FakeGateway) -> None:
    gateway.fail(
        "UNKNOWN_ROLE",
        message="one field is wrong",
        field_violations={"messages[0].role": "got 'robot'"},
        metadata={"requestId": "r-9"},
    )

    with pytest.raises(TokenwireError) as caught:
        client.call("chat", [{"role": "robot", "content": "x"}], model="m")

    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_ROLE")
    assert error.message == "one field is wrong"
    assert error.field_violations == (("messages[0].role", "got 'robot'"),)
    assert error.request_id == "r-9"
    assert error.partial is None
    assert not error.is_retryable
    assert str(error) == (
        "UNKNOWN_ROLE: one field is wrong (request r-9)\n  messages[0].role: got 'robot'"
    )


def test_a_status_of_somebody_else(client: Any, gateway: FakeGateway) -> None:
    gateway.fail("", code=grpc.StatusCode.PERMISSION_DENIED, message="RBAC: denied")

    with pytest.raises(TokenwireError) as caught:
        client.call("chat", "Hi", model="m", request_id="r-3")

    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.PERMISSION_DENIED, "")
    assert str(caught.value) == "PERMISSION_DENIED: RBAC: denied (request r-3)"


def test_cancelled_by_the_server_is_an_error_and_not_a_cancelled_task(
    client: Any, gateway: FakeGateway
) -> None:
    gateway.fail("CANCELLED").fail("CANCELLED", after=["x"])

    with pytest.raises(TokenwireError, match="CANCELLED"):
        client.call("chat", "Hi", model="m")
    _, _, error = client.read("stream", "Hi", model="m")
    assert error.code is grpc.StatusCode.CANCELLED


def test_nothing_listens(client: Any, gateway: FakeGateway) -> None:
    gateway.close()

    with pytest.raises(TokenwireError) as caught:
        client.call("chat", "Hi", model="m", timeout=10)

    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")
    assert caught.value.is_retryable


def test_a_deadline_ends_a_silent_call(client: Any, gateway: FakeGateway) -> None:
    gateway.hang().hang("Hel")

    with pytest.raises(TokenwireError) as caught:
        client.call("chat", "Hi", model="m", timeout=0.2)
    _, _, error = client.read("stream", "Hi", model="m", timeout=0.5)

    assert caught.value.code is error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.partial_text == "Hel"
    assert all(call.wait_cancelled() for call in gateway.calls)


@pytest.mark.parametrize(
    ("method", "reason"), [("chat", "GATEWAY_DRAINING"), ("stream", "GATEWAY_OVERLOADED")]
)
def test_unavailable_is_tried_again(
    client: Any, gateway: FakeGateway, method: str, reason: str
) -> None:
    gateway.fail(reason).reply("ok")

    if method == "chat":
        assert client.call("chat", "Hi", model="m").text == "ok"
    else:
        assert client.read("stream", "Hi", model="m")[0].reply().text == "ok"

    first, second = gateway.calls
    assert first.metadata["x-request-id"] == second.metadata["x-request-id"]
    assert second.metadata["grpc-previous-rpc-attempts"] == "1"


@pytest.mark.parametrize(
    ("reason", "after"),
    [("UPSTREAM_ERROR", []), ("RATE_LIMITED", []), ("GATEWAY_DRAINING", ["x"])],
)
def test_what_is_not_tried_again(
    client: Any, gateway: FakeGateway, reason: str, after: list[str]
) -> None:
    gateway.fail(reason, after=after).reply("never")

    _, _, error = client.read("stream", "Hi", model="m")

    assert error.reason == reason
    assert len(gateway.calls) == 1


def test_options_of_the_caller_win(client: Any, gateway: FakeGateway) -> None:
    gateway.fail("GATEWAY_DRAINING").reply("never")
    client.connect(options=[("grpc.service_config", "{}")])

    with pytest.raises(TokenwireError, match="GATEWAY_DRAINING"):
        client.call("chat", "Hi", model="m")


# --- metadata -----------------------------------------------------------------------


def test_request_ids_are_made_up_and_differ(client: Any, gateway: FakeGateway) -> None:
    gateway.reply("a").reply("b")

    ids = [client.call("chat", "Hi", model="m").request_id for _ in range(2)]

    assert ids == [call.metadata["x-request-id"] for call in gateway.calls]
    assert len(set(ids)) == 2
    assert all(len(each) == 32 for each in ids)


def test_token_and_metadata_travel_in_plaintext(client: Any, gateway: FakeGateway) -> None:
    tokens = iter(["first", "second"])
    client.connect(token=lambda: next(tokens))
    gateway.reply("a").reply("b")

    client.call("chat", "Hi", model="m", metadata={"traceparent": "00-1", "X-Raw-Bin": b"\x00"})
    client.call("chat", "Hi", model="m")

    assert [call.metadata["authorization"] for call in gateway.calls] == [
        "Bearer first",
        "Bearer second",
    ]
    assert gateway.calls[0].metadata["traceparent"] == "00-1"
    assert gateway.calls[0].metadata["x-raw-bin"] == b"\x00"
    assert gateway.calls[0].metadata["user-agent"].startswith("tokenwire-python/")


def test_without_a_token_there_is_no_header(client: Any, gateway: FakeGateway) -> None:
    gateway.reply("a")
    client.call("chat", "Hi", model="m")
    assert "authorization" not in gateway.calls[0].metadata


class Vault:
    """Gives tokens as a coroutine, and stays silent when it is shut."""

    def __init__(self) -> None:
        self.asked = 0
        self.left = 0
        self.is_shut = False

    async def token(self) -> str:
        self.asked += 1
        try:
            await asyncio.sleep(3600 if self.is_shut else 0)
        except asyncio.CancelledError:
            self.left += 1
            raise
        return f"token-{self.asked}"


async def test_a_token_may_be_awaited(gateway: FakeGateway) -> None:
    vault = Vault()
    gateway.fail("GATEWAY_DRAINING").reply("a").reply("b").reply("c")
    async with gateway.async_client(token=vault.token) as client:
        assert (await client.chat("Hi", model="m")).text == "a"
        stream = client.stream("Hi", model="m")
        assert [text async for text in stream.text_deltas()] == ["b"]
        assert (await client.batch_ordered(["Hi"], model="m"))[0].unwrap().text == "c"
        assert len(await client.models()) == 1
    shown = [call.metadata["authorization"] for call in gateway.calls]
    assert shown == [f"Bearer token-{n}" for n in (1, 1, 2, 3, 4)]  # a retry is the same call


@pytest.mark.parametrize("method", ["chat", "stream", "batch_ordered"])
@pytest.mark.parametrize("by", ["timeout", "cancelling the task", "closing the client"])
async def test_a_token_that_never_comes_is_waited_for_no_longer_than_the_call(
    gateway: FakeGateway, method: str, by: str
) -> None:
    vault = Vault()
    vault.is_shut = True
    async with gateway.async_client(token=vault.token) as client:

        async def ask() -> None:
            prompt: Any = ["Hi"] if method == "batch_ordered" else "Hi"
            timeout = 0.1 if by == "timeout" else None
            answer = getattr(client, method)(prompt, model="m", timeout=timeout)
            if method == "stream":
                async for _ in answer:
                    pass
            else:
                await answer

        task = asyncio.create_task(ask())
        while not vault.asked:
            await asyncio.sleep(0.01)
        if by == "cancelling the task":
            task.cancel()
        elif by == "closing the client":
            await client.close()
        with pytest.raises((TokenwireError, asyncio.CancelledError)) as caught:
            await task
    assert (vault.asked, vault.left, gateway.calls) == (1, 1, [])
    codes = {"timeout": "DEADLINE_EXCEEDED", "closing the client": "CANCELLED"}
    if isinstance(caught.value, TokenwireError):
        assert caught.value.code.name == codes[by]
    assert task.cancelled() == (by == "cancelling the task")


async def test_a_stream_that_is_left_before_its_token_comes(gateway: FakeGateway) -> None:
    vault = Vault()
    vault.is_shut = True
    async with gateway.async_client(token=vault.token) as client:
        stream = client.stream("Hi", model="m")
        await asyncio.sleep(0.01)
        await stream.close()
        with pytest.raises(TokenwireError, match="cancelled here"):
            await anext(stream)
        dropped = client.stream("Hi", model="m")
        await asyncio.sleep(0.01)
        del dropped
        await asyncio.sleep(0.01)
    assert (vault.asked, vault.left, gateway.calls) == (2, 2, [])


async def test_what_a_token_function_raises_is_what_the_call_raises(gateway: FakeGateway) -> None:
    class Shut(Exception):
        pass

    async def shut() -> str:
        raise Shut

    async def spaced() -> str:
        return "se cret"

    async with gateway.async_client(token=shut) as client:
        with pytest.raises(Shut):
            await client.chat("Hi", model="m")
        with pytest.raises(Shut):
            await anext(client.stream("Hi", model="m"))
    async with gateway.async_client(token=spaced) as client:
        with pytest.raises(ValueError, match="token: holds a space"):
            await client.chat("Hi", model="m")
    with gateway.client(token=shut) as blocking, pytest.raises(TypeError, match="AsyncClient"):
        blocking.chat("Hi", model="m")
    assert gateway.calls == []


# --- batches ------------------------------------------------------------------------


def test_batch_in_order_of_completion(client: Any, gateway: FakeGateway) -> None:
    gateway.reply("one").fail("CONTENT_FILTERED", metadata={"upstream": "u"}).reply("three")
    items = [
        "1?",
        {"messages": [{"role": "user", "content": "2?"}], "custom_id": "two", "seed": 2},
        BatchChatItem(
            custom_id="three",
            chat=ChatRequest(model="own", messages=[ChatMessage(role="user", content="3?")]),
        ),
    ]

    _, results, error = client.read(
        "batch", items, model="m", max_concurrency=2, seed=1, request_id="r-4"
    )

    assert error is None
    assert [result.index for result in results] == [2, 1, 0]
    assert [result.custom_id for result in results] == ["three", "two", ""]
    assert results[0].unwrap().text == "three"
    assert results[1].error.reason == "CONTENT_FILTERED"
    assert results[1].error.metadata == {"upstream": "u"}
    assert results[1].error.request_id == "r-4"
    with pytest.raises(TokenwireError, match="CONTENT_FILTERED"):
        results[1].unwrap()
    request = gateway.calls[0].request
    assert request.max_concurrency == 2
    assert [item.chat.model for item in request.items] == ["m", "m", "own"]
    assert [item.chat.params.seed for item in request.items] == [1, 2, 0]


def test_batch_in_order_of_the_items(client: Any, gateway: FakeGateway) -> None:
    gateway.reply("one").fail("CONTENT_FILTERED").reply("three")

    results = client.call("batch_ordered", ["1", "2", "3"], model="m")

    assert [result.index for result in results] == [0, 1, 2]
    assert [result.reply and result.reply.text for result in results] == ["one", None, "three"]


def test_a_batch_that_breaks_keeps_what_arrived(client: Any, gateway: FakeGateway) -> None:
    gateway.hang().reply("two").hang()

    results = client.call(
        "batch_ordered",
        [{"messages": "1", "custom_id": "a"}, {"messages": "2", "custom_id": "b"}],
        model="m",
        timeout=0.5,
    )
    assert [(result.custom_id, result.error is None) for result in results] == [
        ("a", False),
        ("b", True),
    ]
    assert results[0].error.code is grpc.StatusCode.DEADLINE_EXCEEDED

    with pytest.raises(TokenwireError) as caught:  # nothing arrived: the last item hangs
        client.call("batch_ordered", ["1"], model="m", timeout=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


# --- OKs that are none --------------------------------------------------------------


@contextlib.contextmanager
def odd_gateway(answers: Mapping[str, Sequence[Message]]) -> Iterator[str]:
    """A gateway that answers each method with OK and these messages; its address."""

    class Odd(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            messages = answers[str(details.method).rpartition("/")[2]]
            return grpc.unary_stream_rpc_method_handler(
                lambda _request, _context: iter([each.SerializeToString() for each in messages])
            )

    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Odd(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


@pytest.mark.parametrize("indexes", [[0, 2], [0, -1], [1, 1, 0], [7], [0, 1, 1]])
def test_batch_results_of_no_item_or_two_of_one_are_refused(indexes: list[int]) -> None:
    results = [BatchChatResponse(index=i, response=ChatResponse()) for i in indexes]
    with odd_gateway({"BatchChat": results}) as target, Client(target) as client:
        with pytest.raises(TokenwireError, match="none of the batch or had one") as caught:
            list(client.batch(["a", "b"], model="m"))
        assert caught.value.reason == "STREAM_INCOMPLETE"
        with pytest.raises(TokenwireError, match="none of the batch or had one"):
            client.batch_ordered(["a", "b"], model="m")


def test_a_batch_that_is_refused_here_ends_there() -> None:
    left = threading.Event()

    def answers(_request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(left.set)
        yield BatchChatResponse(index=7, response=ChatResponse()).SerializeToString()
        left.wait(30)

    class Open(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_stream_rpc_method_handler(answers)

    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Open(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}") as client:
        batch = client.batch(["a"], model="m")  # which stays in a hand
        with pytest.raises(TokenwireError, match="none of the batch"):
            next(batch)
        assert left.wait(20)
    server.stop(0)


def test_an_ok_that_lacks_what_was_asked_for_is_an_error() -> None:
    answers: dict[str, Sequence[Message]] = {
        "Tokenize": [TokenizeResponse(lists=[TokenList()])],
        "GetModel": [GetModelResponse()],
        "ListModels": [ListModelsResponse(next_page_token="again")],
    }
    with odd_gateway(answers) as target, Client(target) as client:
        with pytest.raises(TokenwireError, match="tokens of 1 of 2 texts"):
            client.tokenize(["a", "b"], model="m")
        with pytest.raises(TokenwireError, match="without a model"):
            client.model("m")
        with pytest.raises(TokenwireError, match="a page that was read"):
            client.models()


def test_pages_of_models_that_go_in_a_circle_are_an_error() -> None:
    """a, b, a: not the page just read, and yet without an end."""
    receiver = Core("localhost:1", environ={}).models({})
    next(receiver)
    for token in "ab":
        receiver.send(ListModelsResponse(next_page_token=token))
    with pytest.raises(TokenwireError, match="a page that was read"):
        receiver.send(ListModelsResponse(next_page_token="a"))


# --- tokens and models --------------------------------------------------------------


def test_tokens(client: Any, gateway: FakeGateway) -> None:
    counted = client.call("count_tokens", "a b c", model="m")
    assert (counted.total_tokens, counted.tokenizer, counted.exact) == (3, "words", False)
    assert gateway.calls[0].request.text == "a b c"

    conversation = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert client.call("count_tokens", conversation, model="m").total_tokens == 2
    assert gateway.calls[1].request.chat.messages[0].role == "system"
    # Tools are tokens, too: then it is the call that is counted, not the text.
    client.call("count_tokens", "a", model="m", tools=[{"name": "f"}])
    assert gateway.calls[2].request.chat.tools[0].function.name == "f"

    first, second = client.call("tokenize", ["a b", "c"], model="m")
    assert (list(first.ids), list(first.pieces)) == ([0, 1], [b"a", b"b"])
    assert list(second.pieces) == [b"c"]
    assert len(client.call("tokenize", "one text", model="m")) == 1


def test_models_of_every_page(client: Any, gateway: FakeGateway) -> None:
    with FakeGateway(models=[f"m{i}" for i in range(250)]) as large:
        client.connect()
        assert [model.name for model in client.call("models")] == ["gpt-4o-mini"]
        with large.client() as other:
            assert [model.name for model in other.models()] == [f"m{i}" for i in range(250)]
        assert [call.request.page_token for call in large.calls] == ["", "100", "200"]


def test_one_model(client: Any) -> None:
    assert client.call("model", "gpt-4o-mini").upstream == "fake"
    with pytest.raises(TokenwireError) as caught:
        client.call("model", "no-such")
    assert caught.value.reason == "MODEL_NOT_FOUND"


# --- misuse -------------------------------------------------------------------------


def test_mistakes_are_told_before_anything_is_sent(client: Any, gateway: FakeGateway) -> None:
    with pytest.raises(ValueError, match="model: expected the name"):
        client.call("chat", "Hi")
    with pytest.raises(ValueError, match="timeout: expected seconds above 0"):
        client.call("chat", "Hi", model="m", timeout=0)
    with pytest.raises(ValueError, match="request_id: expected printable ASCII"):
        client.call("chat", "Hi", model="m", request_id="a\nb")
    with pytest.raises(ValueError, match="has its own argument"):
        client.call("chat", "Hi", model="m", metadata={"Authorization": "Bearer x"})
    with pytest.raises(TypeError, match="unknown option 'max_tokens'; did you mean 'max_comp"):
        client.call("chat", "Hi", model="m", max_tokens=3)
    with pytest.raises(TypeError, match="unknown option 'temperature'"):
        client.call("models", temperature=1)
    with pytest.raises(ValueError, match="items: expected at least one"):
        client.call("batch_ordered", [], model="m")
    with pytest.raises(ValueError, match="mode: expected 'delta' or 'cumulative'"):
        client.call("stream", "Hi", model="m", mode="snapshot")
    assert gateway.calls == []


def test_a_closed_client_says_so(client: Any) -> None:
    client.call("models")
    result = client._client.close()
    if result is not None:
        client._runner.run(result)
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.call("models")


def test_an_unread_stream_has_no_reply() -> None:
    with FakeGateway() as gateway, gateway.client() as client:
        gateway.reply("a")
        with (
            client.stream("Hi", model="m") as stream,
            pytest.raises(RuntimeError, match="not read"),
        ):
            stream.reply()


def test_an_accumulator_works_alone(gateway: FakeGateway) -> None:
    gateway.reply("a", "b")
    with gateway.client() as client:
        protos = [event.proto for event in client.stream("Hi", model="m")]
    answer = Accumulator()
    for proto in protos:
        answer.add(proto)
    assert (answer.text, answer.is_complete) == ("ab", True)
