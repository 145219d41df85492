"""Stop strings never show, however the provider cuts the text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.stops import StopFilter, cut, cut_at

Event = chat_service_pb2.StreamChatResponse


def delta(content: str, index: int = 0, **fields: object) -> Event:
    return Event(delta=chat_service_pb2.Delta(content=content, choice_index=index, **fields))


def finish(index: int = 0) -> Event:
    return Event(finish=chat_service_pb2.Finish(choice_index=index))


def run(stops: list[str], pieces: list[str]) -> str:
    stream = StopFilter(stops)
    out = []
    for event in [*map(delta, pieces), finish()]:
        out += stream.apply([event])
    assert out[-1].WhichOneof("event") == "finish"
    return "".join(event.delta.content for event in out)


def test_the_text_ends_before_the_stop_string() -> None:
    assert run(["###"], ["one ###", " two"]) == "one "


def test_a_stop_string_split_over_deltas_never_shows() -> None:
    assert run(["<|im_end|>"], ["yes<|", "im_", "end|> and more"]) == "yes"


@pytest.mark.parametrize(
    ("said", "told"), [("LENGTH", "STOP"), ("STOP", "STOP"), ("CONTENT_FILTER", "CONTENT_FILTER")]
)
def test_an_answer_that_was_cut_did_not_reach_its_limit(said: str, told: str) -> None:
    """The upstream was not told of the stop string, or went on after it."""
    reason = chat_pb2.FinishReason.Value(f"FINISH_REASON_{said}")
    for text, expected in (("a###b", f"FINISH_REASON_{told}"), ("ab", f"FINISH_REASON_{said}")):
        event = finish()
        event.finish.finish_reason = reason
        *_, end = StopFilter(["###"]).apply([delta(text), event])
        assert chat_pb2.FinishReason.Name(end.finish.finish_reason) == expected


def test_what_only_looked_like_the_beginning_of_one_is_not_lost() -> None:
    assert run(["<|im_end|>"], ["a <|im_", "start|> b <|"]) == "a <|im_start|> b <|"


def test_choices_are_cut_apart() -> None:
    stream = StopFilter(["#"])
    out = stream.apply([delta("a#", 0), delta("b", 1), delta("c", 0), delta("d", 1)])
    assert [(e.delta.choice_index, e.delta.content) for e in out] == [(0, "a"), (1, "b"), (1, "d")]


def test_other_fields_pass_though_their_text_is_cut() -> None:
    out = StopFilter(["#"]).apply([delta("#", reasoning="why")])
    assert [(e.delta.content, e.delta.reasoning) for e in out] == [("", "why")]


letters = st.text(alphabet="abc", max_size=30)


@given(letters, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3), st.data())
def test_any_cutting_gives_what_the_whole_text_gives(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert run(stops, pieces) == text[: cut_at(text, stops)]


def generated(text: str, stops: list[str]) -> str:
    """What a model that honours its stop strings generates: character by character, until the text
    ends with one, which is taken off again. The longest one, where several end there."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


# Characters of one to four bytes, and of one and two UTF-16 units.
mixed = st.text(alphabet="a\u00e9\u4e2d\U0001f600", max_size=25)
stop_lists = st.lists(
    st.text(alphabet="a\u00e9\u4e2d\U0001f600", min_size=1, max_size=3), max_size=4
)


@given(st.lists(mixed, min_size=1, max_size=3), stop_lists, st.data())
def test_several_choices_in_any_pieces_are_what_a_model_that_stops_generates(
    texts: list[str], stops: list[str], data: st.DataObject
) -> None:
    rest = dict(enumerate(texts))
    stream = StopFilter(stops)
    shown = dict.fromkeys(rest, "")
    while any(rest.values()):
        index = data.draw(st.sampled_from(sorted(i for i, text in rest.items() if text)))
        length = data.draw(st.integers(1, len(rest[index])))
        piece, rest[index] = rest[index][:length], rest[index][length:]
        for event in stream.apply([delta(piece, index)]):
            shown[event.delta.choice_index] += event.delta.content
            assert event.delta.content, "no delta without text"
    for index in shown:
        for event in stream.apply([finish(index)]):
            shown[index] += event.delta.content
    assert shown == {index: generated(text, stops) for index, text in enumerate(texts)}
    whole = chat_service_pb2.ChatResponse()
    for index, text in enumerate(texts):
        whole.choices.add(index=index).message.content = text
    cut(whole, stops)
    assert {c.index: c.message.content for c in whole.choices} == shown


def test_tool_arguments_are_nobodys_text() -> None:
    call = chat_service_pb2.ToolCallDelta(index=0, id="c", name="f", arguments='{"q": "a#b"}')
    calls = delta("", tool_calls=[call])
    (out,) = StopFilter(["#"]).apply([calls])
    assert out.delta.tool_calls[0].arguments == '{"q": "a#b"}'


STOP, LENGTH = chat_pb2.FINISH_REASON_STOP, chat_pb2.FINISH_REASON_LENGTH
CALLS, FILTER = chat_pb2.FINISH_REASON_TOOL_CALLS, chat_pb2.FINISH_REASON_CONTENT_FILTER


@pytest.mark.parametrize(
    ("text", "told", "heard"),
    [
        ("a#b", LENGTH, STOP),  # it went on until its limit, which the caller never sees
        ("a#", LENGTH, STOP),
        ("a", LENGTH, LENGTH),  # nothing was cut
        ("a#b", CALLS, CALLS),
        ("a#b", FILTER, FILTER),
        ("a#b", STOP, STOP),
    ],
)
def test_why_a_text_that_was_cut_ended(text: str, told: int, heard: int) -> None:
    stream = StopFilter(["#"])
    end = Event(finish=chat_service_pb2.Finish(finish_reason=told, finish_reason_raw="raw"))
    out = [*stream.apply([delta(text)]), *stream.apply([end])][-1].finish
    assert (out.finish_reason, out.finish_reason_raw) == (heard, "raw")
    whole = chat_service_pb2.ChatResponse()
    whole.choices.add(finish_reason=told).message.content = text
    cut(whole, ["#"])
    assert whole.choices[0].finish_reason == heard
