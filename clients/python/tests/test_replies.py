"""Folding events into an answer, without a gateway."""

from __future__ import annotations

import json
import pickle
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire import Accumulator, Choice, Reply, ToolCall
from tokenwire.core import Call, StreamReceiver
from tokenwire.v1.chat_pb2 import (
    Annotation,
    ChatMessage,
    CustomCall,
    FinishReason,
    FunctionCall,
    TokenLogprob,
    Usage,
)
from tokenwire.v1.chat_pb2 import ToolCall as ToolCallProto
from tokenwire.v1.chat_service_pb2 import (
    ChatResponse,
    Delta,
    Finish,
    ResponseHeader,
    Snapshot,
    StreamChatResponse,
    StreamTrailer,
    ToolCallDelta,
)
from tokenwire.v1.chat_service_pb2 import Choice as ChoiceProto

BROKEN = grpc.StatusCode.UNAVAILABLE


def folded(*events: Any) -> Accumulator:
    answer = Accumulator()
    for event in events:
        answer.add(
            StreamChatResponse(delta=event) if isinstance(event, Delta) else event,
        )
    return answer


def test_usage_that_nobody_reported_is_not_zero() -> None:
    answer = folded(Delta(content="a"), StreamChatResponse(trailer=StreamTrailer()))
    assert answer.is_complete
    assert not answer.so_far().proto.HasField("usage")


def test_every_field_of_a_stream_is_kept() -> None:
    answer = folded(
        StreamChatResponse(header=ResponseHeader(id="x", model="m", extra_json='{"a": 1, "b": 1}')),
        Delta(content="Hel", logprobs=[TokenLogprob(token="Hel", logprob=-1)]),
        Delta(reasoning="be"),
        Delta(reasoning="cause", extra_json='{"audio": {"data": "ab", "n": 1}, "list": [1]}'),
        Delta(content="lo", logprobs=[TokenLogprob(token="lo", logprob=-2)]),
        Delta(annotations=[Annotation(url="u")], refusal="No"),
        Delta(refusal=", sorry"),
        Delta(extra_json='{"audio": {"data": "cd", "n": 2}, "list": [2]}'),
        StreamChatResponse(
            finish=Finish(
                finish_reason=FinishReason.FINISH_REASON_STOP,
                finish_reason_raw="eos",
                extra_json='{"stop_reason": null}',
            )
        ),
        StreamChatResponse(
            trailer=StreamTrailer(usage=Usage(total_tokens=9), extra_json='{"b": 2, "c": 3}')
        ),
    )
    response = answer.so_far().proto
    message = response.choices[0].message
    extra, header_extra = message.extra_json, response.header.extra_json
    message.extra_json = response.header.extra_json = ""
    assert json.loads(extra) == {"audio": {"data": "abcd", "n": 2}, "list": [1, 2]}
    assert json.loads(header_extra) == {"a": 1, "b": 2, "c": 3}
    assert response == ChatResponse(
        header=ResponseHeader(id="x", model="m"),
        choices=[
            ChoiceProto(
                message=ChatMessage(
                    role="assistant",
                    content="Hello",
                    reasoning="because",
                    refusal="No, sorry",
                    annotations=[Annotation(url="u")],
                ),
                finish_reason=FinishReason.FINISH_REASON_STOP,
                finish_reason_raw="eos",
                extra_json='{"stop_reason": null}',
                logprobs=[
                    TokenLogprob(token="Hel", logprob=-1),
                    TokenLogprob(token="lo", logprob=-2),
                ],
            )
        ],
        usage=Usage(total_tokens=9),
    )


def test_unmodelled_fields_never_cost_the_answer() -> None:
    deep = "[" * 100_000
    answer = folded(
        Delta(content="a", extra_json="{"), Delta(content="b", extra_json=deep), Delta(content="c")
    )
    assert answer.text == "abc"


def test_tool_calls_are_assembled_by_index() -> None:
    answer = folded(
        Delta(tool_calls=[ToolCallDelta(index=1, id="b", name="g", custom=True)]),
        Delta(tool_calls=[ToolCallDelta(index=0, id="a", name="f", arguments='{"x"')]),
        Delta(
            tool_calls=[
                ToolCallDelta(index=1, arguments="free "),
                ToolCallDelta(index=0, arguments=": 1}"),
            ]
        ),
        # Some upstreams repeat id and name: the first ones count.
        Delta(tool_calls=[ToolCallDelta(index=1, id="z", name="z", arguments="text")]),
    )
    first, second = answer.tool_calls
    assert (first.id, first.name, first.arguments, first.is_custom) == ("a", "f", {"x": 1}, False)
    assert (second.id, second.name, second.raw_arguments) == ("b", "g", "free text")
    assert second.is_custom
    assert second.proto == ToolCallProto(id="b", custom=CustomCall(name="g", input="free text"))
    assert not answer.message.HasField("content")


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.text(max_size=5), st.text(max_size=5)),
        max_size=20,
    )
)
def test_any_interleaving_of_choices_gives_each_its_own_text(
    pieces: list[tuple[int, str, str]],
) -> None:
    answer = Accumulator()
    seen = ""
    for index, content, reasoning in pieces:
        delta = Delta(choice_index=index, content=content, reasoning=reasoning)
        event = answer.add(StreamChatResponse(delta=delta))
        assert event is not None
        if index == 0:
            seen += event.text
        # What is shown halfway must not disturb what comes.
        assert [choice.index for choice in answer.choices] == sorted(
            {choice.index for choice in answer.choices}
        )
    for choice in answer.choices:
        assert choice.text == "".join(c for i, c, _ in pieces if i == choice.index)
        assert choice.reasoning == "".join(r for i, _, r in pieces if i == choice.index)
    assert seen == "".join(c for i, c, _ in pieces if i == 0)


def test_snapshots_replace_what_came_before() -> None:
    answer = Accumulator()
    texts = []
    for content in ("Hel", "Hello", "Hello", "Other"):
        snapshot = Snapshot(message=ChatMessage(role="assistant", content=content))
        event = answer.add(StreamChatResponse(snapshot=snapshot))
        assert event is not None
        texts.append(event.text)
        assert answer.text == content
    assert texts == ["Hel", "lo", "", "Other"]


def test_events_to_ignore() -> None:
    answer = Accumulator()
    newer = StreamChatResponse.FromString(b"\xfa\x01\x03new")  # field 31, not known yet
    assert answer.add(StreamChatResponse()) is None
    assert answer.add(newer) is None
    assert answer.choices == ()
    assert (answer.text, answer.finish_reason, answer.header) == ("", "", None)


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, ""), (1, "stop"), (2, "length"), (3, "tool_calls"), (4, "content_filter"), (5, "other")],
)
def test_finish_reasons(number: Any, name: str) -> None:
    assert Choice(ChoiceProto(finish_reason=number)).finish_reason == name
    assert len(FinishReason.values()) == 6


def test_a_finish_reason_newer_than_this_package() -> None:
    newer = ChoiceProto.FromString(b"\x18\x63")
    assert Choice(newer).finish_reason == "other"


def call_of(arguments: str) -> ToolCall:
    return ToolCall(
        ToolCallProto(id="c1", function=FunctionCall(name="f", arguments_json=arguments))
    )


@pytest.mark.parametrize(("text", "value"), [("", {}), (" \n", {}), ('{"a": [1]}', {"a": [1]})])
def test_arguments(text: str, value: Any) -> None:
    assert call_of(text).arguments == value


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": ', r"arguments of the call of 'f' \(c1\) is not JSON: .*: '{\"a\": '"),
        ("[1]", r"is not a JSON object: '\[1\]'"),
        ("[" * 100_000, "is nested too deeply|is not JSON"),
    ],
)
def test_arguments_a_model_got_wrong(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        _ = call_of(text).arguments
    assert len(str(caught.value)) < 300


def test_answering_a_call() -> None:
    assert call_of("{}").answer({"ö": 1}) == ChatMessage(
        role="tool", tool_call_id="c1", content='{"ö": 1}'
    )
    assert call_of("{}").answer("as is").content == "as is"


def test_an_answer_without_choices_is_empty() -> None:
    reply = Reply(ChatResponse())
    assert (reply.text, reply.finish_reason, reply.tool_calls) == ("", "", ())
    assert reply.message == ChatMessage()


def test_a_reply_survives_pickling() -> None:
    reply = Reply(ChatResponse(choices=[ChoiceProto(message=ChatMessage(content="x"))]), "r")
    again = pickle.loads(pickle.dumps(reply))
    assert (again.proto, again.request_id) == (reply.proto, "r")
    assert repr(again) == "Reply('x', finish_reason='', model='', request_id='r')"


@pytest.mark.parametrize(
    "delta",
    [
        Delta(content="x"),
        Delta(reasoning="x"),
        Delta(refusal="x"),
        Delta(tool_calls=[ToolCallDelta(name="f")]),
    ],
)
def test_time_to_first_token_is_to_the_first_output(delta: Delta) -> None:
    times = iter([10.0, 10.5, 99.0])
    receiver = StreamReceiver(
        Call("StreamChat", ChatMessage(), None, (), "r"), clock=lambda: next(times)
    )
    for event in (
        StreamChatResponse(header=ResponseHeader()),
        StreamChatResponse(),
        StreamChatResponse(delta=Delta(choice_index=1)),
    ):
        receiver.receive(event)
    assert receiver.time_to_first_token is None
    receiver.receive(StreamChatResponse(delta=delta))
    receiver.receive(StreamChatResponse(delta=delta))
    assert receiver.time_to_first_token == 0.5


def test_a_stream_whose_connection_broke_was_interrupted() -> None:
    def error_after(*events: StreamChatResponse, code: grpc.StatusCode = BROKEN) -> str:
        receiver = StreamReceiver(Call("StreamChat", ChatMessage(), None, (), "r"))
        for event in events:
            receiver.receive(event)
        return receiver.failed(code, "Socket closed", None).reason

    header = StreamChatResponse(header=ResponseHeader())
    delta = StreamChatResponse(delta=Delta(content="x"))
    assert error_after(header, delta) == "UPSTREAM_STREAM_INTERRUPTED"
    assert error_after() == error_after(header) == ""  # nothing of an answer had come
    assert error_after(header, delta, code=grpc.StatusCode.CANCELLED) == ""
