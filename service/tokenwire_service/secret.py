"""A text that never shows itself, nor in the texts of others."""

import base64
import hashlib
import hmac
import json
import re
import urllib.parse
from collections.abc import Iterable
from typing import NoReturn, final

_BEGINNING = 12  # characters by which a secret that was cut off is still recognised


@final
class Secret:
    """Key material that only `reveal()` turns back into text.

    Its repr, str and format are the constant `Secret(***)`, whatever the format
    specification. Equality compares in constant time; equal secrets hash alike, so that
    they work as dict keys. Pickling and copying through pickle raise TypeError, and
    serialisers such as msgspec refuse it as an unknown type.
    """

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        self.__value = value

    def reveal(self) -> str:
        """Return the text. Only for the header of one request to its upstream."""
        return self.__value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __format__(self, format_spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        # Bytes, because compare_digest refuses text outside ASCII.
        return hmac.compare_digest(
            self.__value.encode("utf-8", "surrogatepass"),
            other.__value.encode("utf-8", "surrogatepass"),
        )

    def __hash__(self) -> int:
        return hash((Secret, self.__value))

    def __bool__(self) -> bool:
        return bool(self.__value)

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, memo: object) -> "Secret":
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret cannot be pickled")


@final
class Digest:
    """What is kept of a secret that need only be recognised. Compares in constant time."""

    __slots__ = ("__value",)

    def __init__(self, sha256: bytes) -> None:
        self.__value = sha256

    @classmethod
    def of(cls, text: str) -> "Digest":
        """The digest of a secret with as much chance in it as a token has: it needs no salt."""
        return cls(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())

    def __repr__(self) -> str:
        return "Digest(***)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Digest):
            return NotImplemented
        return hmac.compare_digest(self.__value, other.__value)

    def __hash__(self) -> int:
        return hash((Digest, self.__value))


class Scrubber:
    """Replaces secrets in texts: as they are, as JSON, Python and URLs quote them, within base64,
    and cut off behind their first twelve characters.

    Secrets of fewer than `shortest` characters are left alone. `accounts` are no secrets, but not
    for everyone's eyes either: they are replaced where they stand as they are.
    """

    def __init__(
        self, secrets: Iterable[Secret], shortest: int = 1, *, accounts: Iterable[str] = ()
    ) -> None:
        forms: set[str] = set(accounts)
        self._cut: list[tuple[str, str]] = []  # (beginning, the whole)
        for secret in {each for each in secrets if len(each.reveal()) >= shortest}:
            plain = secret.reveal()
            quoted = _quoted(plain)
            forms |= quoted | _within_base64(plain)
            self._cut += [(form[:_BEGINNING], form) for form in quoted if len(form) > _BEGINNING]
        # The longest first: a key may begin with another.
        self._forms = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """`text` with `***` in place of every secret."""
        for form in self._forms:
            text = text.replace(form, "***")
        for beginning, form in self._cut:
            if beginning in text:
                text = _without(text, beginning, form)
        return text


def _quoted(plain: str) -> set[str]:
    """A text as it is, and as JSON, Python and URLs quote it."""
    url = urllib.parse.quote(plain, safe="")
    lower = re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), url)
    return {plain, json.dumps(plain)[1:-1], repr(plain)[1:-1], url, lower}


def _within_base64(plain: str) -> set[str]:
    """What base64 makes of a text wherever it stands in a longer one, such as `user:password`.
    The characters at both ends are left out: they hold bits of its neighbours, too."""
    data = plain.encode("utf-8", "surrogatepass")
    forms: set[str] = set()
    for before in range(3):
        first = -(-before * 4 // 3)
        end = (before + len(data)) * 4 // 3
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            form = encode(b"\0" * before + data).decode()[first:end]
            if len(form) >= _BEGINNING:  # a shorter one may be anything
                forms.add(form)
    return forms


def _without(text: str, beginning: str, form: str) -> str:
    """`text` without what begins as `form` does, for as long as it goes on like that."""
    kept: list[str] = []
    while (at := text.find(beginning)) >= 0:
        end = at + len(beginning)
        while end < len(text) and end - at < len(form) and text[end] == form[end - at]:
            end += 1
        kept += (text[:at], "***")
        text = text[end:]
    return "".join(kept) + text
