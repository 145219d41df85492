"""A text that never shows itself, nor in the texts of others."""

import hashlib
import hmac
import json
from collections.abc import Iterable
from typing import NoReturn, final


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
    """Replaces secrets in texts, also where these quote them as JSON or Python does.

    Secrets of fewer than `shortest` characters are left alone.
    """

    _REMEMBERED = 1000  # secrets that `replace` has dropped: what is under way may quote them yet

    def __init__(self, secrets: Iterable[Secret] = (), shortest: int = 1) -> None:
        self._shortest = shortest
        self._secrets: dict[Secret, None] = {}  # in order: the one dropped last stands last
        self._forms: list[str] = []
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
                forms |= {text, json.dumps(text)[1:-1], repr(text)[1:-1]}
        # The longest first: a key may begin with another.
        self._forms = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """`text` with `***` in place of every secret."""
        for form in self._forms:
            text = text.replace(form, "***")
        return text
