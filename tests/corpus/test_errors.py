"""Errors that providers really sent: what their callers hear, and what becomes of the key."""

from __future__ import annotations

import pytest

from corpus import runner, verdicts
from harness import Start


def test_every_class_and_key_action_of_the_corpus_has_its_row() -> None:
    expected = {item.id: item.data["expected"] for item in runner.items("errors")}
    assert set(verdicts.TOLD) == {e["class"] for e in expected.values()}
    assert set(verdicts.KEYS) == {e["key_action"] for e in expected.values()}
    for name, apart in verdicts.TOLD_APART.items():
        assert apart != verdicts.TOLD[expected[name]["class"]]
    for name, stands in verdicts.KEYS_APART.items():
        assert stands != verdicts.KEYS[expected[name]["key_action"]]


def test_every_verdict_is_one_that_the_corpus_suggests_or_is_argued() -> None:
    argued = {verdicts.argued(item) for item in runner.items("errors")}
    assert argued == {None, *verdicts.ARGUED}


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
