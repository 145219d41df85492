"""What is known of providers, as data: their dialects, and what each takes of a request.

A dialect is a row of DIALECTS and a module in `upstream`; a server that speaks OpenAI's with words
of its own is a row of PROFILES. docs/dialects.md says how to add one, and where each fact is from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import urlsplit

AUTO = "auto"  # in place of a name: guess


class DialectRow(NamedTuple):
    """One dialect, for configuration and for the guess.

    `implementation`: `module:Class` within `tokenwire_service.upstream`.
    `addresses`: who speaks it, each a host, `*.` before a domain for every host in it, and where
    one host speaks several dialects the beginning of the path.
    `models`: how the names begin of models that are spoken to so wherever they are served; only
    for dialects that any OpenAI-compatible server would understand.
    `profile`: of those who speak it; None where it is guessed. "": the dialect has no profiles.
    """

    implementation: str
    addresses: tuple[str, ...] = ()
    models: re.Pattern[str] | None = None
    profile: str | None = ""


class Profile(NamedTuple):
    """What one kind of server takes of a chat completions request, and under which names.

    Fields go by their proto name: those of GenerationParams, those of ChatRequest, and
    `messages.name` and the like. `names` is where a field goes in the body, with dots between
    levels, as far as it differs from NAMES; `values` what is written for a value. `reasoned`: not
    taken in requests whose reasoning_effort is set, to other than `none`. `stops_here`: stop
    strings are not sent; the gateway cuts the answer, as it does with every upstream.
    """

    addresses: tuple[str, ...] = ()
    names: Mapping[str, str] = {}
    values: Mapping[str, Mapping[bool, object]] = {}
    roles: Mapping[str, str] = {}
    unsupported: frozenset[str] = frozenset()
    reasoned: frozenset[str] = frozenset()
    stream_options: Mapping[str, bool] = {"include_usage": True}
    stops_here: bool = False
    variants: tuple[tuple[re.Pattern[str], str], ...] = ()  # other profiles, by the model's name


_O_SERIES = re.compile(r"(?:ft:)?(?:o\d+(?:-|$)|gpt-5(?!-chat)(?:-|:|$))", re.IGNORECASE)
_FROM_GPT_5_1 = re.compile(r"(?:ft:)?gpt-(?:5\.\d+|[6-9])(?!.*-chat)", re.IGNORECASE)

DIALECTS: Mapping[str, DialectRow] = {
    "openai": DialectRow(
        "openai:OpenAI",
        ("api.openai.com",),
        re.compile(r"gpt(?!-oss)|o\d+(?:-|$)", re.IGNORECASE),
        profile=None,
    ),
    "azure": DialectRow(
        "azure:Azure",
        ("*.openai.azure.com", "*.cognitiveservices.azure.com", "*.services.ai.azure.com"),
        profile="azure",
    ),
    "qwen": DialectRow(
        "qwen:Qwen",
        (
            "dashscope.aliyuncs.com/compatible-mode",
            "dashscope-intl.aliyuncs.com/compatible-mode",
            "dashscope-us.aliyuncs.com/compatible-mode",
        ),
        re.compile(r"qwen|qwq|qvq", re.IGNORECASE),
        profile="qwen",
    ),
    "internlm": DialectRow(
        "internlm:InternLM",
        ("*.intern-ai.org.cn",),
        re.compile(r"intern", re.IGNORECASE),
        profile="internlm",
    ),
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

# Fields and their names in OpenAI's language, in the order in which they are written.
NAMES: Mapping[str, str] = {
    **{
        name: name
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "seed",
            "logprobs",
            "top_logprobs",
            "enable_thinking",
            "parallel_tool_calls",
        )
    },
    "max_completion_tokens": "max_tokens",
    "choice_count": "n",
    "stop": "stop",
    "logit_bias": "logit_bias",
    "reasoning_effort": "reasoning_effort",
    "verbosity": "verbosity",
    "end_user_id": "user",
    "prompt_cache_key": "prompt_cache_key",
    "service_tier": "service_tier",
    "messages.name": "name",
    "messages.reasoning": "reasoning_content",
    "messages.refusal": "refusal",
}

_OF_REQUEST = frozenset({"end_user_id", "prompt_cache_key", "service_tier"})  # not of its params
_VLLM_ONLY = frozenset({"top_k", "min_p", "repetition_penalty", "enable_thinking"})
_SAMPLING = frozenset(
    {
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "logprobs",
        "top_logprobs",
        "logit_bias",
    }
)
_OPENAI = Profile(
    names={"max_completion_tokens": "max_completion_tokens", "end_user_id": "safety_identifier"},
    unsupported=_VLLM_ONLY,
    # Random padding against length analysis; the link is TLS to one peer.
    stream_options={"include_usage": True, "include_obfuscation": False},
)
_AZURE = Profile(unsupported=_VLLM_ONLY)
_REASONING = Profile(
    roles={"system": "developer"},
    unsupported=_VLLM_ONLY | _SAMPLING,
    stops_here=True,
)
_BY_TEMPLATE = {"enable_thinking": "chat_template_kwargs.enable_thinking"}

PROFILES: Mapping[str, Profile] = {
    # Whoever is not known: everything is sent, under the names that most servers know.
    "compatible": Profile(),
    "openai": _OPENAI._replace(
        addresses=("api.openai.com",),
        variants=((_O_SERIES, "openai-reasoning"), (_FROM_GPT_5_1, "openai-hybrid")),
    ),
    # o1, o3, o4-mini, gpt-5: these always reason.
    "openai-reasoning": _REASONING._replace(
        names=_OPENAI.names, stream_options=_OPENAI.stream_options
    ),
    # From gpt-5.1 on they reason if asked to.
    "openai-hybrid": _OPENAI._replace(roles=_REASONING.roles, reasoned=_SAMPLING, stops_here=True),
    "azure": _AZURE._replace(
        variants=((_O_SERIES, "azure-reasoning"), (_FROM_GPT_5_1, "azure-hybrid")),
    ),
    "azure-reasoning": _REASONING._replace(
        names={"max_completion_tokens": "max_completion_tokens"}
    ),
    "azure-hybrid": _AZURE._replace(
        names={"max_completion_tokens": "max_completion_tokens"},
        roles=_REASONING.roles,
        reasoned=_SAMPLING,
        stops_here=True,
    ),
    "qwen": Profile(
        unsupported=frozenset(
            {"min_p", "logit_bias", "reasoning_effort", "verbosity", "service_tier"}
            | {"end_user_id", "prompt_cache_key", "messages.refusal"}
        ),
        roles={"developer": "system"},
    ),
    "internlm": Profile(
        names={"enable_thinking": "thinking_mode"},
        unsupported=frozenset({"verbosity", "service_tier", "prompt_cache_key"}),
        roles={"developer": "system"},
    ),
    "deepseek": Profile(
        addresses=("api.deepseek.com",),
        names={"enable_thinking": "thinking.type"},
        values={"enable_thinking": {True: "enabled", False: "disabled"}},
        roles={"developer": "system"},
        unsupported=frozenset(
            {"top_k", "min_p", "repetition_penalty", "seed", "choice_count", "logit_bias"}
            | {"verbosity", "parallel_tool_calls", "service_tier", "prompt_cache_key"}
            | {"messages.refusal"}
        ),
    ),
    "groq": Profile(
        addresses=("api.groq.com",),
        names={
            "max_completion_tokens": "max_completion_tokens",
            "messages.reasoning": "reasoning",
        },
        unsupported=frozenset(
            {"top_k", "min_p", "repetition_penalty", "enable_thinking", "verbosity"}
            | {"logprobs", "top_logprobs", "logit_bias", "prompt_cache_key", "messages.name"}
            | {"messages.refusal"}
        ),
    ),
    "mistral": Profile(
        addresses=("api.mistral.ai", "codestral.mistral.ai"),
        names={"seed": "random_seed"},
        roles={"developer": "system"},
        unsupported=frozenset(
            {"top_k", "min_p", "repetition_penalty", "enable_thinking", "verbosity"}
            | {"logprobs", "top_logprobs", "logit_bias", "end_user_id", "prompt_cache_key"}
            | {"service_tier", "messages.name", "messages.reasoning", "messages.refusal"}
        ),
        stream_options={},  # refused; usage comes unasked
    ),
    "xai": Profile(
        addresses=("api.x.ai", "*.api.x.ai"),
        names={"max_completion_tokens": "max_completion_tokens"},
        unsupported=frozenset(
            {"top_k", "min_p", "repetition_penalty", "enable_thinking", "verbosity", "logit_bias"}
        ),
    ),
    "openrouter": Profile(
        addresses=("openrouter.ai",),
        names={"enable_thinking": "reasoning.enabled", "messages.reasoning": "reasoning"},
        unsupported=frozenset({"choice_count"}),
    ),
    "together": Profile(
        addresses=("api.together.xyz", "api.together.ai"),
        names={"enable_thinking": "reasoning.enabled", "messages.reasoning": "reasoning"},
        values={"logprobs": {True: 1, False: 0}},
        unsupported=frozenset({"top_logprobs", "verbosity", "service_tier", "prompt_cache_key"}),
    ),
    "vllm": Profile(
        names={**_BY_TEMPLATE, "messages.reasoning": "reasoning"},
        unsupported=frozenset({"verbosity", "service_tier", "prompt_cache_key"}),
    ),
    "llama.cpp": Profile(
        names={**_BY_TEMPLATE, "repetition_penalty": "repeat_penalty"},
        unsupported=frozenset({"verbosity", "service_tier", "prompt_cache_key", "end_user_id"}),
    ),
    "transformers": Profile(
        roles={"developer": "system"},
        unsupported=_VLLM_ONLY
        | {"logprobs", "top_logprobs", "choice_count", "parallel_tool_calls", "verbosity"}
        | {"presence_penalty", "reasoning_effort", "service_tier", "prompt_cache_key"}
        | {"end_user_id", "tool_choice", "response_format", "messages.refusal"},
        stream_options={},
        stops_here=True,
    ),
    "ollama": Profile(
        addresses=("ollama.com",),
        names={"messages.reasoning": "reasoning"},
        unsupported=_VLLM_ONLY
        | {"logit_bias", "choice_count", "parallel_tool_calls", "verbosity"}
        | {"service_tier", "prompt_cache_key", "end_user_id", "tool_choice"},
    ),
}


def proto_path(place: str) -> str:
    """The path below ChatRequest of what an upstream calls `place`; the place itself where it is
    unknown or has the same name."""
    return _PATHS.get(place, place)


_PATHS: Mapping[str, str] = {
    place: field if field in _OF_REQUEST else f"params.{field}"
    for profile in PROFILES.values()
    for field, place in {**NAMES, **profile.names}.items()
    if not field.startswith("messages.")
}


def _addresses(known: Mapping[str, tuple[str, ...]]) -> Sequence[tuple[str, str, str]]:
    rows = []
    for name, addresses in known.items():
        for address in addresses:
            host, _, path = address.partition("/")
            rows.append((host, f"/{path}/" if path else "/", name))
    return sorted(rows, key=lambda row: -len(row[0] + row[1]))


# (host, path, whose): what says more comes first.
_DIALECT_ADDRESSES = _addresses({name: row.addresses for name, row in DIALECTS.items()})
_PROFILE_ADDRESSES = _addresses({name: row.addresses for name, row in PROFILES.items()})


def guess_dialect(base_url: str, model_names: tuple[str, ...]) -> str:
    """The dialect of an upstream that names none: by its address, else by the model's name, else
    OpenAI's, which most servers speak."""
    if found := _at(base_url, _DIALECT_ADDRESSES):
        return found
    if _at(base_url, _PROFILE_ADDRESSES):
        return "openai"
    for name, row in DIALECTS.items():
        if row.models is not None and _any(row.models, model_names):
            return name
    return "openai"


def guess_profile(
    dialect: str, base_url: str, model_names: tuple[str, ...], *, by_name: bool
) -> str:
    """The profile of an upstream that names none. `by_name`: where its address tells nothing, the
    model's name may."""
    name = DIALECTS[dialect].profile
    if name is None:
        name = _at(base_url, _PROFILE_ADDRESSES)
    if not name and by_name:
        models = DIALECTS[dialect].models
        name = "openai" if models is not None and _any(models, model_names) else None
    name = name or "compatible"
    for models, variant in PROFILES[name].variants:
        if _any(models, model_names):
            return variant
    return name


def _any(models: re.Pattern[str], names: tuple[str, ...]) -> bool:
    """Whether one of the names, without the organization before a slash, begins so."""
    return any(models.match(name.rpartition("/")[2]) for name in names)


@lru_cache(maxsize=256)  # the few addresses that are configured are asked for by every call
def _place(base_url: str) -> tuple[str, str]:
    """Host and path of an address."""
    parts = urlsplit(base_url)
    return parts.hostname or "", f"{parts.path}/"


def _at(base_url: str, known: Sequence[tuple[str, str, str]]) -> str:
    """Whose address it is; "" for nobody's."""
    host, path = _place(base_url)
    for wanted, below, name in known:
        there = host.endswith(wanted[1:]) if wanted[0] == "*" else host == wanted
        if there and path.startswith(below):
            return name
    return ""
