"""Of what providers sent, the short way to a text says what the long way says, however it comes."""

from __future__ import annotations

import re

import pytest
from unit.test_openai_plain import read

from corpus import runner
from tokenwire_service.upstream import sse
from tokenwire_service.upstream.openai_plain import piece


def events(item: runner.Item) -> list[sse.Event]:
    return sse.Decoder(1 << 23).feed(item.data["body"].encode())


@pytest.mark.parametrize("item", runner.items("streams"), ids=lambda item: item.id)
def test_both_ways_say_the_same_of_what_providers_sent(item: runner.Item) -> None:
    found = events(item)
    slow = read(found, None)
    for batches in ([], [1] * len(found), [7] * (len(found) // 7)):
        assert read(found, batches) == slow


def test_most_texts_that_providers_sent_are_plain() -> None:
    chunks = [event.data for item in runner.items("streams") for event in events(item)]
    texts = [c for c in chunks if re.search(rb'"content": ?"[^"]', c)]
    assert len(texts) > 3000
    assert sum(piece(c) is not None for c in texts) > len(texts) / 2
