"""Answers and arguments of tools in the caller's own types, and what those ask of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pydantic
import pytest
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from tokenwire.testing import FakeGateway, tool_call


@dataclass
class Place:
    name: str


@dataclass
class Weather:
    """Of one place."""

    place: Place
    degrees: float
    note: str | None = None


class Model(pydantic.BaseModel):
    degrees: float = pydantic.Field(description="Celsius")


class Keys(TypedDict):
    degrees: float


TEXT = '{"place": {"name": "Oslo"}, "degrees": -3}'


@pytest.mark.parametrize(
    ("into", "name", "expected"),
    [
        (Weather, "Weather", Weather(Place("Oslo"), -3.0)),
        (Model, "Model", Model(degrees=-3)),
        (Keys, "Keys", {"degrees": -3.0}),
        (dict[str, Any], "dict", {"place": {"name": "Oslo"}, "degrees": -3}),
    ],
)
def test_an_answer_in_a_type_of_ones_own(
    client: Any, gateway: FakeGateway, into: Any, name: str, expected: Any
) -> None:
    gateway.reply(TEXT).reply(TEXT)

    reply = client.call("chat", "Oslo?", model="m", json_schema=into)
    stream, _, _ = client.read("stream", "Oslo?", model="m", json_schema=into)

    assert reply.parse(into) == stream.parse(into) == stream.reply().choices[0].parse(into)
    assert reply.parse(into) == expected
    sent = gateway.calls[0].request.response_format.json_schema
    assert sent.name == name
    assert json.loads(sent.schema_json)["type"] == "object"
    asked_for = json.loads(sent.schema_json).get("properties", {})
    assert ("degrees" in asked_for) == (name != "dict")


def test_a_list_of_them(client: Any, gateway: FakeGateway) -> None:
    gateway.reply('[{"name": "Oslo"}, {"name": "Rome"}]')
    reply = client.call("chat", "Places?", model="m")
    assert reply.parse(list[Place]) == [Place("Oslo"), Place("Rome")]


def test_what_does_not_fit_is_told(client: Any, gateway: FakeGateway) -> None:
    gateway.reply('{"place": {"name": "Os', finish_reason="length").reply('{"degrees": "cold"}')

    with pytest.raises(ValueError, match=r"the answer \(finish_reason 'length'\) is no Weather"):
        client.call("chat", "Oslo?", model="m").parse(Weather)
    with pytest.raises(ValueError, match=r"degrees\n.*valid number") as caught:
        client.call("chat", "Oslo?", model="m").parse(Model)
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)


def test_arguments_of_a_tool(client: Any, gateway: FakeGateway) -> None:
    gateway.reply(tool_call("weather", {"name": "Rome"})).reply(tool_call("now", ""))
    tools = [{"name": "weather", "parameters": Place}]

    [call] = client.call("chat", "Rome?", model="m", tools=tools).tool_calls
    [empty] = client.call("chat", "Now?", model="m").tool_calls

    assert call.parse(Place) == Place("Rome")
    assert empty.parse(dict[str, int]) == {}
    with pytest.raises(ValueError, match=r"arguments of the call of 'now' \(call_1\) is no Place"):
        empty.parse(Place)
    declared = json.loads(gateway.calls[0].request.tools[0].function.parameters_schema_json)
    assert declared["properties"]["name"]["type"] == "string"


def test_a_type_that_has_no_schema_is_told_before_anything_is_sent(
    client: Any, gateway: FakeGateway
) -> None:
    class Opaque:
        pass

    with pytest.raises(TypeError, match=r"expected a type that pydantic knows, got .*Opaque"):
        client.call("chat", "Hi", model="m", json_schema=Opaque)
    assert gateway.calls == []


WITHOUT = """
import sys
sys.modules["pydantic"] = None
from dataclasses import dataclass
from tokenwire import Client, Reply
from tokenwire.v1.chat_service_pb2 import ChatResponse
print("imported")
try:
    Reply(ChatResponse()).parse(dict)
except ImportError as error:
    print(error)
"""


def test_who_asks_for_none_needs_no_pydantic() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    hint = "types of your own need pydantic: pip install 'tokenwire[pydantic]'"
    assert (ran.stdout, ran.stderr) == (f"imported\n{hint}\n", "")
