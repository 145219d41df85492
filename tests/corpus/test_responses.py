"""Answers that providers really sent in one piece reach the caller as they were."""

from __future__ import annotations

import pytest

from corpus import runner
from harness import Start


@pytest.mark.parametrize("mode", runner.MODES_OF["responses"])
async def test_every_recorded_answer_reaches_the_caller(
    start: Start, replay: str, mode: str
) -> None:
    runs = runner.runs("responses", mode)
    gateway = await start(config=runner.config(replay, runs))
    answers = await runner.call_all(gateway.chat, runs, unary=True)
    wrong = [line for run in runs for line in runner.differences(run, answers[run])]
    assert not wrong, "\n".join(wrong)
