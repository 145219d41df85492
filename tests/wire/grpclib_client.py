"""A caller made with grpclib, which shares no line with grpcio: prints what it saw as JSON.

Run by the Python of build/wire/venv, with stubs that grpclib's own plugin generated on the path.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from google.protobuf.internal import api_implementation
from google.rpc import error_details_pb2
from grpclib.client import Channel
from grpclib.exceptions import GRPCError

from tokenwire.v1 import chat_service_grpc, chat_service_pb2


def _request(text: str, simulate: dict[str, Any], **fields: Any) -> chat_service_pb2.ChatRequest:
    extra = json.dumps({"simulate": simulate})
    request = chat_service_pb2.ChatRequest(model="simulated-small", extra_body_json=extra, **fields)
    request.messages.add(role="user", content=text)
    return request


async def _chat(stub: chat_service_grpc.ChatServiceStub) -> Any:
    answer = await stub.Chat(_request("Hi", {"text": "你好, pong"}), timeout=20)
    return [choice.message.content for choice in answer.choices]


async def _stream(stub: chat_service_grpc.ChatServiceStub) -> Any:
    chat = _request("Hi", {"chunks": ["po", "n", "g"]})
    kinds, text = [], ""
    async with stub.StreamChat.open(timeout=20) as stream:
        await stream.send_message(chat_service_pb2.StreamChatRequest(chat=chat), end=True)
        async for event in stream:
            kinds.append(event.WhichOneof("event"))
            text += event.delta.content
        await stream.recv_trailing_metadata()
        request_id = stream.trailing_metadata["x-request-id"]
    return {"kinds": kinds, "text": text, "has_request_id": bool(request_id)}


async def _error(stub: chat_service_grpc.ChatServiceStub) -> Any:
    request = _request("Hi", {"text": "never"})
    request.params.temperature = 3
    try:
        await stub.Chat(request, timeout=20)
    except GRPCError as error:
        found = {type(detail).DESCRIPTOR.full_name: detail for detail in error.details or ()}
        info = found[error_details_pb2.ErrorInfo.DESCRIPTOR.full_name]
        refused = found[error_details_pb2.BadRequest.DESCRIPTOR.full_name]
        fields = [violation.field for violation in refused.field_violations]
        return {"status": error.status.name, "reason": info.reason, "fields": fields}
    return "no error"


async def _cancel(stub: chat_service_grpc.ChatServiceStub) -> Any:
    chat = _request("Hi", {"chunks": ["po", "ng"], "fault": "stall_midway"})
    async with stub.StreamChat.open(timeout=20) as stream:
        await stream.send_message(chat_service_pb2.StreamChatRequest(chat=chat), end=True)
        async for event in stream:
            if event.delta.content:
                await stream.cancel()
                return event.delta.content
    return "no text"


async def _main(host: str, port: int) -> None:
    channel = Channel(host, port)
    try:
        stub = chat_service_grpc.ChatServiceStub(channel)
        saw = {
            "chat": await _chat(stub),
            "stream": await _stream(stub),
            "error": await _error(stub),
            "cancel": await _cancel(stub),
            "protobuf": api_implementation.Type(),
            "grpcio": "grpc" in sys.modules,
        }
    finally:
        channel.close()
    print(json.dumps(saw))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))
