"""A model that may call two functions; the answer and the calls arrive as a stream.

python tools.py [MODEL]
"""
# ruff: noqa: T201 - it prints

import asyncio
import sys
from typing import Any

from tokenwire import AsyncClient

WEATHER = {"Oslo": -3, "Rome": 21}

TOOLS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "description": "Temperature in a city, in degrees Celsius",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
    {"name": "cities", "description": "Names of the cities that have a thermometer"},
]


def run(name: str, arguments: dict[str, Any]) -> Any:
    """What the model asked for; an answer it understands when it asked for nonsense."""
    if name == "cities":
        return sorted(WEATHER)
    if name == "weather":
        return WEATHER.get(arguments.get("city", ""), "no such city")
    return f"no such tool: {name}"


async def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "gpt-4o-mini"
    conversation: list[Any] = [{"role": "user", "content": "Where is it warmer, Oslo or Rome?"}]
    async with AsyncClient() as client:
        while True:
            stream = client.stream(conversation, model=model, tools=TOOLS)
            async for event in stream:
                print(event.text, end="", flush=True)
            print()
            conversation.append(stream.message)
            if not stream.tool_calls:
                break
            for call in stream.tool_calls:
                try:
                    result = run(call.name, call.arguments)
                except ValueError as error:  # not JSON: let the model try again
                    result = str(error)
                print(f"[{call.name} {call.raw_arguments} -> {result}]")
                conversation.append(call.answer(result))


if __name__ == "__main__":
    asyncio.run(main())
