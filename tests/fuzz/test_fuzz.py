"""Whatever bytes an upstream sends, the promises of `targets` hold."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import campaign, seeds, targets

_SECONDS = 6  # each; `make fuzz` takes longer


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_seeds_hold(target: str) -> None:
    count = 0
    for seed in seeds.seeds(target):
        targets.TARGETS[target](seed)
        count += 1
    assert count >= 2


# What JSON of a chunk is made of, right and wrong.
_leaf = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4), st.just("stop")
)
_NAMES = (
    *("choices", "delta", "message", "index", "finish_reason", "finish_details", "content", "role"),
    *(
        "reasoning",
        "reasoning_content",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "id",
        "type",
    ),
    *("usage", "prompt_tokens", "completion_tokens", "total_tokens", "error", "code", "object"),
    *("logprobs", "refusal", "text", "audio", "annotations", "custom", "input", "created", "model"),
)
_json = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(_NAMES), inner, max_size=5)
    ),
    max_leaves=12,
)
_choice = st.fixed_dictionaries(
    {}, optional={"index": _leaf, "delta": _json, "finish_reason": _leaf, "finish_details": _json}
)
_chunk = st.fixed_dictionaries(
    {"choices": st.lists(_choice, max_size=3)}, optional={"usage": _json, "id": _leaf}
)


@given(st.integers(0, 255), st.lists(st.one_of(_chunk, _json), max_size=5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_chunks_of_any_shape_are_read_or_refused(
    seed: int, chunks: list[object], done: bool
) -> None:
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    body += b"data: [DONE]\n\n" if done else b""
    targets.openai_stream(bytes([seed]) + body)
    for chunk in chunks:
        targets.openai_answer(json.dumps(chunk).encode())
        targets.openai_error(bytes([seed]) + b"\n" + json.dumps(chunk).encode())


@pytest.mark.parametrize("target", targets.TARGETS)
def test_guided_by_coverage_nothing_is_found(target: str) -> None:
    if importlib.util.find_spec("atheris") is None and "CI" not in os.environ:
        pytest.skip("no atheris on this platform")
    done = campaign.run(target, _SECONDS, seed=1)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "number_of_executed_units" in done.stdout


def test_a_target_that_breaks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The net itself: a decoder that loses an event, an OK without proof."""
    monkeypatch.setattr(targets, "reference", lambda data: ([], None))
    with pytest.raises(AssertionError):
        targets.event_stream(b"\0data: a\n\n")
    monkeypatch.setattr(targets, "_proven", lambda events, choices: False)
    whole = next(seeds.seeds("openai_stream"))
    with pytest.raises(AssertionError, match="without proof"):
        targets.openai_stream(whole)
