"""docs/operations.md says of every reason and every alert what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tokenwire.v1 import error_reason_pb2

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs/operations.md").read_text(encoding="utf-8").partition("\n## Runbook\n")[2]
REASONS = [
    name.removeprefix("ERROR_REASON_")
    for name, value in error_reason_pb2.ErrorReason.items()
    if value != error_reason_pb2.ERROR_REASON_UNSPECIFIED
]
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/monitoring/rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]


def entries(title: str) -> list[str]:
    """First cells of the table under a title, each of whose rows is full."""
    part = RUNBOOK.partition(f"### {title}\n")[2].partition("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    assert all(len(row) == 3 and all(map(str.strip, row)) for row in rows)
    return [row[0] for row in rows[1:]]


def test_every_reason_has_its_entry() -> None:
    assert sorted(entries("Reasons")) == sorted(REASONS)


def test_every_alert_has_its_entry() -> None:
    assert sorted(entries("Alerts")) == sorted(rule["alert"] for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_is_wrong_and_where_to_read_on(
    rule: dict[str, dict[str, str]],
) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["runbook_url"].endswith("/docs/operations.md#runbook")
