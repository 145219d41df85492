"""What counts as proven, and how tools are written."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from harness import request
from tokenwire.v1 import chat_pb2, chat_service_pb2
from tokenwire_service import layouts
from tokenwire_service.layouts import (
    CHATML,
    GPT5,
    HARMONY,
    OPENAI,
    UNKNOWN,
    Layout,
    as_written,
    is_proven,
    lay,
)

Chat = chat_service_pb2.ChatRequest


def proven(layout: Layout, chat: Chat) -> bool:
    return is_proven(layout, chat, as_written(chat))


@pytest.mark.parametrize(
    ("layout", "roles"),
    [
        (OPENAI, {"system", "developer", "user", "assistant"}),
        (GPT5, {"user", "assistant"}),
        (HARMONY, {"user"}),
        (CHATML, {"user"}),
        (UNKNOWN, set()),
    ],
)
def test_only_roles_that_were_recorded_are_proven(layout: Layout, roles: set[str]) -> None:
    for role in ("system", "developer", "user", "assistant", "tool"):
        chat = Chat(messages=[chat_pb2.ChatMessage(role=role, content="x")])
        assert proven(layout, chat) == (role in roles)


def _tool(chat: Chat) -> None:
    chat.tools.add().function.name = "f"


def _choice(chat: Chat) -> None:
    chat.tool_choice.mode = chat_pb2.ToolChoice.Mode.Value("MODE_AUTO")


SPOILERS: dict[str, Callable[[Chat], None]] = {
    "tools": _tool,
    "format": lambda chat: chat.response_format.json_schema.SetInParent(),
    "extra": lambda chat: setattr(chat, "extra_body_json", '{"web_search_options":{}}'),
    "effort": lambda chat: setattr(chat.params, "reasoning_effort", "high"),
    "verbosity": lambda chat: setattr(chat.params, "verbosity", "low"),
    "thinking": lambda chat: setattr(chat.params, "enable_thinking", False),
    "image": lambda chat: chat.messages[0].parts.add().image.SetInParent(),
    "parts": lambda chat: chat.messages[0].parts.extend([chat_pb2.ContentPart(text="x")] * 2),
    "calls": lambda chat: chat.messages[0].tool_calls.add().function.SetInParent(),
    "extra of a message": lambda chat: setattr(chat.messages[0], "extra_json", "{}"),
}


@pytest.mark.parametrize("what", SPOILERS)
def test_what_may_change_the_prompt_makes_a_count_an_approximation(what: str) -> None:
    chat = request("x")
    assert proven(OPENAI, chat)
    SPOILERS[what](chat)
    assert not proven(OPENAI, chat)


def test_a_name_is_proven_where_the_provider_published_its_price() -> None:
    chat = request("x")
    chat.messages[0].name = "n"
    assert proven(OPENAI, chat)
    assert not proven(GPT5, chat)


def test_parameters_of_sampling_leave_the_prompt_alone() -> None:
    chat = request("x")
    chat.params.temperature = 1
    chat.params.max_completion_tokens = 5
    chat.params.stop.append("x")
    chat.end_user_id = "u"
    assert proven(OPENAI, chat)


def function(schema: object, description: str = "Says it.") -> chat_pb2.Tool:
    tool = chat_pb2.Tool()
    tool.function.name = "f"
    tool.function.description = description
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        tool.function.parameters_schema_json = text
    return tool


@pytest.mark.parametrize(
    ("schema", "written"),
    [
        (None, "type f = () => any;"),
        ({}, "type f = () => any;"),
        ("no json", "type f = () => any;"),
        ("[" * 100_000, "type f = () => any;"),
        ([1], "type f = () => any;"),
        ({"type": "object", "properties": {}}, "type f = () => any;"),
        ({"properties": {"a": {"type": "string"}}}, "type f = (_: {\na?: string,\n}) => any;"),
        (
            {
                "properties": {
                    "a": {"type": "integer", "description": "How many."},
                    "b": {"enum": ["x", 1]},
                    "c": {"type": "array", "items": {"type": "boolean"}},
                    "d": {"type": "object", "properties": {"e": {"type": "null"}}},
                    "f": {"type": ["string", "null"]},
                    "g": {"type": "object"},
                    "h": 5,
                },
                "required": ["a"],
            },
            'type f = (_: {\n// How many.\na: number,\nb?: "x" | 1,\nc?: boolean[],\n'
            "d?: {\ne?: null,\n},\nf?: any,\ng?: object,\n}) => any;",
        ),
    ],
)
def test_tools_are_written_as_types(schema: object, written: str) -> None:
    assert layouts.typed([function(schema)]) == (
        "# Tools\n\n## functions\n\nnamespace functions {\n\n// Says it.\n"
        f"{written}\n\n}} // namespace functions"
    )


def test_a_schema_that_nests_without_end_is_cut_short() -> None:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    assert layouts.typed([function(schema)]).count("a?:") < 30


def test_other_tools_are_counted_by_their_text() -> None:
    custom = chat_pb2.Tool()
    custom.custom.name = "c"
    custom.custom.description = "Anything."
    raw = chat_pb2.Tool(raw_json='{"type":"web_search"}')
    written = layouts.typed([custom, raw])
    assert "c\nAnything." in written
    assert '{"type":"web_search"}' in written


def test_tools_take_a_message_of_their_own_unless_there_is_one() -> None:
    chat = request("x", tools=[function(None)])
    alone = lay(OPENAI, chat, as_written(chat)).between
    chat.messages.add(role="system", content="")
    assert lay(OPENAI, chat, as_written(chat)).between == alone - 3 + OPENAI.message
