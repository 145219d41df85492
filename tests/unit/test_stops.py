"""Stop strings never show, however the provider cuts the text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service.stops import StopFilter, cut_at

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
