"""A key ring as it stood at one moment: frozen values for whoever shows it. No key material."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tokenwire_service.errors import Fault


class Scope(enum.Enum):
    """What a closure closes."""

    KEY = "key"
    KEY_MODEL = "key_model"
    GROUP = "group"
    GROUP_MODEL = "group_model"
    UPSTREAM = "upstream"
    UPSTREAM_MODEL = "upstream_model"


class State(enum.Enum):
    """How far something can serve, the worse the later."""

    READY = "ready"
    PARTLY = "partly"  # closed for some models
    LIMITED = "limited"  # at a limit of its own, or of its group: a moment's matter
    PROBE_DUE = "probe_due"  # its time is over, and the next request will probe it
    PROBING = "probing"  # one request does
    COOLING = "cooling"  # until a time
    RETIRED = "retired"  # by a verdict that rarely passes by itself
    LEAVING = "leaving"  # configured no more, and in use yet


_ORDER = {state: order for order, state in enumerate(State)}


@dataclass(frozen=True)
class Closure:
    """Why a scope is closed. `until`: monotonic seconds, inf where only a new secret or an event
    opens it. `model`: None where it is closed for all, empty for the list of models."""

    scope: Scope
    state: State
    fault: Fault | None
    until: float
    model: str | None = None


@dataclass(frozen=True)
class KeyView:
    """One key. `closures`: of itself and of its group; those of the upstream stand there."""

    id: str
    quota_group: str
    weight: float
    state: State
    in_flight: int
    closures: tuple[Closure, ...]


@dataclass(frozen=True)
class GroupView:
    """A quota group with one model. `limit`: requests at once that it was found to bear; inf
    while that is not known."""

    quota_group: str
    model: str
    in_flight: int
    limit: float


@dataclass(frozen=True)
class RingView:
    """All keys of one upstream, those that leave last. `generation`: how often they were set."""

    generation: int
    keys: tuple[KeyView, ...]
    groups: tuple[GroupView, ...]
    closures: tuple[Closure, ...]  # of the upstream as a whole


def worst(closures: tuple[Closure, ...]) -> State:
    """What the closures come to: the worst of those for all models, else whether some are."""
    whole = [each.state for each in closures if each.model is None]
    if whole:
        return max(whole, key=_ORDER.__getitem__)
    return State.PARTLY if closures else State.READY
