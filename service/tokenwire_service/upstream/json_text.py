"""JSON between callers and providers: read tolerantly, written exactly, nothing lost on the way.

Callers' JSON travels as text: its numbers and the order of its keys reach the provider as they
were written. Providers' JSON may hold lone surrogates, malformed UTF-8 and numbers of any length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from tokenwire_service.errors import Fault, UpstreamFault, Violation, invalid

INT32_MAX = 2**31 - 1
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_EXCERPT_BYTES = 80
_WORD_BYTES = bytes(set(range(0x21, 0x7F)) - set(b"\"',<>()[]{}"))
_encoder = msgspec.json.Encoder(decimal_format="number")


def encode(value: Any) -> bytes:
    """The body of a request. Raw pieces keep their own text."""
    return _encoder.encode(value)


# --- a caller's JSON ---------------------------------------------------------------------


def json_object(text: str, path: str) -> dict[str, Any]:
    """A JSON object with its numbers as they are written, so that none is rounded."""
    try:
        value = _parsed(text)
        if _SURROGATE.search(text):
            _encoder.encode(value)  # refuses half a pair, which could not be sent
    except UnicodeEncodeError:
        reason = "half a surrogate pair"
    except ValueError as error:
        reason = f"not valid JSON: {str(error)[:120]}"
    except RecursionError:
        reason = "nested too deeply"
    else:
        if isinstance(value, dict):
            return value
        reason = "got another JSON value"
    raise invalid(Violation(path, f"{reason}, expected a JSON object"))


def raw_object(text: str, path: str) -> msgspec.Raw:
    """The caller's own text, checked: it reaches the upstream unchanged."""
    json_object(text, path)
    return msgspec.Raw(text.encode())


def patched(target: Any, text: str, path: str, typed_only: tuple[str, ...] = ()) -> dict[str, Any]:
    """`target` merged with the patch in `text`, as RFC 7396 says."""
    patch = json_object(text, path)
    for name in typed_only:
        if name in patch:
            raise invalid(Violation(path, f"may not set {name}: use the typed field"))
    try:
        return _merge_patch(target, patch)
    except RecursionError:
        raise invalid(Violation(path, "nested too deeply, expected a JSON object")) from None


def _merge_patch(target: Any, patch: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(target, msgspec.Raw):
        target = _parsed(bytes(target).decode())
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = _merge_patch(merged.get(name), value)
        else:
            merged[name] = value
    return merged


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_number, parse_float=_number, parse_constant=_no_constant)


def _number(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


# --- a provider's JSON ------------------------------------------------------------------


def load(data: bytes) -> tuple[Any, bool]:
    """(value, lossy): lossy when strings may hold lone surrogates. Raises PROTOCOL faults.

    msgspec refuses lone surrogates and malformed UTF-8, which real streams contain; the
    standard library reads them.
    """
    try:
        return msgspec.json.decode(data), False
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(data.decode("utf-8", "replace"), parse_constant=_no_constant), True
    except (ValueError, RecursionError) as error:
        kind = "is nested too deeply" if isinstance(error, RecursionError) else "is not JSON"
        raise protocol(f"the answer {kind}: {excerpt(data)}") from None


def dumps(value: Any) -> str:
    try:
        try:
            return _encoder.encode(value).decode()
        except UnicodeEncodeError:
            return json.dumps(value)  # keeps a lone surrogate as its escape, which is valid UTF-8
    except RecursionError:
        raise protocol("the answer is nested too deeply") from None


def excerpt(data: bytes) -> str:
    """The start of an answer that could not be read, fit for a message. It never ends within a
    word: half a key would not be recognised as one, and pass."""
    text, rest = data[:_EXCERPT_BYTES], data[_EXCERPT_BYTES : _EXCERPT_BYTES + 1]
    if rest and rest[0] in _WORD_BYTES:
        text = text.rstrip(_WORD_BYTES)
    return repr(" ".join(text.decode("utf-8", "replace").split()))


def rest(raw: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """What the schema does not know and the upstream did not leave empty."""
    return {
        k: v for k, v in raw.items() if k not in known and v is not None and v != [] and v != {}
    }


def set_extra(message: Any, extra: dict[str, Any]) -> None:
    if extra:
        message.extra_json = dumps(extra)


def string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def clean(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def nested(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def count(value: Any) -> int | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= INT32_MAX:
        return int(value)
    return None


def first_count(*values: Any) -> int | None:
    for value in values:
        if (number := count(value)) is not None:
            return number
    return None


def real(value: Any) -> float:
    """0 for what is no number, or has more digits than a float takes."""
    if isinstance(value, float) or (isinstance(value, int) and abs(value) <= INT32_MAX):
        return float(value)
    return 0.0


def protocol(message: str) -> UpstreamFault:
    return UpstreamFault(Fault.PROTOCOL, message)


class Halves:
    """Texts that come in pieces, as protobuf strings can hold them: a surrogate at the end of one
    piece waits for its other half in the next. Slots name the texts."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str, int], str] = {}

    def join(self, slot: tuple[int, str, int], text: str) -> str:
        """The next piece of a text."""
        if not text:
            return text
        text = self._held.pop(slot, "") + text
        if "\ud800" <= text[-1] <= "\udbff":
            self._held[slot] = text[-1]
            text = text[:-1]
        return clean(text)

    def left(self) -> list[tuple[int, str, int]]:
        """The slots whose last surrogate never found its other half: each lacks one U+FFFD."""
        left = sorted(self._held)
        self._held.clear()
        return left
