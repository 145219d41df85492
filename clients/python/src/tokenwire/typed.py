"""JSON in the caller's own types: pydantic says what their schema is, and what fits.

A type is whatever pydantic takes: a dataclass, a TypedDict, a pydantic model, `list[...]` of one.
Without pydantic both functions raise ImportError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


def schema_of(of: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a type. Raises TypeError for what is none."""
    return _adapter(of).json_schema()


def parsed(text: str, into: type[T], what: str) -> T:
    """`text` as an `into`. Raises ValueError that says what did not fit, and TypeError."""
    adapter = _adapter(into)
    try:
        return adapter.validate_json(text)
    except ValueError as error:
        name = getattr(into, "__name__", into)
        raise ValueError(f"the {what} is no {name}: {error}") from error


def _adapter(of: type[T]) -> TypeAdapter[T]:
    try:
        # Here, so that who wants none of this needs no pydantic.
        from pydantic import TypeAdapter
        from pydantic.errors import PydanticUserError
    except ImportError as error:
        raise ImportError(
            "types of your own need pydantic: pip install 'tokenwire[pydantic]'"
        ) from error
    try:
        return TypeAdapter(of)
    except PydanticUserError as error:
        raise TypeError(f"expected a type that pydantic knows, got {of!r}: {error}") from None
