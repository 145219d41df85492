"""The choice of a dialect: what configuration says of the model, else of the upstream, else a
guess."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from tokenwire_service.providers import AUTO, DIALECTS, guess
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
        return dialects[name_of(route)]

    return choose


def name_of(route: Route) -> str:
    """The name of a route's dialect."""
    name = route.upstream.dialect
    if route.model is not None and route.model.dialect is not None:
        name = route.model.dialect
    if name != AUTO:
        return name
    names = (route.model_name, route.model.name) if route.model is not None else (route.model_name,)
    return guess(route.upstream.base_url, names)
