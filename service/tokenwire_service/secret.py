"""A text that never shows itself, nor in the texts of others."""

import base64
import hashlib
import hmac
import json
import re
import urllib.parse
from collections.abc import Iterable
from typing import NoReturn, final

_ENOUGH = 12  # characters of a secret that are not seen anywhere else, and help nobody guess it
_PROBE = 8  # characters; of twelve in a row, eight begin at every fifth place of a text
_STRIDE = _ENOUGH - _PROBE + 1


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
    """Replaces secrets in texts: as they are, as JSON, Python and URLs quote them, and within
    base64. Twelve characters of one are enough, so that it may also be cut off or broken up.

    Secrets of fewer than `shortest` characters are left alone.
    """

    _REMEMBERED = 1000  # secrets that `replace` has dropped: what is under way may quote them yet

    def __init__(self, secrets: Iterable[Secret] = (), shortest: int = 1) -> None:
        self._shortest = shortest
        self._secrets: dict[Secret, None] = {}  # in order: the one dropped last stands last
        self.replace(secrets)

    def replace(self, secrets: Iterable[Secret]) -> None:
        """Takes the secrets in use now. Those from before are not forgotten, but for all except
        the last thousand that are in use no more."""
        current = dict.fromkeys(secrets)
        dropped = [secret for secret in self._secrets if secret not in current]
        self._secrets = dict.fromkeys(dropped[-self._REMEMBERED :]) | current
        forms: set[str] = set()
        for secret in self._secrets:
            text = secret.reveal()
            if len(text) >= self._shortest:
                forms |= _disguises(text)
        # The longest first: a key may begin with another.
        short = (form for form in forms if len(form) < _ENOUGH)
        self._short = sorted(short, key=len, reverse=True)
        long = [form for form in forms if len(form) >= _ENOUGH]
        self._parts = {form[i : i + _ENOUGH] for form in long for i in _windows(form)}
        self._probes = {f[i : i + _PROBE] for f in long for i in range(len(f) - _PROBE + 1)}

    def __call__(self, text: str) -> str:
        """`text` with `***` in place of every secret."""
        for form in self._short:
            text = text.replace(form, "***")
        if not self._may_hold(text):
            return text  # as nearly every text of a log
        kept: list[str] = []
        end = 0  # of what is kept or replaced already
        for at in _windows(text):
            if text[at : at + _ENOUGH] in self._parts:
                if at >= end:
                    kept += (text[end:at], "***")
                end = at + _ENOUGH
        return "".join(kept) + text[end:] if kept else text

    def finds(self, text: str) -> bool:
        """Whether a secret may be in `text`; quick, and right wherever it says no."""
        return self._may_hold(text) or any(form in text for form in self._short)

    def _may_hold(self, text: str) -> bool:
        places = range(0, len(text) - _PROBE + 1, _STRIDE)
        return not self._probes.isdisjoint([text[at : at + _PROBE] for at in places])


def _windows(text: str) -> range:
    """Where as many characters begin as are enough."""
    return range(len(text) - _ENOUGH + 1)


def _disguises(plain: str) -> set[str]:
    """How a text may be quoted. Of what base64 makes of it within a longer one, such as
    `user:password`, the characters at both ends are left out: they hold bits of its neighbours."""
    url = urllib.parse.quote(plain, safe="")
    lower = re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), url)
    forms = {plain, json.dumps(plain)[1:-1], repr(plain)[1:-1], url, lower}
    data = plain.encode("utf-8", "surrogatepass")
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + data).decode()
        form = encoded[-(-before * 4 // 3) : (before + len(data)) * 4 // 3]
        if len(form) >= _ENOUGH:  # a shorter one may be anything
            forms |= {form, form.replace("+", "-").replace("/", "_")}
    return forms
