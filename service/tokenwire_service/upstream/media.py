"""Bytes that travel within a request: as base64, whether the caller gave bytes or a `data:` URL."""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from tokenwire.v1 import chat_pb2
from tokenwire_service.errors import Violation, invalid


class Inline(NamedTuple):
    """Bytes and what they are. `data` is base64; `media_type` has no parameters."""

    media_type: str
    data: str

    @property
    def octets(self) -> bytes:
        """The bytes themselves."""
        return base64.b64decode(self.data)

    @property
    def url(self) -> str:
        """A `data:` URL."""
        return f"data:{self.media_type};base64,{self.data}"


def inline(media: chat_pb2.Media, path: str) -> Inline | None:
    """The bytes of `media`; None for a reference to bytes elsewhere. A URL's own media type is
    that of its bytes; `path` is that of `media`, for errors."""
    if media.WhichOneof("source") == "data":
        return Inline(_bare(media.media_type), base64.b64encode(media.data).decode("ascii"))
    if not media.url.startswith("data:"):
        return None
    head, comma, data = media.url.removeprefix("data:").partition(",")
    if not comma:
        raise invalid(Violation(f"{path}.url", "expected data:<media type>;base64,<data>"))
    media_type, *parameters = head.split(";")
    media_type = _bare(media_type) or _bare(media.media_type) or "text/plain"  # as RFC 2397 says
    octets = unquote_to_bytes(data)
    if "base64" in parameters:
        try:
            octets = base64.b64decode(octets, validate=True)
        except binascii.Error:
            raise invalid(Violation(f"{path}.url", "its data is not base64")) from None
    return Inline(media_type, base64.b64encode(octets).decode("ascii"))


def has_unread_type(media: chat_pb2.Media) -> bool:
    """Whether a media type stands beside a reference, or beside bytes that say another."""
    return bool(media.media_type) and media.WhichOneof("source") != "data"


def _bare(media_type: str) -> str:
    return media_type.partition(";")[0].strip().lower()
