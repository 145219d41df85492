"""docs/compatibility.md says what the tests of this folder prove."""

from __future__ import annotations

from corpus import compatibility, runner


def test_the_page_lists_every_recording_with_every_way_it_is_delivered() -> None:
    passed = {
        item: list(modes) for kind, modes in runner.MODES_OF.items() for item in runner.items(kind)
    }
    page = "\n".join((*compatibility.document(passed), ""))
    assert compatibility.DOCUMENT.read_text() == page, "make compatibility writes it anew"
