"""The words of the simulator: playful, right where they can be right, always the same."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwire_service.simulator import invent, prose


def say(prompt: str, seed: int = 1) -> str:
    return prose.reply(prose.Talk(prompt), Random(seed))


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("Hello!", "Hello! You have reached a simulator"),
        ("你好", "你好！这里是一个住在安静端口上的模拟器"),
        ("Count to 5", "1, 2, 3, 4, 5. There: 5 numbers"),
        ("please count from 9 to twelve", "9, 10, 11, 12."),
        ("Count from 3 to 1!", "3, 2, 1."),
        ("count to 1000000", "200, ... I can see 1000000 from here"),
        ("从3数到6", "3, 4, 5, 6。"),
        ("数到十二", "10, 11, 12。好了，12个数字"),
        ("数到一百零三", "103。好了，103个数字"),
        ("What is 12 * 7?", "12 × 7 is 84."),
        ("7 divided by 2", "7 ÷ 2 is 3.5."),
        ("100000000000 − 1", "is 99999999999."),
        ("3 加 4 等于几？", "3 + 4 等于 7。"),
        ("How many r's are in strawberry?", "exactly 3 times: s-t-[r]-a-w-b-e-[r]-[r]-y"),
        ("how many es in the word tree", "exactly twice: t-r-[e]-[e]"),
        ("Reply with exactly: pong", "pong"),
        ("Say hello world", "hello world\n\nThere, said it."),
        ("Say ahoy in one word", "ahoy\n\n"),
        ("Why is the sky blue?", "“Why is the sky blue?”"),
        ("天空为什么是蓝色的？", "“天空为什么是蓝色的？”"),
        ("I like trains", "3 words, 11 characters, and the longest, “trains”"),
        ("我喜欢火车。", "一共6个字"),
        ("A haiku about otters", "tters"),
        ("写一首关于秋天的诗", "秋天"),
        ("", "…"),
    ],
)
def test_answers_depend_on_the_prompt(prompt: str, part: str) -> None:
    assert part in say(prompt)


@pytest.mark.parametrize("prompt", ["5 / 0", "I count on you to help", "count to banana"])
def test_what_has_no_right_answer_still_gets_one(prompt: str) -> None:
    assert prompt in say(prompt)


def test_every_sentence_of_the_books_has_only_slots_that_are_filled() -> None:
    for prompt in ("Why?", "为什么？", "Trains.", "火车。", "a poem", "一首诗"):
        for seed in range(60):
            for text in (say(prompt, seed), prose.think(prose.Talk(prompt), 4, Random(seed))):
                assert "{" not in text
                assert prompt in text or "poem" in prompt or "诗" in prompt


def test_tool_results_are_told() -> None:
    talk = prose.Talk("天气？", results=[("get_weather", '{"sky": "clear"}'), ("tell", "不知道")])
    text = prose.reply(talk, Random(1))
    assert "get_weather" in text
    assert "sky是clear" in text
    assert "不知道" in text


@settings(deadline=None)
@given(st.text())
def test_tokens_join_to_the_text(text: str) -> None:
    assert "".join(prose.tokenize(text)) == text


@settings(deadline=None)
@given(st.text(), st.integers())
def test_any_prompt_gets_an_answer_and_the_same_one_twice(prompt: str, seed: int) -> None:
    assert say(prompt, seed) == say(prompt, seed) != ""


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYWORDS = """
    type properties required items enum const anyOf allOf $ref minimum maximum multipleOf minItems
    maxItems minLength maxLength format prefixItems exclusiveMinimum a b
"""
NAMES = st.sampled_from(KEYWORDS.split())
SCHEMAS = st.recursive(
    SCALARS | st.sampled_from(["object", "array", "integer", "number", "#", "#/properties/a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
)


@settings(deadline=None)
@given(SCHEMAS, st.text(max_size=20))
def test_no_schema_breaks_it(schema: Any, prompt: str) -> None:
    invent.value_for(schema, prompt, everything=True)


def test_a_schema_that_grows_without_end_has_one() -> None:
    many: dict[str, Any] = {"type": "object"}
    many["properties"] = {f"p{number}": {"$ref": "#"} for number in range(50)}
    many["allOf"] = [{"$ref": "#"}] * 50
    assert isinstance(invent.value_for(many, "go", everything=True), dict)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer", "minimum": 10, "maximum": 20}, 10),
        ({"type": "integer", "multipleOf": 5}, 10),
        ({"type": "number", "exclusiveMaximum": 3}, 2),
        ({"type": "integer", "exclusiveMinimum": 7}, 8),
        ({"type": "string", "format": "date"}, "2026-02-03"),
        ({"type": "string", "minLength": 8}, "Lisbon.."),
        ({"type": "array", "items": {"type": "integer"}}, [7, 9]),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 1}, [7]),
        ({"prefixItems": [{"type": "integer"}, {"const": None}]}, [7, None]),
        ({"anyOf": [{"type": "null"}, {"type": "integer"}]}, 7),
        ({"allOf": [{"properties": {"a": {"const": 1}}}, {"required": ["a"]}]}, {"a": 1}),
        ({"type": ["null", "boolean"]}, True),
        ({"type": "null"}, None),
        ({"enum": ["x", "Lisbon"]}, "Lisbon"),
        ({"const": {"a": []}}, {"a": []}),
        ({"$ref": "#/nowhere"}, "Lisbon"),
        (True, "Lisbon"),
        ({}, "Lisbon"),
    ],
)
def test_values_for_schemas(schema: Any, value: Any) -> None:
    assert invent.value_for(schema, "Go to Lisbon with 7 or 9") == value
