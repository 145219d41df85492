"""An answer in its provider's own form, so that the next request can give it back as it was.

Some providers want parts of an answer back that the contract has no field for, unchanged and in
their place: signed thoughts, searches of their own. Their dialects keep the whole answer in
`ChatMessage.extra_json`, under the dialect's name, which no provider knows: every dialect takes
the members of all others off before it sends what is left.
"""

from __future__ import annotations

import json
from typing import Any

from tokenwire_service.errors import Violation, invalid
from tokenwire_service.upstream.json_text import clean, encode, json_object, protocol

MEMBERS = frozenset({"anthropic", "gemini"})


def split(extra_json: str, path: str, own: str = "") -> tuple[dict[str, Any] | None, str]:
    """(what the dialect `own` kept there, the rest as JSON text; empty for nothing)."""
    if not any(f'"{member}"' in extra_json for member in MEMBERS):
        return None, extra_json
    extra = json_object(extra_json, path)
    kept = extra.get(own)
    rest = {name: value for name, value in extra.items() if name not in MEMBERS}
    try:
        text = encode(rest).decode() if rest else ""
    except RecursionError:
        raise invalid(Violation(path, "nested too deeply, expected a JSON object")) from None
    return kept if isinstance(kept, dict) else None, text


def sendable(value: Any) -> Any:
    """A provider's JSON with lone surrogates replaced: callers could not send it back otherwise.
    Raises a PROTOCOL fault where it is nested too deeply."""
    try:
        return _sendable(value)
    except RecursionError:
        raise protocol("the answer is nested too deeply") from None


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_sendable(item) for item in value]
    if isinstance(value, dict):
        return {clean(name): _sendable(item) for name, item in value.items()}
    return value


def says(value: Any, text: str) -> bool:
    """Whether a value that was kept is still what a caller's JSON text says."""
    try:
        return bool(json.loads(encode(value)) == (json.loads(text) if text.strip() else {}))
    except (ValueError, RecursionError):
        return False
