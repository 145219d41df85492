"""The fake gateway keeps the promises its users' tests rest on."""

from __future__ import annotations

import pytest

from tokenwire import Reason, TokenwireError
from tokenwire.testing import CODES, FakeGateway
from tokenwire.v1.chat_service_pb2 import Finish, StreamChatResponse
from tokenwire.v1.error_reason_pb2 import ErrorReason


def test_every_reason_has_its_code() -> None:
    names = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()}  # noqa: SIM118 - no dict
    assert set(CODES) == names - {"UNSPECIFIED"}
    assert {str(reason) for reason in Reason} == {*CODES, "STREAM_INCOMPLETE"}


@pytest.mark.parametrize("reason", sorted(CODES))
def test_every_reason_reaches_the_client(gateway: FakeGateway, reason: str) -> None:
    gateway.fail(reason, pushback_ms=-1)
    with gateway.client() as client, pytest.raises(TokenwireError) as caught:
        client.chat("Hi", model="m")
    assert (caught.value.reason, caught.value.code) == (reason, CODES[reason])
    assert len(gateway.calls) == 1


def test_a_call_without_a_script_fails_loudly(gateway: FakeGateway) -> None:
    with gateway.client() as client, pytest.raises(TokenwireError, match="no answer left"):
        client.chat("Hi", model="m")


def test_a_token_can_be_demanded() -> None:
    with FakeGateway(token="right") as gateway:
        gateway.reply("ok")
        with gateway.client(token="wrong") as client, pytest.raises(TokenwireError) as caught:
            client.chat("Hi", model="m")
        assert caught.value.reason == "CALLER_UNAUTHENTICATED"
        with gateway.client(token="right") as client:
            assert client.chat("Hi", model="m").text == "ok"


def test_mistakes_in_a_script_are_told_at_once(gateway: FakeGateway) -> None:
    with pytest.raises(ValueError, match="FINISH_REASON_EOS"):
        gateway.reply("x", finish_reason="eos")
    with pytest.raises(KeyError, match="TYPO"):
        gateway.fail("TYPO")


def test_scripted_events_are_not_repeated(gateway: FakeGateway) -> None:
    gateway.reply("x", StreamChatResponse(finish=Finish(finish_reason_raw="mine")))
    with gateway.client() as client:
        kinds = [event.kind for event in client.stream("Hi", model="m")]
    assert kinds == ["header", "delta", "finish", "trailer"]


def test_an_answered_call_was_not_cancelled(gateway: FakeGateway) -> None:
    gateway.reply("x")
    with gateway.client() as client:
        client.chat("Hi", model="m")
    assert not gateway.calls[0].wait_cancelled()


def test_cut_is_no_ok_for_a_unary_call(gateway: FakeGateway) -> None:
    gateway.cut("x")
    with gateway.client() as client, pytest.raises(TokenwireError) as caught:
        client.chat("Hi", model="m")
    assert caught.value.reason == "UPSTREAM_STREAM_INTERRUPTED"


def test_closing_ends_hanging_calls() -> None:
    with FakeGateway() as gateway:
        gateway.hang("x").hang()
        client = gateway.client()
        stream = client.stream("Hi", model="m")
        next(stream)
    with pytest.raises(TokenwireError):
        list(stream)
    client.close()
