"""What can be configured: fields, units, ranges and defaults.

Durations are seconds and sizes are bytes in here; the file writes them with a unit. Ranges
are inclusive and stand in the types, where `typed_yaml` finds them, and defaults beside them.
docs/configuration.md says the same for operators.
"""

import ipaddress
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from google.protobuf.descriptor import FieldDescriptor
from msgspec import Meta, Struct, field

from tokenwire.v1.chat_pb2 import GenerationParams, RoleTemplate
from tokenwire_service.providers import (
    AUTO,
    DIALECTS,
    PROFILES,
    guess_dialect,
    guess_profile,
)
from tokenwire_service.secret import Digest, Secret
from tokenwire_service.typed_yaml import Field
from tokenwire_service.validation import RANGES, Range

DEFAULT_ADMIN = "127.0.0.1:50052"
ADMIN_OFF = "off"
OPENAI_BASE_URL = "https://api.openai.com/v1"

# The cap of a configured model that names none, unless it says that it reasons.
DEFAULT_CAP = 4096
# What a configured model's extra_body may not set.
TYPED_ONLY = frozenset({"model", "messages", "stream"})

# Set per request by the gateway or by HTTP itself.
_RESERVED_HEADERS = re.compile(
    r"accept|accept-encoding|connection|content-.*|expect|host|keep-alive|openai-organization|"
    r"te|trailer|transfer-encoding|upgrade|x-request-id",
    re.IGNORECASE,
)
# Header values are shown in full where configuration is shown: credentials go into `keys`.
_CREDENTIAL_HEADER = re.compile(r"auth|cookie|key|passw|secret|token", re.IGNORECASE)

_SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


# --- how values are written -------------------------------------------------------------


def _whole(low: int, high: int) -> Meta:
    return Meta(ge=low, le=high, description=f"a whole number from {low} to {high}")


def _number(low: float, high: float) -> Meta:
    return Meta(ge=low, le=high, description=f"a number from {low:g} to {high:g}")


def _size(low: str, high: str) -> Meta:
    return Meta(
        ge=_parse_size(low),
        le=_parse_size(high),
        description=f"a size such as 32MiB, from {low} to {high}",
        extra={"parse": _parse_size},
    )


def _duration(low: str, high: str) -> Meta:
    return Meta(
        ge=_parse_duration(low),
        le=_parse_duration(high),
        description=f"a duration such as 30s or 500ms, from {low} to {high}",
        extra={"parse": _parse_duration},
    )


def _parse_size(value: object) -> Any:
    if not isinstance(value, str):
        return value  # a bare number is bytes
    if match := re.fullmatch(r"(\d{1,18})(B|[KMG]iB)", value):
        return int(match[1]) * _SIZES[match[2]]
    raise ValueError(value)


def _parse_duration(value: object) -> float:
    number_unit = r"(\d+(?:\.\d+)?)(ms|s|m|h)"
    if not isinstance(value, str) or not re.fullmatch(f"(?:{number_unit})+", value):
        raise ValueError(value)  # a bare number is ambiguous: other tools mean ms
    return sum(float(n) * _DURATIONS[unit] for n, unit in re.findall(number_unit, value))


def _parse_url(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"https?://[!-~]+", value):
        raise ValueError(value)
    parts = urlsplit(value)  # ValueError: brackets that hold no address
    # Seen in the text, because urlsplit drops an empty `?`, `#` or `@`.
    if re.search(r"[?#@\\]", value) or not parts.hostname or parts.port == 0:
        raise ValueError(value)
    return value.rstrip("/")


def _parse_redis_url(value: object) -> str:
    if isinstance(value, str):
        if re.fullmatch(r"unix:/[^\s\0?#]{1,100}", value):
            return value
        if re.fullmatch(r"rediss?://[^\s@?#/]+(?:/\d{1,5})?", value):
            parts = urlsplit(value)  # ValueError: brackets that hold no address
            if parts.hostname and parts.port != 0:
                return value
    raise ValueError(value)


def _parse_listen(value: object) -> str:
    if isinstance(value, str):
        if re.fullmatch(r"unix:(//)?[^\s\0]{1,100}", value):
            return value
        match = re.fullmatch(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", value, re.ASCII)
        if match and int(match[1]) <= 65535:
            return value
    raise ValueError(value)


def _parse_admin_listen(value: object) -> str:
    if value is False or value == ADMIN_OFF:  # YAML 1.1 reads `off` as false
        return ADMIN_OFF
    listen = _parse_listen(value)
    host = listen.rpartition(":")[0].strip("[]")
    if listen.startswith("unix:") or host == "localhost" or ipaddress.ip_address(host).is_loopback:
        return listen
    raise ValueError(value)


def _parse_optional_listen(value: object) -> str:
    return ADMIN_OFF if value is False or value == ADMIN_OFF else _parse_listen(value)


def _parse_header_name(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", value):
        raise ValueError(value)
    if _RESERVED_HEADERS.fullmatch(value) or _CREDENTIAL_HEADER.search(value):
        raise ValueError(value)
    return value


def _parse_model_name(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or value != value.strip():
        raise ValueError(value)
    if not 1 <= len(value) <= 200:
        raise ValueError(value)
    return value


Listen = Annotated[
    str,
    Meta(
        description='host:port, "[::]:port" in quotes, or unix:/path',
        extra={"parse": _parse_listen},
    ),
]
AdminListen = Annotated[
    str,
    Meta(
        description='host:port of the loopback interface, "[::1]:port" in quotes, unix:/path, or '
        "off",
        extra={"parse": _parse_admin_listen},
    ),
]
OptionalListen = Annotated[
    str,
    Meta(
        description='host:port, "[::]:port" in quotes, unix:/path, or off',
        extra={"parse": _parse_optional_listen},
    ),
]
Url = Annotated[
    str,
    Meta(
        description="an absolute http or https URL without user name, query or fragment",
        extra={"parse": _parse_url},
    ),
]
RedisUrl = Annotated[
    str,
    Meta(
        description="redis://host:port/number, rediss:// for TLS, or unix:/path, without user name",
        extra={"parse": _parse_redis_url},
    ),
]
# Names travel in gRPC metadata and metric labels.
Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z",
        description="a name of 1 to 63 letters, digits, dots, dashes or underscores",
    ),
]
ModelName = Annotated[
    str,
    Meta(
        description="a model name of 1 to 200 printable characters, in quotes if it looks like a "
        "number or a date",
        extra={"parse": _parse_model_name},
    ),
]
HeaderName = Annotated[
    str,
    Meta(
        description="a header name, neither set by the gateway nor for credentials",
        extra={"parse": _parse_header_name},
    ),
]
HeaderValue = Annotated[
    str,
    Meta(
        pattern=r"^[!-~](?:[ -~]*[!-~])?\Z",
        max_length=4096,
        description="printable ASCII text, in quotes if it looks like a number",
        extra={"hidden": True},
    ),
]
EnvironmentName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*\Z",
        description="the name of an environment variable (the key itself never stands here)",
        extra={"hidden": True},
    ),
]
Organization = Annotated[
    str,
    Meta(
        pattern=r"^[!-+\--~]{1,200}\Z",  # visible ASCII without the comma
        description="an organization: 1 to 200 visible ASCII characters",
        extra={"hidden": True},
    ),
]


def _one_of(*names: str) -> Meta:
    pattern = "|".join(map(re.escape, names))
    return Meta(pattern=rf"^(?:{pattern})\Z", description=f"one of {', '.join(names)}")


DialectName = Annotated[str, _one_of(AUTO, *DIALECTS)]
ProfileName = Annotated[str, _one_of(AUTO, *PROFILES)]
ApiVersion = Annotated[
    str,
    Meta(
        pattern=r"^(?:\d{4}-\d\d-\d\d(?:-preview)?|preview|latest|v1)\Z",
        description='a version in quotes such as "2024-10-21"',
    ),
]
FilePath = Annotated[str, Meta(min_length=1, description="the path of a PEM file")]
TokenizerName = Literal["o200k_base", "o200k_harmony", "cl100k_base", "p50k_base", "qwen"]
AnyPath = Annotated[str, Meta(min_length=1, description="a path")]
Text = Annotated[str, Meta(min_length=1, description="text that is not empty")]
Role = Annotated[str, Meta(min_length=1, description="a role as callers write it")]
Internal = Meta(extra={"internal": True})  # filled in by `load`, not written in the file


def _within(interval: Range) -> Meta:
    def parse(value: object) -> object:
        if value in interval:
            return value
        raise ValueError(value)

    return Meta(description=f"a number in {interval}", extra={"parse": parse})


def _parameter(field: FieldDescriptor) -> Any:
    """Return the type of one field of GenerationParams, within the contract's range."""
    name = f"GenerationParams.{field.name}"
    match field.type:
        case FieldDescriptor.TYPE_DOUBLE:
            return Annotated[float, _within(RANGES[name])]
        case FieldDescriptor.TYPE_INT32 | FieldDescriptor.TYPE_INT64:
            most = 2 ** (31 if field.type == FieldDescriptor.TYPE_INT32 else 63) - 1
            low, high, _ = RANGES.get(name, Range(-math.inf, math.inf))
            return Annotated[int, _whole(int(max(low, -most - 1)), int(min(high, most)))]
        case FieldDescriptor.TYPE_BOOL:
            return bool
        case FieldDescriptor.TYPE_STRING if field.is_repeated:
            return Annotated[tuple[Text, ...], Meta(max_length=16)]
        case FieldDescriptor.TYPE_STRING:
            return Text
        case _:  # a map from token id to a number
            token = Annotated[int, _whole(0, 2**31 - 1)]
            return Mapping[token, Annotated[float, _within(RANGES[name])]]


PARAMETERS: Mapping[str, Field] = {
    f.name: Field(_parameter(f), required=False) for f in GenerationParams.DESCRIPTOR.fields
}
_ROLE_TEMPLATE: Mapping[str, Field] = {
    f.name: Field(Role if f.name == "role" else str, required=f.name == "role")
    for f in RoleTemplate.DESCRIPTOR.fields
}
Parameter = Annotated[
    str,
    Meta(pattern=rf"^(?:{'|'.join(PARAMETERS)})\Z", description=f"one of {', '.join(PARAMETERS)}"),
]

# --- what is configured -----------------------------------------------------------------


class Limits(Struct, frozen=True, kw_only=True):
    """Bounds on what one instance holds at once."""

    # One gRPC message, in either direction.
    message_bytes: Annotated[int, _size("64KiB", "256MiB")] = 32 * 2**20
    # Chats at once, streams until their end.
    in_flight: Annotated[int, _whole(1, 100_000)] = 1000
    # How late the event loop may run, on average over half a second, before new chats are refused
    # with GATEWAY_OVERLOADED, so that those that run keep their pace.
    loop_lag: Annotated[float, _duration("10ms", "1m")] = 0.5
    # Calls that have come and wait to begin; gRPC cuts off those beyond. Once half as many wait, or
    # a quarter and for half a second only more, it is overload: nearly all hear GATEWAY_OVERLOADED.
    pending: Annotated[int, _whole(200, 100_000)] = 1000
    # Chats that wait for a slot, at each upstream and at the gateway; the next one hears
    # GATEWAY_OVERLOADED.
    queue: Annotated[int, _whole(0, 100_000)] = 100
    # Items of one batch at once, and what a caller gets who does not say.
    batch_items_at_once: Annotated[int, _whole(1, 256)] = 20
    # Text given to the tokenizer in one call, as UTF-8.
    tokenizer_bytes: Annotated[int, _size("1KiB", "64MiB")] = 4 * 2**20
    # One whole answer of an upstream that is not streamed, unpacked; or what a stream sends
    # between two pieces of the answer.
    upstream_answer_bytes: Annotated[int, _size("64KiB", "1GiB")] = 32 * 2**20
    # One event of an upstream's stream.
    upstream_event_bytes: Annotated[int, _size("64KiB", "256MiB")] = 8 * 2**20


class Timeouts(Struct, frozen=True, kw_only=True):
    """Timers of one call, seconds."""

    # The whole call, where the caller set no deadline or a later one.
    total: Annotated[float, _duration("1ms", "24h")] = 600.0
    # One message to a caller who does not read.
    write: Annotated[float, _duration("1ms", "24h")] = 60.0


class Connections(Struct, frozen=True, kw_only=True):
    """Connections of callers, seconds. Who balances load chooses an instance for each connection,
    so that a new one gets no call before others have ended theirs."""

    # After that a connection takes no new calls, and its caller opens another; up to a tenth more
    # or less, by chance. None: never.
    max_age: Annotated[float, _duration("1s", "24h")] | None = 600.0
    # After that, for the calls that it carries to end; at least `timeouts.total`. None: until they
    # have ended.
    max_age_grace: Annotated[float, _duration("1s", "48h")] | None = None


class Drain(Struct, frozen=True, kw_only=True):
    """Leaving after SIGTERM, seconds."""

    # Between reporting NOT_SERVING and closing the port: load balancers stop sending here.
    propagation: Annotated[float, _duration("0s", "10m")] = 5.0
    # After that, for calls in flight to end by themselves.
    grace: Annotated[float, _duration("0s", "24h")] = 120.0


class Log(Struct, frozen=True, kw_only=True):
    """The log."""

    # None: text on a terminal, json elsewhere.
    format: Literal["text", "json"] | None = None
    level: Literal["debug", "info", "warning", "error"] = "info"


class Admin(Struct, frozen=True, kw_only=True):
    """The port for operators, apart from that for callers and only for this machine."""

    # Port 0: any free one. None: DEFAULT_ADMIN, and nothing where another process has it.
    listen: AdminListen | None = None


class StatusPage(Struct, frozen=True, kw_only=True):
    """A page for people that shows the gateway live, by HTTP and only on this machine."""

    # Port 0: any free one.
    listen: AdminListen = ADMIN_OFF


class HealthPort(Struct, frozen=True, kw_only=True):
    """grpc.health.v1 alone, in plaintext and on a port of its own: probes of Kubernetes can neither
    speak TLS nor show a certificate."""

    # Port 0: any free one. The port for callers answers as well.
    listen: OptionalListen = ADMIN_OFF


class Metrics(Struct, frozen=True, kw_only=True):
    """Metrics for Prometheus, by HTTP and on a port of their own."""

    # Port 0: any free one. Not only this machine: whoever collects them runs elsewhere.
    listen: OptionalListen = ADMIN_OFF
    # Names of models that are not configured and yet have series of their own, the first that
    # upstreams answered for; all others are one series.
    model_names: Annotated[int, _whole(0, 10_000)] = 100


class Otlp(Struct, frozen=True, kw_only=True):
    """Traces and metrics for an OpenTelemetry collector, by OTLP over gRPC."""

    # None: nothing is sent. http is plaintext, https TLS.
    endpoint: Url | None = None
    traces: bool = True
    metrics: bool = True
    # Share of the traces that begin here; one that a caller began is traced if the caller says so.
    sampling: Annotated[float, _number(0, 1)] = 1.0
    # Whether requests to upstreams carry `traceparent`.
    propagate: bool = True
    # Spans that wait to be sent; more are dropped.
    queue: Annotated[int, _whole(1, 1_000_000)] = 4096
    # Between two sends of the metrics, seconds.
    interval: Annotated[float, _duration("100ms", "1h")] = 60.0


class Retries(Struct, frozen=True, kw_only=True):
    """Trying again while nothing has been delivered."""

    # Requests to one upstream for one call, the first one included; a fallback has as many of its
    # own.
    max_attempts: Annotated[int, _whole(1, 20)] = 5
    # Before the first retry, seconds, without jitter; doubles for each one after.
    backoff: Annotated[float, _duration("1ms", "1m")] = 0.25
    # Where the doubling ends, seconds. At least `backoff`.
    backoff_cap: Annotated[float, _duration("1ms", "10m")] = 8.0
    # Retries as a share of calls.
    budget: Annotated[float, _number(0, 1)] = 0.2
    # Retries per 10 seconds allowed on top, for when there is little traffic.
    budget_floor: Annotated[int, _whole(0, 1000)] = 10


class UpstreamTimeouts(Struct, frozen=True, kw_only=True):
    """Timers of one request to an upstream, seconds; each ends at the call's deadline too."""

    # DNS, TCP and TLS together.
    connect: Annotated[float, _duration("1ms", "10m")] = 5.0
    # From the request sent to the first byte of a plain answer, or the first text of a stream.
    first_byte: Annotated[float, _duration("1ms", "24h")] = 120.0
    # Between events of a stream once text has come; comments and pings that keep it alive do not
    # count.
    idle: Annotated[float, _duration("1ms", "24h")] = 60.0


class KeySource(Struct, frozen=True, kw_only=True):
    """Where keys come from, as the file writes it: exactly one of `env` and `file`."""

    # Environment variable; it may hold several keys, separated by commas or line breaks.
    env: EnvironmentName | None = None
    # Path, relative to the configuration file; one key on each line, `#` begins a comment.
    file: (
        Annotated[str, Meta(min_length=1, description="a path", extra={"hidden": True})] | None
    ) = None
    # Name in logs and answers; `-1`, `-2`, ... is appended where there are several keys.
    # None: `key-` and 8 hex digits, a fingerprint.
    id: Name | None = None
    # Sent as OpenAI-Organization.
    organization: Organization | None = None
    # Share of the traffic, relative to the other keys of the upstream.
    weight: Annotated[float, _number(0.01, 1000)] = 1.0
    # Keys of one account share its limits. None: the organization, else each key by itself.
    quota_group: Name | None = None
    # Most requests of each key in any 60 seconds. None: no limit of ours.
    requests_per_minute: Annotated[int, _whole(1, 1_000_000)] | None = None
    # Most tokens of each key in any 60 seconds, prompt and answer, estimated before and corrected
    # after each request. None: no limit of ours.
    tokens_per_minute: Annotated[int, _whole(1, 1_000_000_000)] | None = None
    # Most requests of each key at once. None: no limit of ours.
    in_flight: Annotated[int, _whole(1, 100_000)] | None = None


class OrganizationSource(Struct, frozen=True, kw_only=True):
    """Organizations held by the environment."""

    # Environment variable; it may hold several, separated by commas.
    env: EnvironmentName


class Key(Struct, frozen=True, kw_only=True):
    """One credential of one upstream."""

    id: str  # unique in its upstream; stands for the key in logs and answers
    secret: Secret
    organization: str | None = None  # None: the upstream's organizations in turn, if any
    weight: float = 1.0
    quota_group: str = ""  # never empty once built: the organization, else the id
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    in_flight: int | None = None

    def __post_init__(self) -> None:
        if not self.quota_group:
            msgspec.structs.force_setattr(self, "quota_group", self.organization or self.id)


_KEY = Meta(
    description="a mapping with env or file (the key itself never stands here)",
    extra={"source": KeySource},
)
_KEYS = Meta(min_length=1, description="a list of keys, each a mapping with env or file")


class KeyEntry(Struct, frozen=True, kw_only=True):
    """One entry of `keys` as it was read: the keys it holds, and where it may be read again."""

    source: KeySource
    path: Path | None  # of the file; None: of the environment, which does not change
    secrets: tuple[Secret, ...]  # in the order found, with repetitions


class Upstream(Struct, frozen=True, kw_only=True):
    """One provider, spoken to with a pool of keys."""

    name: Annotated[Name, Internal]
    # Paths such as /chat/completions are appended. No slash at the end.
    base_url: Url
    # What it speaks; `auto`: guessed by the address, then by the model's name.
    dialect: DialectName = "openai"
    # What it takes of OpenAI's language, and under which names; `auto`: guessed likewise.
    profile: ProfileName = AUTO
    # Of Azure. None: its versionless address, which ends in /openai/v1.
    api_version: ApiVersion | None = None
    # At least one; in the order written, repetitions dropped.
    keys: Annotated[tuple[Annotated[Key, _KEY], ...], _KEYS]
    # What `keys` was made of, where it was read from a configuration.
    key_entries: Annotated[tuple[KeyEntry, ...], Internal] = ()
    # Sent as OpenAI-Organization, in turn, with keys that have none of their own.
    organizations: tuple[
        Annotated[Organization, Meta(extra={"source": OrganizationSource})], ...
    ] = ()
    # Whether model names that no model entry names go here unchanged. At most one upstream.
    passthrough: bool = False
    # Chats at once here, so that a slow upstream does not take every slot. None: all slots, or
    # three quarters of them where there are several upstreams.
    in_flight: Annotated[int, _whole(1, 100_000)] | None = None
    # Sent with every request.
    headers: Mapping[HeaderName, HeaderValue] = {}
    # When this upstream is asked for a stream: as the caller asks, always (it answers in no other
    # way), or never (it cannot). What callers get is what they ask for.
    streaming: Literal["as_asked", "always", "never"] = "as_asked"
    # HTTP proxy. None: a direct connection; proxy variables of the environment are not used.
    proxy: Url | None = None
    # Environment variable that holds the proxy's URL in place of `proxy`, user and password with it
    # if it asks for them.
    proxy_env: EnvironmentName | None = None
    # `user:password` for the proxy.
    proxy_login: Annotated[Secret | None, Internal] = None
    timeouts: UpstreamTimeouts = UpstreamTimeouts()
    # Fields of GenerationParams that this upstream does not take. None: what its dialect knows.
    unsupported_parameters: frozenset[Parameter] | None = None


class Model(Struct, frozen=True, kw_only=True):
    """One model name that callers may use."""

    name: Annotated[ModelName, Internal]
    # Name of an upstream.
    upstream: Annotated[str, Meta(min_length=1, description="the name of an upstream")]
    # Never empty once built: the name.
    upstream_model: ModelName = ""
    # None: the upstream's.
    dialect: DialectName | None = None
    profile: ProfileName | None = None
    # Other names for it, in no other model.
    aliases: tuple[ModelName, ...] = ()
    # Models to ask instead, in order, when the upstream of this one cannot answer. Keys that cool
    # are waited for only when these cannot answer either.
    fallbacks: tuple[ModelName, ...] = ()
    # None: the upstream's.
    streaming: Literal["as_asked", "always", "never"] | None = None
    # Prompt and answer together; None: unknown. For ListModels.
    context_window_tokens: Annotated[int, _whole(1, 2**31 - 1)] | None = None
    # Requests that ask for more, or do not say, are given this; None: no cap. Read from a file, the
    # default is DEFAULT_CAP, or what `defaults` names if that is more, and never more than the
    # window; none with the capability `reasoning`.
    max_completion_tokens: Annotated[int, _whole(1, 2**31 - 1)] | None = None
    # Open set: tools, json_schema, vision, reasoning, ... For ListModels.
    capabilities: tuple[Name, ...] = ()
    # None: guessed from the model's name.
    tokenizer: TokenizerName | None = None
    # A sentencepiece model (tokenizer.model) that counts instead. In the file relative to it; once
    # loaded: where it was found.
    tokenizer_file: AnyPath | None = None
    # What a request gets that does not say. A copy for each use: messages can be changed.
    defaults: Annotated[GenerationParams, Meta(extra={"fields": PARAMETERS})] = field(
        default_factory=GenerationParams
    )
    # Parameter -> parameter of the same type that its value is sent as.
    rename_parameters: Mapping[Parameter, Parameter] = {}
    # JSON object merged (RFC 7396) into the upstream body, beneath the request's extra_body_json.
    extra_body: Annotated[str, Meta(description="a mapping", extra={"json": True})] = ""
    # Used by requests that bring none. Roles are unique; every fallback_role is known.
    role_templates: tuple[Annotated[RoleTemplate, Meta(extra={"fields": _ROLE_TEMPLATE})], ...] = ()
    # On top of the upstream's.
    unsupported_parameters: frozenset[Parameter] = frozenset()

    def __post_init__(self) -> None:
        if not self.upstream_model:
            msgspec.structs.force_setattr(self, "upstream_model", self.name)


class Tls(Struct, frozen=True, kw_only=True):
    """Certificates of the gRPC port. The files are read again when they change."""

    # PEM: the gateway's own chain, the leaf first.
    certificate: FilePath
    # PEM: its private key.
    key: FilePath
    # PEM: who vouches for callers. With it, every connection must show a certificate.
    client_authorities: FilePath | None = None


class TokenSource(Struct, frozen=True, kw_only=True):
    """Callers' tokens held by the environment or a file."""

    # Environment variable; it may hold several tokens, separated by commas or line breaks.
    env: EnvironmentName | None = None
    # File with one token on each line, relative to this file.
    file: (
        Annotated[str, Meta(min_length=1, description="a path", extra={"hidden": True})] | None
    ) = None


_TOKEN = Meta(
    description="a mapping with env or file (the token itself never stands here)",
    extra={"source": TokenSource, "hidden": True},
)


class Caller(Struct, frozen=True, kw_only=True):
    """One caller of this gateway, with what it may do."""

    name: Annotated[Name, Internal]
    # Bearer tokens, of which only digests are kept; the source may hold `sha256:` and 64
    # hexadecimal digits in place of a token.
    tokens: tuple[Annotated[Digest, _TOKEN], ...] = ()
    # Names in its client certificate: a DNS name, URI or address of the subject's alternatives, or
    # the common name.
    certificates: tuple[Text, ...] = ()
    # Names of models it may ask, as callers write them; `*` stands for any characters. None: all.
    models: tuple[ModelName, ...] = ()
    # Most chats in any 60 seconds. None: no limit.
    requests_per_minute: Annotated[int, _whole(1, 1_000_000)] | None = None
    # Most tokens in any 60 seconds, prompt and answer, estimated before and corrected after each
    # chat. None: no limit.
    tokens_per_minute: Annotated[int, _whole(1, 1_000_000_000)] | None = None
    # Most chats at once, streams until their end. None: no limit.
    in_flight: Annotated[int, _whole(1, 100_000)] | None = None
    # Tokens from midnight to midnight UTC; the chat that reaches it is the last. None: no limit.
    tokens_per_day: Annotated[int, _whole(1, 1_000_000_000_000)] | None = None


class Redis(Struct, frozen=True, kw_only=True):
    """A Redis or Valkey that holds what replicas share."""

    # One server, or what stands for it; no cluster. Its password stands elsewhere.
    url: RedisUrl
    # What becomes of those who have limits while it is away: each replica keeps to the limits by
    # itself, or they are refused.
    on_failure: Literal["open", "closed"]
    # None: the user `default`.
    username: Text | None = None
    # Environment variable that holds its password. None: it asks for none.
    password_env: EnvironmentName | None = None
    password: Annotated[Secret | None, Internal] = None
    # PEM: who vouches for it. None: whom this machine trusts.
    certificate_authorities: FilePath | None = None
    # What the names of all its keys begin with.
    prefix: Name = "tokenwire"
    # For one answer, or to connect, seconds; after that it is away.
    timeout: Annotated[float, _duration("10ms", "10s")] = 0.25
    # Until what an instance that died had running counts no more, seconds.
    lease: Annotated[float, _duration("1s", "10m")] = 10.0


class Config(Struct, frozen=True, kw_only=True):
    """Everything that can be configured."""

    # The gRPC port: host:port, [::]:port or unix:/path. Port 0: any free one.
    listen: Listen = "127.0.0.1:50051"
    # None: plaintext.
    tls: Tls | None = None
    # Who may call. Empty: everyone who reaches the port.
    callers: tuple[Caller, ...] = ()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    connections: Connections = Connections()
    drain: Drain = Drain()
    # Whether the port for callers answers grpc.reflection. That for operators always does.
    reflection: bool = True
    # How the operating system shares out the processor, on Linux: with batch, what arrives
    # pre-empts nobody, which costs less; with normal it does, which is sooner where others want the
    # same processor.
    scheduling: Literal["batch", "normal"] = "batch"
    log: Log = Log()
    retries: Retries = Retries()
    admin: Admin = Admin()
    status_page: StatusPage = StatusPage()
    health: HealthPort = HealthPort()
    metrics: Metrics = Metrics()
    otlp: Otlp = Otlp()
    # None: limits are those of this instance alone.
    redis: Redis | None = None
    # Between two looks at the configuration and at each file of keys, seconds. A change is taken
    # once two looks in a row have found the same.
    key_file_interval: Annotated[float, _duration("10ms", "1h")] = 1.0
    # Empty only if `needs_simulator`.
    upstreams: tuple[Upstream, ...] = ()
    models: tuple[Model, ...] = ()
    # What was put right or looks odd, one sentence each.
    warnings: Annotated[tuple[str, ...], Internal] = ()
    # Paths of files of callers' tokens, for whoever watches them.
    token_files: Annotated[tuple[str, ...], Internal] = ()

    @property
    def needs_simulator(self) -> bool:
        """Whether there is no upstream: no key in the environment and no file."""
        return not self.upstreams


# What takes effect when the file changes while the gateway runs; what is not named here, as it may
# be new, stays as it is until a restart. docs/configuration.md says the same, and
# `tokenwire.restarting` in the chart, where what is named here replaces no pods.
RELOADED = frozenset(
    {
        "callers",
        "limits.in_flight",
        "limits.loop_lag",
        "limits.queue",
        "limits.batch_items_at_once",
        "limits.tokenizer_bytes",
        "limits.upstream_answer_bytes",
        "limits.upstream_event_bytes",
        "timeouts",
        "drain",
        "log.level",
        "retries",
        "key_file_interval",
        "upstreams",
        "models",
    }
)


def dialect_of(upstream: Upstream, model: Model | None, model_name: str) -> str:
    """What is spoken for one model there."""
    dialect = (model and model.dialect) or upstream.dialect
    if dialect != AUTO:
        return dialect
    return guess_dialect(upstream.base_url, _names(model, model_name))


def profile_of(upstream: Upstream, model: Model | None, model_name: str) -> str:
    """What is taken of OpenAI's language for one model there; "" where another one is spoken.

    A profile is guessed by the model's name only at OpenAI's own addresses, or where the dialect
    is to be guessed too: what an unknown server calls its models says nothing of what it takes.
    """
    dialect = dialect_of(upstream, model, model_name)
    if DIALECTS[dialect].profile == "":
        return ""
    profile = (model and model.profile) or upstream.profile
    if profile != AUTO:
        return profile
    guessed = ((model and model.dialect) or upstream.dialect) == AUTO
    names = _names(model, model_name)
    return guess_profile(dialect, upstream.base_url, names, by_name=guessed)


def _names(model: Model | None, model_name: str) -> tuple[str, ...]:
    return (model_name,) if model is None else (model_name, model.name)
