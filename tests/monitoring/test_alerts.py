"""Each alert fires where it should and is silent where it should not: promtool's virtual time."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "monitoring" / "rules.yaml"
NAMES = [
    rule["alert"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
]
STREAM = 'method="tokenwire.v1.ChatService/StreamChat"'
Series = dict[str, str]


def rpcs(*, failing: str, reason: str, labels: str = "") -> Series:
    """Ten OK a minute beside so many that fail."""
    return {
        f'tokenwire_rpcs_total{{code="OK",reason="",{STREAM},{labels}}}': "0+10x60",
        f'tokenwire_rpcs_total{{code="X",reason="{reason}",{STREAM},{labels}}}': failing,
    }


def attempts(*, failing: str, outcome: str) -> Series:
    return {
        'tokenwire_attempts_total{upstream="u",outcome="ok"}': "0+10x60",
        f'tokenwire_attempts_total{{upstream="u",outcome="{outcome}"}}': failing,
    }


def slow(metric: str, fast: str, bound: str) -> tuple[Series, Series]:
    """Times of which all are above `fast`, or none; `bound`: seconds, far above the threshold."""

    def histogram(below: str) -> Series:
        name = f"tokenwire_{metric}_bucket"
        return {
            f'{name}{{upstream="u",le="{fast}"}}': below,
            f'{name}{{upstream="u",le="{bound}"}}': "0+10x60",
            f'{name}{{upstream="u",le="+Inf"}}': "0+10x60",
        }

    return histogram("0+0x60"), histogram("0+10x60")


# Alert -> series with which it fires within half an hour, series with which it does not.
CASES: dict[str, tuple[Series, Series]] = {
    "TokenwireDown": ({"up": "1x20 0x40"}, {"up": "1x60"}),
    "TokenwireInternalErrors": (
        {'tokenwire_rpcs_total{code="INTERNAL"}': "_x25 1x40"},
        {
            'tokenwire_rpcs_total{code="INTERNAL"}': "1x60",
            'tokenwire_rpcs_total{code="OK"}': "0+9x60",
        },
    ),
    "TokenwireErrors": (
        rpcs(failing="0+1x60", reason="UPSTREAM_TIMEOUT"),
        rpcs(failing="0+1x60", reason="INVALID_REQUEST"),
    ),
    "TokenwireStreamsInterrupted": (
        rpcs(failing="0+1x60", reason="UPSTREAM_STREAM_INTERRUPTED"),
        rpcs(failing="0+0x60", reason="UPSTREAM_STREAM_INTERRUPTED"),
    ),
    "TokenwireDeadlines": (
        rpcs(failing="0+2x60", reason="DEADLINE_EXCEEDED"),
        rpcs(failing="0+2x60", reason="CANCELLED"),
    ),
    "TokenwireDropping": (
        {'tokenwire_drops_total{cause="gateway",upstream=""}': "0+1x60"},
        {'tokenwire_drops_total{cause="gateway",upstream=""}': "5x60"},
    ),
    "TokenwireLoopLate": (
        {"tokenwire_loop_lag_seconds": "0.2x60"},
        {"tokenwire_loop_lag_seconds": "0.01x60"},
    ),
    "TokenwireNearlyFull": (
        {"tokenwire_in_flight_calls": "95x60", "tokenwire_slots": "100x60"},
        {"tokenwire_in_flight_calls": "89x60", "tokenwire_slots": "100x60"},
    ),
    "TokenwireRetryBudgetSpent": (
        {"tokenwire_retry_budget": "0x60", 'tokenwire_retries_total{upstream="u"}': "0+1x60"},
        {"tokenwire_retry_budget": "0x60", 'tokenwire_retries_total{upstream="u"}': "0x60"},
    ),
    "TokenwireConfigNotTaken": (
        {"tokenwire_config_refused": "0x5 1x60", "tokenwire_config_generation": "2x60"},
        # Refused once, and right since.
        {
            "tokenwire_config_refused": "0x20 1x5 0x60",
            "tokenwire_config_reload_failures_total": "0x20 1x60",
            "tokenwire_config_generation": "2x60",
        },
    ),
    "TokenwireKeyFileUnusable": (
        {"tokenwire_key_files_unusable": "1x60"},
        {"tokenwire_key_files_unusable": "0x60"},
    ),
    "TokenwireCertificatesRefused": (
        {"tokenwire_certificates_refused": "1x60"},
        {"tokenwire_certificates_refused": "0x60"},
    ),
    "TokenwireSpansLost": (
        {'tokenwire_otlp_spans_total{outcome="dropped"}': "0+1x60"},
        {
            'tokenwire_otlp_spans_total{outcome="dropped"}': "7x60",
            'tokenwire_otlp_spans_total{outcome="sent"}': "0+1x60",
        },
    ),
    "TokenwireRedisAway": ({"tokenwire_redis_away": "1x60"}, {"tokenwire_redis_away": "0x60"}),
    "TokenwireDrainStuck": ({"tokenwire_draining": "1x60"}, {"tokenwire_draining": "0x20 1x40"}),
    "TokenwireFewFilesLeft": (
        {"process_open_fds": "900x60", "process_max_fds": "1000x60"},
        {"process_open_fds": "700x60", "process_max_fds": "1000x60"},
    ),
    "TokenwireNoKeys": (
        {
            'tokenwire_keys{upstream="u",state="ready"}': "0x60",
            'tokenwire_keys{upstream="u",state="retired"}': "2x60",
        },
        {
            'tokenwire_keys{upstream="u",state="ready"}': "0x60",
            'tokenwire_keys{upstream="u",state="partly"}': "1x60",
        },
    ),
    "TokenwireKeyRetired": (
        {'tokenwire_key_state{upstream="u",key="k",state="retired"}': "1x60"},
        {'tokenwire_key_state{upstream="u",key="k",state="retired"}': "0x60"},
    ),
    "TokenwireUpstreamClosed": (
        {'tokenwire_closures{upstream="u",scope="upstream",fault="server_error"}': "1x60"},
        {'tokenwire_closures{upstream="u",scope="key",fault="key_rejected"}': "1x60"},
    ),
    "TokenwireRateLimited": (
        attempts(failing="0+5x60", outcome="rate_limited"),
        attempts(failing="0+1x60", outcome="rate_limited"),
    ),
    "TokenwireUpstreamFailing": (
        attempts(failing="0+2x60", outcome="server_error"),
        attempts(failing="0+2x60", outcome="refused"),
    ),
    "TokenwireSlowFirstToken": slow("upstream_first_token_seconds", "10", "80"),
    "TokenwireSlowTokens": slow("inter_token_gap_seconds", "0.5", "2.5"),
    "TokenwireWaitingForKeys": slow("key_wait_seconds", "2.5", "30"),
    "TokenwireUnknownCallers": (
        {'tokenwire_rpcs_total{reason="CALLER_UNAUTHENTICATED"}': "0+90x60"},
        {'tokenwire_rpcs_total{reason="CALLER_UNAUTHENTICATED"}': "0+9x60"},
    ),
    "TokenwireCallerOverQuota": (
        rpcs(failing="0+5x60", reason="CALLER_QUOTA_EXCEEDED", labels='caller="c"'),
        rpcs(failing="0+1x60", reason="CALLER_QUOTA_EXCEEDED", labels='caller="c"'),
    ),
}


def named(series: str) -> str:
    """With the labels that Prometheus adds."""
    name, _, labels = series.rstrip("}").partition("{")
    mine = 'job="tokenwire",instance="a"'
    return f"{name}{{{','.join((*filter(None, labels.split(',')), mine))}}}"


def case(alert: str, series: Series, fires: bool) -> dict[str, Any]:
    name = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    return {
        "name": f"{alert} {'fires' if fires else 'is silent'}",
        "interval": "1m",
        "input_series": [{"series": named(s), "values": v} for s, v in series.items()],
        "promql_expr_test": [
            {
                "expr": name,
                "eval_time": "30m",
                "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
            }
        ],
    }


def test_nobody_to_ask_is_as_bad_as_no_answer(promtool: str, tmp_path: Path) -> None:
    tests = case("TokenwireDown", {"up": "1x10 stale"}, True)
    check(promtool, tmp_path, tests)


def test_every_alert_has_a_case() -> None:
    assert sorted(CASES) == sorted(NAMES)


@pytest.mark.parametrize("alert", CASES)
def test_it_fires_when_it_should_and_not_else(promtool: str, tmp_path: Path, alert: str) -> None:
    firing, silent = CASES[alert]
    check(promtool, tmp_path, case(alert, firing, True), case(alert, silent, False))


def check(promtool: str, folder: Path, *cases: dict[str, Any]) -> None:
    tests = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(cases)}
    (folder / "alerts.yaml").write_text(yaml.safe_dump(tests))
    checked = subprocess.run(
        [promtool, "test", "rules", str(folder / "alerts.yaml")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
