"""Which names of models may be labels of metrics: callers may invent names for ever."""

from __future__ import annotations

from collections.abc import Iterable

from tokenwire_service.config import Config
from tokenwire_service.secret import Scrubber

OTHER = "other"  # the label of every name that has earned none of its own


class Names:
    """Those that are known, and of the others the first `most` that an upstream answered for.
    None that `scrub` finds a secret in."""

    def __init__(self, known: Iterable[str], most: int, scrub: Scrubber) -> None:
        self._known = set(known)
        self._room = most
        self._scrub = scrub

    def label(self, name: str, *, answered: bool) -> str:
        """The name itself, or OTHER; empty for none. `answered`: an upstream has, for this name."""
        if not name or name in self._known:
            return name
        if not answered or self._room <= 0 or self._scrub(name) != name:
            return OTHER
        self._room -= 1
        self._known.add(name)
        return name


def asked(config: Config, scrub: Scrubber) -> Names:
    """Of names as callers spell them."""
    known = (name for model in config.models for name in (model.name, *model.aliases))
    return Names(known, config.metrics.model_names, scrub)


def sent(config: Config, scrub: Scrubber) -> Names:
    """Of names as upstreams are asked for them."""
    known = (model.upstream_model for model in config.models)
    return Names(known, config.metrics.model_names, scrub)
