"""Compares what a program printed with what a case expects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """One sentence for each place where `found` is not as expected. Objects may hold more."""
    return list(_differences(found, expected, path))


def _differences(found: Any, expected: Any, path: str) -> Iterator[str]:
    if isinstance(expected, dict) and len(expected) == 1 and next(iter(expected)) in _RULES:
        [(name, value)] = expected.items()
        if not _RULES[name](found, value):
            yield f"{path}: got {_shown(found)}, expected {name} {_shown(value)}"
    elif isinstance(expected, dict):
        if not isinstance(found, dict):
            yield f"{path}: got {_shown(found)}, expected an object"
            return
        for name, value in expected.items():
            if name not in found:
                yield f"{path}.{name}: missing, expected {_shown(value)}"
            else:
                yield from _differences(found[name], value, f"{path}.{name}")
    elif isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            yield f"{path}: got {_shown(found)}, expected {len(expected)} elements"
            return
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from _differences(one, other, f"{path}[{i}]")
    elif found != expected or isinstance(found, bool) != isinstance(expected, bool):
        yield f"{path}: got {_shown(found)}, expected {_shown(expected)}"


def _shown(value: Any) -> str:
    return json.dumps(value)[:300]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_RULES: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": lambda found, least: _is_number(found) and found > least,
    "$between": lambda found, ends: _is_number(found) and ends[0] <= found <= ends[1],
    "$in": lambda found, values: found in values,
    "$some": lambda found, _: bool(found),
    "$number": lambda found, _: _is_number(found),
    "$last": lambda found, value: isinstance(found, list) and bool(found) and found[-1] == value,
}
