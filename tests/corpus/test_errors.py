"""Errors that providers really sent: what their callers hear, and what becomes of the key."""

from __future__ import annotations

import pytest

from corpus import runner, verdicts
from harness import Start


def test_every_class_and_key_action_of_the_corpus_has_its_row() -> None:
    expected = {item.id: item.data["expected"] for item in runner.items("errors")}
    assert set(verdicts.TOLD) == {e["class"] for e in expected.values()}
    assert set(verdicts.KEYS) == {e["key_action"] for e in expected.values()}
    assert set(verdicts.KEY_ACTIONS) == set(verdicts.KEYS)
    assert set(verdicts.REQUESTS) == {e["request_action"] for e in expected.values()}
    for name, request in verdicts.REQUESTS_APART.items():
        assert request is not verdicts.REQUESTS[expected[name]["request_action"]]
    for name, apart in verdicts.TOLD_APART.items():
        assert apart != verdicts.TOLD[expected[name]["class"]]
    for name, stands in verdicts.KEYS_APART.items():
        assert stands != verdicts.KEYS[expected[name]["key_action"]]


def test_every_verdict_is_one_that_the_corpus_suggests_or_is_argued() -> None:
    argued = {verdicts.argued(item) for item in runner.items("errors")}
    assert argued == {None, *verdicts.ARGUED}


def test_the_table_judges_every_recorded_error_as_the_corpus_does() -> None:
    wrong = [line for item in runner.items("errors") for line in verdicts.misjudged(item)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
async def test_every_recorded_error_goes_on_with_the_keys_that_may_help(
    start: Start, replay: str, unary: bool
) -> None:
    """What becomes of the request where there are several keys, of two accounts."""
    runs = runner.runs("errors", "whole")
    config = verdicts.with_accounts(runner.config(replay, runs), "acme", "acme", "other")
    gateway = await start(config=config)
    answers = await runner.call_all(gateway.chat, runs, unary=unary, timeout=20.0)
    for run in runs:
        failure = answers[run].failure
        assert failure is not None, run.name
        trail = failure.metadata["trail"].split(", ")
        keys = tuple(step.split()[0].rpartition("/")[2] for step in trail)
        wanted = verdicts.asked(run.item)
        # The third may be any that cooled first.
        assert (keys[:2], len(keys)) == (wanted[:2], len(wanted)), run.name
        assert failure.code.name == verdicts.told(run.item).code, run.name


@pytest.mark.parametrize("unary", [False, True], ids=["stream", "unary"])
@pytest.mark.parametrize("mode", runner.MODES_OF["errors"])
async def test_every_recorded_error_is_told_by_its_row(
    start: Start, replay: str, mode: str, unary: bool
) -> None:
    runs = runner.runs("errors", mode)
    gateway = await start(config=runner.config(replay, runs))
    answers = await runner.call_all(
        gateway.chat, runs, unary=unary, timeout=verdicts.TIMEOUT_SECONDS
    )
    pools = gateway.running.pools
    wrong = [
        line
        for run in runs
        for line in verdicts.differences(run, answers[run], pools[run.name].ring)
    ]
    assert not wrong, "\n".join(wrong)
