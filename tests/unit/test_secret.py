"""What a Scrubber finds: a secret in any dress that an upstream may put it into."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire_service.secret import Scrubber, Secret

KEY = "sk-proj-a/b+c=d'e\"f\\g-0123456789-ABCDEFGHIJ~xyz"
BESIDE = "sk-proj-a/b+c=another-9876543210-abcdefghij"  # begins as KEY does
WINDOW = 12  # characters that nobody may see in a row

secrets = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=80)
around = st.binary(max_size=7)


def seen(disguise: str, text: str) -> bool:
    """Whether a part of a disguise stands in a text."""
    parts = (disguise[i : i + WINDOW] for i in range(len(disguise) - WINDOW + 1))
    return any(part in text for part in parts)


DISGUISES = {
    "as it is": KEY,
    "JSON": json.dumps(KEY)[1:-1],
    "Python": repr(KEY)[1:-1],
    "URL": urllib.parse.quote(KEY, safe=""),
    "URL with plus": urllib.parse.quote_plus(KEY),
    "URL in lower case": re.sub(
        "%..", lambda found: found[0].lower(), urllib.parse.quote(KEY, safe="")
    ),
    "base64": base64.b64encode(KEY.encode()).decode().rstrip("="),
    "base64 for URLs": base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("="),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_a_secret_is_found_in_every_dress(name: str) -> None:
    scrub = Scrubber([Secret(BESIDE), Secret(KEY)])
    text = scrub(f"you sent [{DISGUISES[name]}] and [{DISGUISES[name]}]")
    assert text.startswith("you sent [***")
    assert not seen(DISGUISES[name], text)
    assert text.count("***") == 2


@given(secrets, around, around)
def test_a_secret_is_found_wherever_it_stands_within_base64(
    secret: str, before: bytes, after: bytes
) -> None:
    scrub = Scrubber([Secret(secret)])
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        whole = encode(before + secret.encode() + after).decode()
        first = -(-len(before) * 8 // 6)
        inner = whole[first : (len(before) + len(secret)) * 8 // 6]
        assert not seen(inner, scrub(f"Basic {whole}"))


@pytest.mark.parametrize("name", DISGUISES)
def test_a_part_of_a_secret_is_found(name: str) -> None:
    scrub = Scrubber([Secret(BESIDE), Secret(KEY)])
    disguise = DISGUISES[name]
    for start in range(len(disguise) - WINDOW):
        for length in (WINDOW, WINDOW + 1, 20, 100):
            part = disguise[start : start + length]
            if len(part) >= WINDOW:
                assert not seen(part, scrub(f"[{part}...]")), part


def test_what_only_begins_like_a_secret_keeps_the_rest() -> None:
    scrub = Scrubber([Secret(KEY), Secret(BESIDE)])
    assert scrub(f"{KEY[:11]} {KEY[:14]}-else {BESIDE}") == f"{KEY[:11]} ***-else ***"
    assert scrub(KEY + BESIDE) == "******"
    assert scrub(f"{KEY[:12]}\n{KEY[12:]}") == "***\n***"


@given(st.text(max_size=80), st.text(max_size=80))
def test_texts_around_a_secret_stay_as_they_are(before: str, after: str) -> None:
    scrub = Scrubber([Secret(KEY), Secret(BESIDE)])
    assert scrub(f"{before} {KEY} {after}") == f"{before} *** {after}"
