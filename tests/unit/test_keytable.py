"""What `tokenwire keys` writes for people."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict

from tokenwire.admin.v1 import admin_service_pb2
from tokenwire_service.admin import _SCOPES, _STATES
from tokenwire_service.keytable import duration as shown_duration
from tokenwire_service.keytable import table
from tokenwire_service.snapshot import Scope, State

LISTING = {
    "gateway": {
        "version": "1.2.3",
        "uptime": "7384s",
        "inFlight": 4,
        "queued": 1,
        "slots": 1000,
        "retryBudget": 9.76,
        "draining": True,
    },
    "upstreams": [
        {
            "name": "openai",
            "keysGeneration": "3",
            "waiting": 2,
            "inFlight": 4,
            "queued": 1,
            "slots": 750,
            "closures": [
                {
                    "scope": "CLOSURE_SCOPE_UPSTREAM_MODEL",
                    "model": "gpt-4o",
                    "state": "KEY_STATE_COOLING",
                    "fault": "overloaded",
                    "opensIn": "4.2s",
                }
            ],
            "quotaGroups": [
                {"quotaGroup": "acct", "model": "gpt-4o", "inFlight": 4, "concurrencyLimit": 4.9},
                {"quotaGroup": "free", "model": "gpt-4o", "inFlight": 1},
            ],
            "keys": [
                {
                    "id": "team-1",
                    "quotaGroup": "acct",
                    "state": "KEY_STATE_PARTLY",
                    "inFlight": 4,
                    "closures": [
                        {
                            "scope": "CLOSURE_SCOPE_KEY_MODEL",
                            "model": "o3\x1b[2J\n",
                            "state": "KEY_STATE_RETIRED",
                            "fault": "access_denied",
                            "opensIn": "3000s",
                        },
                    ],
                    "counters": {
                        "attempts": "12",
                        "successes": "9",
                        "abandoned": "1",
                        "faults": [
                            {"fault": "access_denied", "count": "1"},
                            {"fault": "rate_limited", "count": "1"},
                        ],
                        "promptTokens": "100",
                        "completionTokens": "23",
                        "lastUsedAgo": "1s",
                        "lastFault": {
                            "fault": "rate_limited",
                            "httpStatus": 429,
                            "upstreamCode": "slow\x1bdown",
                            "ago": "61s",
                        },
                    },
                },
                {
                    "id": "key-0a1b2c3d",
                    "quotaGroup": "key-0a1b2c3d",
                    "state": "KEY_STATE_RETIRED",
                    "closures": [
                        {
                            "scope": "CLOSURE_SCOPE_KEY",
                            "state": "KEY_STATE_RETIRED",
                            "fault": "key_rejected",
                        },
                        {
                            "scope": "CLOSURE_SCOPE_GROUP_MODEL",
                            "state": "KEY_STATE_PROBE_DUE",
                            "fault": "rate_limited",
                            "opensIn": "0s",
                        },
                    ],
                },
            ],
        }
    ],
    "keyFiles": [
        {"path": "/run/good", "upstreams": ["openai"]},
        {"path": "/run/bad", "upstreams": ["openai", "other"], "problem": "empty"},
    ],
}

SHOWN = """\
gateway 1.2.3, up 2h 3m, draining: 4 of 1000 slots, 1 queued, retry budget 9.8

upstream openai: 4 of 750 slots, 1 queued, 2 waiting for a key, keys set 3 times
  cooling for 4.2s: the upstream, for gpt-4o (overloaded)
  KEY           STATE    GROUP         RUNNING  ATTEMPTS  OK  FAULTS                          LEFT  TOKENS  USED
  team-1        partly   acct                4        12   9  access_denied:1 rate_limited:1     1     123  1.0s ago
    retired for 50m 0s: the key, for o3?[2J? (access_denied)
    last fault rate_limited 429 slow?down, 1m 1s ago
  key-0a1b2c3d  retired  key-0a1b2c3d        0         0   0  -                                  0       0  never
    retired: the key (key_rejected)
    probe due: its quota group, for the list of models (rate_limited)
  quota group acct, for gpt-4o: 4 running, bears 4

key file /run/bad: empty; its last good keys stay (openai, other)"""  # noqa: E501


def test_the_table() -> None:
    listing = ParseDict(LISTING, admin_service_pb2.ListKeysResponse())
    assert "\n".join(table(listing)) == SHOWN


def test_a_gateway_without_anything_has_a_table() -> None:
    lines = list(table(admin_service_pb2.ListKeysResponse(upstreams=[{"name": "u"}])))
    assert lines[2].startswith("upstream u: ")
    assert lines[3].split()[0] == "KEY"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0s"),
        (59.94, "59.9s"),
        (60, "1m 0s"),
        (3599, "59m 59s"),
        (3600, "1h 0m"),
        (90_061, "1d 1h"),
    ],
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    assert shown_duration(duration) == shown


def test_the_contract_has_every_state_and_scope() -> None:
    assert set(_STATES) == set(State)
    assert set(_SCOPES) == set(Scope)
    for state, value in _STATES.items():
        assert admin_service_pb2.KeyState.Name(value) == f"KEY_STATE_{state.name}"
    for scope, number in _SCOPES.items():
        assert admin_service_pb2.ClosureScope.Name(number) == f"CLOSURE_SCOPE_{scope.name}"
    assert len(admin_service_pb2.KeyState.keys()) == len(State) + 1
    assert len(admin_service_pb2.ClosureScope.keys()) == len(Scope) + 1
