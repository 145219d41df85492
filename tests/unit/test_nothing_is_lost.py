"""Every field of a request reaches a foreign upstream, or the caller hears that it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

import dialect_fields
from dialect_fields import FIELDS, UNSEEN
from tokenwire_service.config import Upstream
from tokenwire_service.errors import GatewayError
from tokenwire_service.upstream.anthropic import Anthropic
from tokenwire_service.upstream.dashscope import DashScope
from tokenwire_service.upstream.dialect import Dialect, Encoded, Route
from tokenwire_service.upstream.gemini import Gemini

# Messages that are refused, or left out, as a whole.
PARENTS = {"CustomTool": ".custom", "CustomCall": ".custom", "Annotation": ".annotations"}
# What goes with a schema, and is only named where there is no place for it.
NOTED = {"response_format.json_schema.name"}
DIALECTS: dict[str, tuple[Dialect, str]] = {
    "anthropic": (Anthropic(), "claude-opus-5"),
    "anthropic before 4.6": (Anthropic(), "claude-sonnet-4-5"),
    "gemini": (Gemini(), "gemini-3-pro"),
    "gemini before 3": (Gemini(), "gemini-2.5-flash"),
    "dashscope": (DashScope(), "qwen-plus"),
    "dashscope multimodal": (DashScope(), "qwen3-vl-plus"),
}


def encode(dialect: str, text: str, *, drop: bool) -> Encoded:
    speaker, model = DIALECTS[dialect]
    upstream = Upstream(name="u", base_url="http://upstream.example/v1", keys=())
    chat = dialect_fields.chat(text, drop=drop)
    return speaker.encode(chat, Route(upstream, None, model), stream=False)


def attempted(dialect: str, text: str, *, drop: bool) -> tuple[Encoded | None, set[str]]:
    """(the request, the paths of what is refused of it)."""
    try:
        return encode(dialect, text, drop=drop), set()
    except GatewayError as error:
        assert error.reason_name in ("UNSUPPORTED_PARAMETER", "INVALID_REQUEST")
        return None, {violation.field for violation in error.violations}


def sent(encoded: Encoded) -> tuple[str, Any]:
    return encoded.path, json.loads(encoded.body)


def test_every_field_has_its_row() -> None:
    assert set(FIELDS) | set(UNSEEN) == set(dialect_fields.all_fields())
    assert not set(FIELDS) & set(UNSEEN)


@pytest.mark.parametrize("drop", [False, True], ids=["reject", "drop"])
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_field_is_sent_or_the_caller_hears_of_it(dialect: str, field: str, drop: bool) -> None:
    pair = FIELDS[field]
    before, refused_before = attempted(dialect, pair.without, drop=drop)
    after, refused = attempted(dialect, pair.having, drop=drop)
    if after is None:
        new = refused - refused_before
        words = (field.split(".")[-1], PARENTS.get(field.split(".")[0], "."))
        assert any(word in path for path in new for word in words), (field, refused)
        if drop:  # only what the answer hangs on is refused even then
            assert not any(path.startswith("params.") for path in new), new
        return
    assert before is not None
    if sent(before) != sent(after):
        word = field.split(".")[-1]  # what cannot be said in full may change what is said
        new = set(after.dropped) - set(before.dropped)
        assert all(word in path or path in NOTED for path in new), new
        return
    assert len(set(after.dropped) - set(before.dropped)) == 1, f"{field} is lost without a word"
