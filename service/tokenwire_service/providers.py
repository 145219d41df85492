"""What is known of providers, as data: which dialects there are, and who speaks which.

A dialect is a row here and a module in `upstream`. docs/dialects.md says how to add one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

AUTO = "auto"  # in place of a dialect's name: guess


class DialectRow(NamedTuple):
    """One dialect, for configuration and for the guess.

    `implementation`: `module:Class` within `tokenwire_service.upstream`.
    `addresses`: who speaks it, each a host, `*.` before a domain for every host in it, and where
    one host speaks several dialects the beginning of the path.
    `models`: how the names begin of models that are spoken to so wherever they are served; only
    for dialects that any OpenAI-compatible server would understand.
    """

    implementation: str
    addresses: tuple[str, ...] = ()
    models: re.Pattern[str] | None = None


DIALECTS: Mapping[str, DialectRow] = {
    "openai": DialectRow("openai:OpenAI", ("api.openai.com",)),
    "anthropic": DialectRow("anthropic:Anthropic", ("api.anthropic.com",)),
    "gemini": DialectRow(
        "gemini:Gemini",
        ("generativelanguage.googleapis.com/v1beta", "generativelanguage.googleapis.com/v1alpha"),
    ),
    "dashscope": DialectRow(
        "dashscope:DashScope",
        (
            "dashscope.aliyuncs.com/api/v1",
            "dashscope-intl.aliyuncs.com/api/v1",
            "dashscope-us.aliyuncs.com/api/v1",
            "*.maas.aliyuncs.com/api/v1",
        ),
    ),
}


def matches(base_url: str, addresses: tuple[str, ...]) -> bool:
    """Whether a base URL is one of those addresses."""
    return any(_longest(base_url, addresses))


def guess(base_url: str, model_names: tuple[str, ...]) -> str:
    """The dialect of an upstream that names none: by its address, else by the model's name, else
    OpenAI's, which most servers speak."""
    found = [
        (length, name)
        for name, row in DIALECTS.items()
        for length in _longest(base_url, row.addresses)
    ]
    if found:
        return max(found)[1]
    for name, row in DIALECTS.items():
        if row.models is not None and any(map(row.models.match, model_names)):
            return name
    return "openai"


def _longest(base_url: str, addresses: tuple[str, ...]) -> Iterator[int]:
    """How much of an address fits, for each that does: what says more wins."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    for address in addresses:
        wanted, slash, path = address.partition("/")
        fits = host.endswith(wanted[1:]) if wanted.startswith("*.") else host == wanted
        if fits and f"{parts.path}/".startswith(f"{slash}{path}".rstrip("/") + "/" * bool(slash)):
            yield len(address)
