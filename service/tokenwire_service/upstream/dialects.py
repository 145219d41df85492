"""The choice of a dialect: what configuration says of the model, else of the upstream, else a
guess."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from tokenwire_service.providers import DIALECTS
from tokenwire_service.upstream.dialect import Dialect, Route


def loaded() -> dict[str, Dialect]:
    """Every dialect by its name. They keep nothing between calls: one of each is enough."""
    found: dict[str, Dialect] = {}
    for name, row in DIALECTS.items():
        module, _, implementation = row.implementation.partition(":")
        found[name] = getattr(import_module(f"{__package__}.{module}"), implementation)()
    return found


def chooser() -> Callable[[Route], Dialect]:
    """What finds the dialect of a route."""
    dialects = loaded()

    def choose(route: Route) -> Dialect:
        return dialects[route.dialect_name]

    return choose
