"""What a project elsewhere does with the installed wheel: see check.py."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tokenwire import AsyncClient, Client, Reason, Reply, TokenwireError
from tokenwire.testing import FakeGateway, tool_call


@dataclass
class Weather:
    """Of a city."""

    city: str
    degrees: float


def story(client: Client) -> str:
    """What the README begins with."""
    return "".join(event.text for event in client.stream("Tell me a story.", model="any"))


async def weather(client: AsyncClient) -> Weather:
    """An answer in a type of one's own."""
    reply: Reply = await client.chat("Weather in Oslo?", model="any", json_schema=Weather)
    return reply.parse(Weather)


async def main(gateway: FakeGateway) -> None:
    """Both clients, a failure and a call of a tool."""
    async with gateway.async_client() as client:
        gateway.reply('{"city": "Oslo", "degrees": -3}')
        assert (await weather(client)).degrees == -3
    with gateway.client() as blocking:
        gateway.reply("from ", "outside")
        assert story(blocking) == "from outside"
        gateway.fail("UPSTREAM_STREAM_INTERRUPTED", after=["from "])
        try:
            story(blocking)
        except TokenwireError as error:
            match error.reason:
                case Reason.UPSTREAM_STREAM_INTERRUPTED:
                    assert error.partial_text == "from "
                case _:
                    raise
        gateway.reply(tool_call("weather", {"city": "Rome", "degrees": 21}))
        [call] = blocking.chat("Weather?", model="any").tool_calls
        assert call.parse(Weather).city == "Rome"
        gateway.fail("RATE_LIMITED", retry_after=1.5)
        results = blocking.batch_ordered(["Hi"], model="any")
        assert [result.error and result.error.retry_after for result in results] == [1.5]


if __name__ == "__main__":
    with FakeGateway() as fake:
        asyncio.run(main(fake))
    print("from outside")
