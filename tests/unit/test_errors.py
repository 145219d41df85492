"""The tables from a fault to what a caller hears are whole, and say what the documents say."""

import ast
import re
from pathlib import Path

import grpc
import pytest

from tokenwire.v1 import error_reason_pb2
from tokenwire_service import errors, wording
from tokenwire_service.errors import (
    CODES,
    VERDICTS,
    Fault,
    GatewayError,
    KeyAction,
    RequestAction,
    UpstreamFault,
    Violation,
    invalid,
)

ROOT = Path(__file__).parents[2]
REASONS = {
    name.removeprefix("ERROR_REASON_"): number
    for name, number in error_reason_pb2.ErrorReason.items()
    if number != error_reason_pb2.ERROR_REASON_UNSPECIFIED
}
CODE_NUMBERS = {code.name: code.value[0] for code in grpc.StatusCode}


def documented_reasons() -> dict[str, str]:
    """Reason -> the comment above it in the contract."""
    text = (ROOT / "protos/tokenwire/v1/error_reason.proto").read_text(encoding="utf-8")
    found = re.findall(r"((?:^ *//.*\n)+)^ *ERROR_REASON_(\w+) = \d+;", text, re.MULTILINE)
    return {name: re.sub(r"\s*//", " ", comment) for comment, name in found}


# --- completeness -----------------------------------------------------------------------


def test_every_fault_has_one_verdict() -> None:
    assert set(VERDICTS) == set(Fault)


def test_every_reason_has_one_code() -> None:
    assert set(CODES) == set(REASONS.values())


def test_every_verdict_names_a_reason_that_has_a_code() -> None:
    assert {verdict.reason for verdict in VERDICTS.values()} <= set(CODES)


def test_every_fault_has_a_saying_of_its_own() -> None:
    assert set(wording.SAYINGS) == set(Fault)
    assert len(set(wording.SAYINGS.values())) == len(Fault)


@pytest.mark.parametrize("module", [errors, wording], ids=lambda module: module.__name__)
def test_no_table_names_a_key_twice(module) -> None:
    for table in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(table, ast.Dict):
            keys = [ast.unparse(key) for key in table.keys if key is not None]
            assert len(keys) == len(set(keys))


# --- what the documents say -------------------------------------------------------------


def test_the_contract_documents_every_reason() -> None:
    assert set(documented_reasons()) - {"UNSPECIFIED"} == set(REASONS)


@pytest.mark.parametrize("name", REASONS)
def test_a_reason_has_the_code_that_its_comment_names(name: str) -> None:
    words = set(re.findall(r"(?<!`)\b[A-Z_]{2,}\b(?!`)", documented_reasons()[name]))
    codes = words & set(CODE_NUMBERS)
    assert {CODE_NUMBERS[code] for code in codes} == {CODES[REASONS[name]]}


@pytest.mark.parametrize("name", REASONS)
def test_the_page_on_errors_lists_every_reason_with_its_code(name: str) -> None:
    rows = re.findall(
        r"^\| ([A-Z_, ]+) \| ([A-Z_]+) \|",
        (ROOT / "docs/errors.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    codes = [code for names, code in rows if name in names.split(", ")]
    assert [CODE_NUMBERS[code] for code in codes] == [CODES[REASONS[name]]]


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
def test_the_page_on_errors_has_a_verdict_for_every_fault(fault: Fault) -> None:
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z_, ]+)(?::.*?)? \|.*\|.*\|$", text, re.MULTILINE)
    assert sum(fault.name in names.split(", ") for names in rows) >= 1


# --- what the verdicts mean -------------------------------------------------------------

CALLERS_OWN = {
    Fault.CONTEXT_TOO_LONG,
    Fault.CONTENT_FILTERED,
    Fault.REFUSED,
    Fault.TOO_LARGE,
}
KEYS_OWN = {
    Fault.KEY_REJECTED: KeyAction.RETIRE_KEY,
    Fault.ACCOUNT_DEAD: KeyAction.RETIRE_GROUP,
    Fault.ACCESS_DENIED: KeyAction.RETIRE_FOR_MODEL,
    Fault.RATE_LIMITED: KeyAction.COOL_GROUP,
    Fault.DAILY_QUOTA: KeyAction.COOL_GROUP,
    Fault.QUOTA_EXHAUSTED: KeyAction.RETIRE_GROUP,
    Fault.OVERLOADED: KeyAction.COOL_UPSTREAM,
    Fault.MODEL_NOT_FOUND: KeyAction.NOTE_MODEL,
}


@pytest.mark.parametrize("fault", sorted(CALLERS_OWN, key=str), ids=lambda fault: fault.value)
def test_a_mistake_of_the_caller_fails_at_once_and_costs_no_key(fault: Fault) -> None:
    assert VERDICTS[fault].key is KeyAction.KEEP
    assert VERDICTS[fault].request is RequestAction.FAIL


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
def test_only_faults_of_keys_change_keys(fault: Fault) -> None:
    assert VERDICTS[fault].key is KEYS_OWN.get(fault, KeyAction.KEEP)


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
def test_another_key_is_tried_where_the_key_was_to_blame(fault: Fault) -> None:
    blamed = set(KEYS_OWN) - {Fault.OVERLOADED, Fault.MODEL_NOT_FOUND}
    assert (VERDICTS[fault].request is RequestAction.OTHER_KEY) == (fault in blamed)


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
def test_no_fault_of_an_upstream_doubts_the_callers_own_token(fault: Fault) -> None:
    code = CODES[VERDICTS[fault].reason]
    assert code not in (CODE_NUMBERS["UNAUTHENTICATED"], CODE_NUMBERS["PERMISSION_DENIED"])


# --- the errors themselves --------------------------------------------------------------


@pytest.mark.parametrize("name", REASONS)
def test_an_error_spells_its_reason_as_error_info_does(name: str) -> None:
    error = GatewayError(REASONS[name], "text")
    assert (error.reason_name, error.code) == (name, CODES[REASONS[name]])
    assert str(error) == f"{name}: text"


def test_an_invalid_request_tells_its_first_violation_and_keeps_all() -> None:
    violations = [Violation(f"messages[{i}].role", "missing") for i in range(3)]
    error = invalid(*violations)
    assert str(error) == "INVALID_REQUEST: messages[0].role: missing (and 2 more)"
    assert error.violations == tuple(violations)
    assert str(invalid(violations[0])) == "INVALID_REQUEST: messages[0].role: missing"


def test_a_fault_shows_what_it_is() -> None:
    assert str(UpstreamFault(Fault.TIMEOUT, "slow")) == "timeout: slow"
