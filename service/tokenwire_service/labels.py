"""Which names of models may be labels of metrics: callers may invent names for ever."""

from __future__ import annotations

from collections.abc import Iterable

from tokenwire_service.config import Config
from tokenwire_service.secret import Scrubber

OTHER = "other"  # the label of every name that has earned none of its own


class _Names:
    """Those that are known, and of the others the first `most` that an upstream answered for.
    None that `scrub` finds a secret in."""

    def __init__(self, most: int, scrub: Scrubber) -> None:
        self._known: frozenset[str] = frozenset()
        self._earned: set[str] = set()
        self._most = most
        self._scrub = scrub

    def know(self, names: Iterable[str]) -> None:
        """These are known now, instead of those before."""
        self._known = frozenset(names)

    def label(self, name: str, *, answered: bool) -> str:
        """The name itself, or OTHER; empty for none. `answered`: an upstream has, for this name."""
        if not name or name in self._known or name in self._earned:
            return name
        if not answered or len(self._earned) >= self._most or self._scrub(name) != name:
            return OTHER
        self._earned.add(name)
        return name


class Labels:
    """The labels of one gateway. `config` is the configuration in force; what was earned stays
    when another one is taken."""

    def __init__(self, config: Config, scrub: Scrubber) -> None:
        most = config.metrics.model_names
        self.asked = _Names(most, scrub)  # as callers spell them
        self.sent = _Names(most, scrub)  # as upstreams are asked for them
        self.take(config)

    def take(self, config: Config) -> None:
        """Another configuration is in force."""
        self.config = config
        self.asked.know(name for model in config.models for name in (model.name, *model.aliases))
        self.sent.know(model.upstream_model for model in config.models)
