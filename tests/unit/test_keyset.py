"""What texts and entries come to: which keys, and which ids, whatever comes and goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwire_service.keyset import (
    NOT_A_KEY,
    Naming,
    UnusableError,
    looks_cut,
    resolved,
    secrets_in,
)
from tokenwire_service.secret import Secret
from tokenwire_service.settings import Key, KeyEntry, KeySource


def entry(texts: str, *, path: str | None = "keys", **source: object) -> KeyEntry:
    """An entry that holds the keys a, b, ... of `texts`, one letter each."""
    where = None if path is None else Path(path)
    return KeyEntry(
        source=KeySource(file="keys", **source), path=where, secrets=tuple(map(Secret, texts))
    )


def ids(keys: tuple[Key, ...]) -> dict[str, str]:
    """Text of each key -> its id."""
    return {key.secret.reveal(): key.id for key in keys}


# --- files ------------------------------------------------------------------------------

USABLE: dict[str, tuple[bytes, list[str]]] = {
    "one": (b"sk-1", ["sk-1"]),
    "a line each": (b"sk-1\nsk-2\n", ["sk-1", "sk-2"]),
    "of Windows": (b"sk-1\r\nsk-2\r\n", ["sk-1", "sk-2"]),
    "of old Macs": (b"sk-1\rsk-2", ["sk-1", "sk-2"]),
    "with a byte order mark": (b"\xef\xbb\xbfsk-1\n", ["sk-1"]),
    "with commas": (b"sk-1, sk-2,,\n,sk-3", ["sk-1", "sk-2", "sk-3"]),
    "with space around": (b"\n\n  sk-1\t\n \n\tsk-2  \n\n", ["sk-1", "sk-2"]),
    "with comments": (b"# team a\nsk-1 # the old one\n#sk-0\nsk-2#x", ["sk-1", "sk-2#x"]),
    "twice": (b"sk-1\nsk-2\nsk-1", ["sk-1", "sk-2", "sk-1"]),
    "long": (b"k" * 4096, ["k" * 4096]),
}


@pytest.mark.parametrize("name", USABLE)
def test_a_file_gives_its_keys(name: str) -> None:
    data, texts = USABLE[name]
    assert [secret.reveal() for secret in secrets_in(data)] == texts


UNUSABLE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "a byte order mark alone": (b"\xef\xbb\xbf", "empty"),
    "space": (b" \n\t\r\n,", "empty"),
    "comments": (b"# sk-Planted\n  # sk-Planted", "empty"),
    "a key with a space": (b"sk-Planted 1", NOT_A_KEY),
    "a key with a tab": (b"sk-1\tsk-Planted", NOT_A_KEY),
    "a key that is too long": (b"k" * 4097, NOT_A_KEY),
    "a key beyond ASCII": ("sk-Planted-é".encode(), NOT_A_KEY),
    "a control character": (b"sk-Planted\x00", NOT_A_KEY),
    "one bad key among good ones": (b"sk-1\nsk-2 Planted\nsk-3", NOT_A_KEY),
    "UTF-16": ("sk-Planted".encode("utf-16"), "unreadable (not UTF-8)"),
    "bytes": (b"\x80\x81sk-Planted", "unreadable (not UTF-8)"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_without_keys_says_why_and_quotes_nothing(name: str) -> None:
    data, problem = UNUSABLE[name]
    with pytest.raises(UnusableError) as caught:
        secrets_in(data)
    assert str(caught.value) == problem
    assert "Planted" not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_give_keys_that_can_be_sent_or_a_problem(data: bytes) -> None:
    try:
        found = secrets_in(data)
    except UnusableError:
        return
    assert found
    assert all(re.fullmatch(r"[!-~]{1,4096}", secret.reveal()) for secret in found)


CUTS = [  # before, after, whether it looks cut
    (["sk-1", "sk-2"], ["sk-1", "sk-"], True),
    (["sk-1", "sk-2"], ["s"], True),
    (["sk-1", "sk-2", "sk-3"], ["sk-1", "sk"], True),
    (["sk-1", "sk-2"], ["sk-1"], False),  # the second was taken out
    (["sk-1", "sk-2"], ["sk-1", "sk-2"], False),
    (["sk-1", "sk-2"], ["sk-1", "sk-2", "sk"], False),  # a third
    (["sk-1", "sk-2"], ["sk-2", "sk"], False),  # another file
    (["sk-1"], ["sk-10"], False),
    ([], ["sk-1"], False),
]


@pytest.mark.parametrize(("before", "after", "cut"), CUTS)
def test_half_a_file_is_recognised(before: list[str], after: list[str], cut: bool) -> None:
    assert looks_cut(tuple(map(Secret, before)), tuple(map(Secret, after))) is cut


@given(st.lists(st.text("abc", min_size=3, max_size=6), min_size=1, max_size=4), st.data())
def test_wherever_a_file_is_cut_no_part_of_a_key_is_taken(
    texts: list[str], data: st.DataObject
) -> None:
    whole = "\n".join(texts).encode()
    at = data.draw(st.integers(0, len(whole)))
    before = secrets_in(whole)
    try:
        after = secrets_in(whole[:at])
    except UnusableError:
        return
    assert looks_cut(before, after) or set(after) <= set(before)


# --- ids --------------------------------------------------------------------------------

CHANGES = [  # keys before, keys after, ids after
    ("a", "b", {"b": "t"}),  # renewed
    ("a", "ab", {"a": "t", "b": "t-2"}),
    ("a", "ba", {"b": "t-1", "a": "t"}),
    ("ab", "ba", {"a": "t-1", "b": "t-2"}),
    ("ab", "b", {"b": "t-2"}),
    ("ab", "a", {"a": "t-1"}),
    ("ab", "cb", {"c": "t-1", "b": "t-2"}),  # the first renewed
    ("ab", "bc", {"b": "t-2", "c": "t-1"}),  # its place has a name already
    ("ab", "cab", {"c": "t-3", "a": "t-1", "b": "t-2"}),
    ("ab", "c", {"c": "t"}),
    ("abc", "ddac", {"d": "t-2", "a": "t-1", "c": "t-3"}),
]


@pytest.mark.parametrize(("before", "after", "expected"), CHANGES)
def test_who_stays_keeps_the_id_and_who_comes_gets_one_of_those_left(
    before: str, after: str, expected: dict[str, str]
) -> None:
    first = resolved([entry(before, id="t")])
    assert ids(resolved([entry(after, id="t")], first)) == expected


def test_an_id_of_another_entry_is_never_taken() -> None:
    others = entry("x", id="t-2", path=None)
    first = resolved([entry("a", id="t"), others])
    assert ids(resolved([entry("ab", id="t"), others], first)) == {
        "a": "t",
        "b": "t-1",
        "x": "t-2",
    }


def test_without_an_id_of_its_own_a_key_is_called_the_same_anywhere() -> None:
    once = ids(resolved([entry("ab")]))
    later = ids(resolved([entry("cb")], resolved([entry("ab")])))
    again = ids(resolved([entry("ca")], resolved([entry("cb")])))
    assert once["b"] == later["b"]
    assert once["a"] == again["a"]
    assert re.fullmatch(r"key-[0-9a-f]{8}", once["a"])


def test_a_key_that_another_entry_holds_too_stays_when_one_of_them_loses_it() -> None:
    first = resolved([entry("ab", id="t"), entry("b", id="u", path=None, weight=2.0)])
    assert ids(first) == {"a": "t-1", "b": "t-2"}
    then = resolved([entry("a", id="t"), entry("b", id="u", path=None, weight=2.0)], first)
    assert ids(then) == {"a": "t-1", "b": "t-2"}
    assert [key.weight for key in then] == [1.0, 2.0]


def test_the_same_key_with_two_organizations_is_two_keys() -> None:
    keys = resolved([entry("a", organization="o"), entry("a", organization="p")])
    assert [key.organization for key in keys] == ["o", "p"]
    assert len({key.id for key in keys}) == 2


def test_naming_tells_what_is_repeated_and_what_clashes() -> None:
    naming = Naming()
    assert naming.name(entry("aab", id="t")).repeated == ["t-1"]
    named = naming.name(entry("bc", id="u"))
    assert (named.repeated, [key.id for key in named.keys]) == (["t-2"], ["u-1"])
    assert naming.name(entry("d", id="t-1")).clashes == ["t-1"]


entries = st.lists(
    st.builds(
        lambda texts, name, org: (texts, name, org),
        st.text("abcdef", min_size=1, max_size=5),
        st.sampled_from([None, "t", "t-1", "u"]),
        st.sampled_from([None, "o"]),
    ),
    min_size=1,
    max_size=3,
)


@given(entries, st.lists(st.lists(st.text("abcdef", min_size=1, max_size=5)), max_size=6))
def test_through_any_changes_ids_are_unique_and_stay(
    shape: list[tuple[str, str | None, str | None]], steps: list[list[str]]
) -> None:
    """Every key of every entry is there once; none changes its id while it stays."""
    now = [entry(texts, id=name, organization=org) for texts, name, org in shape]
    before = resolved(now)
    for step in [[], *steps]:
        for number, texts in enumerate(step[: len(now)]):
            _, name, org = shape[number]
            now[number] = entry(texts, id=name, organization=org)
        after = resolved(now, before)
        pairs = {(key.secret, key.organization): key.id for key in after}
        assert len(pairs) == len(after) == len({key.id for key in after})
        assert set(pairs) == {(s, e.source.organization) for e in now for s in e.secrets}
        for key in before:
            assert pairs.get((key.secret, key.organization), key.id) == key.id
        assert resolved(now, after) == after
        before = after
