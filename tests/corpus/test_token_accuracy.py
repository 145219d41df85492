"""docs/tokenizers.md says what CountTokens does, and `exact` is never said in vain."""

from __future__ import annotations

from corpus import token_accuracy


async def test_the_page_is_what_the_gateway_counts_and_exact_counts_are() -> None:
    counted = await token_accuracy.measure()
    assert token_accuracy.wrongly_exact(counted) == []
    text = [each for each in counted if each.group == "text"]
    missed = {each.name for each in text if not each.hit}
    assert missed <= token_accuracy.EXPLAINED.keys()
    assert len(text) - len(missed) >= 19
    assert all(not each.exact for each in counted if each.group != "text")
    assert token_accuracy.DOCUMENT.read_text(encoding="utf-8") == token_accuracy.page(counted), (
        "make token-accuracy writes it anew"
    )
