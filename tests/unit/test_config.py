"""Configuration: what loads, what each mistake says, and that keys never show."""

import copy
import hashlib
import io
import json
import pickle
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sentencepiece
import trustme
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tokenwire.v1.chat_pb2 import GenerationParams
from tokenwire_service.config import (
    Config,
    ConfigError,
    ConfigFileError,
    Key,
    Limits,
    Model,
    Secret,
    Upstream,
    check,
    load,
)
from tokenwire_service.providers import AUTO, DIALECTS, PROFILES
from tokenwire_service.secret import Digest
from tokenwire_service.settings import PARAMETERS
from tokenwire_service.typed_yaml import MAX_DEPTH, convert, file_fields, unwrap

ROOT = Path(__file__).parents[2]
ENVIRON = {"K": "value-of-k"}
UPSTREAM = "upstreams: {u: {base_url: 'http://u/v1', keys: [{env: K}]}}\n"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_text(text: str, environ: dict[str, str] | None = None) -> Config:
    Path("t.yaml").write_text(text, encoding="utf-8")
    return load(Path("t.yaml"), ENVIRON if environ is None else environ)


def problems(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_text(text, environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def make_certificates(folder: Path) -> None:
    """tls.crt and tls.key of the gateway, and ca.crt that vouches for them."""
    folder.mkdir(exist_ok=True)
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    leaf.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    leaf.private_key_pem.write_to_path(folder / "tls.key")


# --- without a file ---------------------------------------------------------------------


def test_nothing_at_all_needs_the_simulator() -> None:
    config = load(None, {})
    assert config == Config()
    assert config.needs_simulator
    assert config.upstreams == ()


def test_one_key_makes_one_upstream_that_takes_any_model() -> None:
    config = load(None, {"OPENAI_API_KEY": " one\n"})
    (upstream,) = config.upstreams
    assert not config.needs_simulator
    assert (upstream.name, upstream.passthrough) == ("openai", True)
    assert upstream.base_url == "https://api.openai.com/v1"
    assert [key.secret.reveal() for key in upstream.keys] == ["one"]
    assert upstream.unsupported_parameters is None, "its dialect knows"
    assert config.models == ()
    assert config.warnings == ()


def test_several_keys_organizations_and_another_host() -> None:
    environ = {
        "OPENAI_API_KEY": "a, b,\nc,,a\r\n",
        "OPENAI_ORG_ID": "org-1, org-2",
        "OPENAI_BASE_URL": "http://localhost:8000/v1/",
    }
    config = load(None, environ)
    (upstream,) = config.upstreams
    assert [key.secret.reveal() for key in upstream.keys] == ["a", "b", "c"]
    assert len({key.id for key in upstream.keys}) == 3
    assert all(re.fullmatch(r"key-[0-9a-f]{8}", key.id) for key in upstream.keys)
    assert [key.quota_group for key in upstream.keys] == [key.id for key in upstream.keys]
    assert upstream.organizations == ("org-1", "org-2")
    assert upstream.base_url == "http://localhost:8000/v1"
    assert upstream.unsupported_parameters is None
    repeated = upstream.keys[0].id
    assert config.warnings == (
        f"environment.OPENAI_API_KEY: {repeated} stands there again; the repetition is dropped",
    )
    assert load(None, environ).upstreams == config.upstreams, "ids are stable"


def test_variables_that_lead_nowhere_are_warned_about() -> None:
    environ = {"OPENAI_API_KEY": " ,\n", "OPENAI_BASE_URL": "http://localhost/v1"}
    config = load(None, environ)
    assert config.needs_simulator
    assert config.warnings == (
        "environment.OPENAI_API_KEY: is empty, and not used",
        "environment.OPENAI_BASE_URL: is set without OPENAI_API_KEY, and not used",
    )


def test_all_problems_of_the_environment_at_once() -> None:
    environ = {
        "OPENAI_API_KEY": "one two",
        "OPENAI_BASE_URL": "ftp://u/v1",
        "OPENAI_ORG_ID": "org\x07",
        "TOKENWIRE_LISTEN": "50051",
    }
    with pytest.raises(ConfigError) as caught:
        load(None, environ)
    assert sorted(p.split(", expected")[0] for p in caught.value.problems) == [
        "environment.OPENAI_API_KEY: got a key that is too long or has a space or an "
        "unprintable character (not shown)",
        'environment.OPENAI_BASE_URL: got "ftp://u/v1"',
        "environment.OPENAI_ORG_ID: got a value that is not shown",
        'environment.TOKENWIRE_LISTEN: got "50051"',
    ]


def test_listen_command_line_before_environment_before_file() -> None:
    text = UPSTREAM + "listen: a:1"
    assert load_text(text).listen == "a:1"
    environ = {**ENVIRON, "TOKENWIRE_LISTEN": "b:2"}
    assert load_text(text, environ).listen == "b:2"
    assert load(Path("t.yaml"), environ, listen="unix:/c").listen == "unix:/c"
    with pytest.raises(ConfigError, match=r'^--listen: got "c", expected host:port'):
        load(Path("t.yaml"), environ, listen="c")


def test_the_environment_names_the_file() -> None:
    load_text(UPSTREAM)
    assert load(None, {**ENVIRON, "TOKENWIRE_CONFIG": "t.yaml"}).upstreams[0].name == "u"
    with pytest.raises(ConfigFileError, match=r"^none\.yaml: got a file that is unreadable \(No"):
        load(None, {"TOKENWIRE_CONFIG": "none.yaml"})


def test_a_file_without_upstreams_keeps_that_of_the_environment() -> None:
    text = "log: {level: debug}\nmodels: {m: {upstream: openai}}"
    config = load_text(text, {"OPENAI_API_KEY": "one"})
    assert [u.name for u in config.upstreams] == ["openai"]
    assert problems("log: {level: debug}", {}) == [
        "t.yaml:1: upstreams: got nothing, expected at least one, or OPENAI_API_KEY in the "
        "environment"
    ]


# --- with a file ------------------------------------------------------------------------


def test_every_way_to_write_a_value() -> None:
    Path("keys.txt").write_text("\ufeff# ours\none\n\ntwo # second\n", encoding="utf-8")
    config = load_text(
        """
listen: "[::]:0"
limits: {message_bytes: 1MiB, tokenizer_bytes: 4096, upstream_answer_bytes: 1GiB}
timeouts: {total: 1h1m1.5s}
drain: {propagation: 0s, grace: 500ms}
reflection: no
retries: {budget: 1}
log:
x-shared: &shared {connect: 1s, idle: 2s}
upstreams:
  u:
    base_url: https://u.example/v1/
    keys:
      - {env: K, id: k, weight: 2}
      - {file: keys.txt, id: f, organization: org-a}
      - {env: K, organization: org-b, quota_group: g}
    organizations: [org-c, {env: ORGS}]
    timeouts: {<<: *shared, idle: 3s}
    headers: {X-Team: search}
models:
  "gpt-4.1":
    upstream: u
    aliases: [模型, a/b:c]
    defaults: {temperature: 1, stop: ["\\n"], logit_bias: {50256: -100}, seed: -1}
    role_templates: [{role: r, fallback_role: user}]
    unsupported_parameters: [top_k]
""",
        {**ENVIRON, "ORGS": "org-d,org-e"},
    )
    assert config.listen == "[::]:0"
    assert config.limits == Limits(
        message_bytes=2**20, tokenizer_bytes=4096, upstream_answer_bytes=2**30
    )
    assert config.timeouts.total == 3661.5
    assert (config.drain.propagation, config.drain.grace) == (0.0, 0.5)
    assert config.reflection is False
    (upstream,) = config.upstreams
    assert upstream.base_url == "https://u.example/v1"
    assert [(k.id, k.secret.reveal(), k.organization, k.weight) for k in upstream.keys[:3]] == [
        ("k", "value-of-k", None, 2.0),
        ("f-1", "one", "org-a", 1.0),
        ("f-2", "two", "org-a", 1.0),
    ]
    assert [k.quota_group for k in upstream.keys] == ["k", "org-a", "org-a", "g"]
    assert upstream.organizations == ("org-c", "org-d", "org-e")
    assert (upstream.timeouts.connect, upstream.timeouts.idle) == (1.0, 3.0)
    assert upstream.headers == {"X-Team": "search"}
    assert upstream.passthrough is False
    (model,) = config.models
    assert (model.name, model.upstream_model) == ("gpt-4.1", "gpt-4.1")
    assert model.aliases == ("模型", "a/b:c")
    assert model.defaults == GenerationParams(
        temperature=1, stop=["\n"], logit_bias={50256: -100}, seed=-1
    )
    assert model.role_templates[0].fallback_role == "user"
    assert model.unsupported_parameters == {"top_k"}
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("written", "cap"),
    [
        ("", 4096),
        ("max_completion_tokens: 100000", 100_000),
        ("max_completion_tokens: null", None),
        ("context_window_tokens: 2048", 2048),
        ("context_window_tokens: 128000", 4096),
        ("defaults: {max_completion_tokens: 9000}", 9000),
        ("defaults: {max_completion_tokens: 100}", 4096),
        ("capabilities: [tools, reasoning]", None),
        ("capabilities: [reasoning], max_completion_tokens: 20000", 20_000),
    ],
)
def test_a_model_that_names_no_cap_has_one(written: str, cap: int | None) -> None:
    (model,) = load_text(UPSTREAM + f"models: {{m: {{upstream: u, {written}}}}}").models
    assert model.max_completion_tokens == cap


def test_a_body_is_read_as_the_json_that_says_the_same() -> None:
    text = """
models:
  m:
    upstream: u
    extra_body:
      skip_special_tokens: false
      nothing: ~
      x: &x {<<: {a: 1}, b: [1.5, "1", on, {"é": 12345678901234567890}]}
      y: *x
"""
    (model,) = load_text(UPSTREAM + text).models
    inner = {"b": [1.5, "1", True, {"é": 12345678901234567890}], "a": 1}
    assert json.loads(model.extra_body) == {
        "skip_special_tokens": False,
        "nothing": None,
        "x": inner,
        "y": inner,
    }


def test_a_proxys_login_is_a_secret_apart_from_its_url() -> None:
    text = UPSTREAM.replace("'http://u/v1'", "'http://u/v1', passthrough: true, proxy_env: P")
    value = "https://us%40er:pass%2Fw@ord:with-colon@proxy.example:3128/"
    config = load_text(text, {**ENVIRON, "P": value})
    (upstream,) = config.upstreams
    assert upstream.proxy == "https://proxy.example:3128"
    assert upstream.proxy_login is not None
    assert upstream.proxy_login.reveal() == "us@er:pass/w@ord:with-colon"
    assert "ord" not in repr(config)
    out = io.StringIO()
    check(Path("t.yaml"), {**ENVIRON, "P": value}, out)
    assert "ord" not in out.getvalue()
    plain = load_text(text, {**ENVIRON, "P": "http://proxy:1"}).upstreams[0]
    assert (plain.proxy, plain.proxy_login) == ("http://proxy:1", None)


def test_a_redis_with_a_password() -> None:
    text = UPSTREAM + "redis:\n  url: rediss://redis:6380/2\n  on_failure: closed\n"
    text += "  username: gate\n  password_env: P\n  certificate_authorities: tls/ca.crt\n"
    make_certificates(Path("tls"))
    config = load_text(text, {**ENVIRON, "P": "pass-of-redis"})
    assert config.redis is not None
    assert config.redis.password is not None
    assert config.redis.password.reveal() == "pass-of-redis"
    assert config.redis.certificate_authorities == "tls/ca.crt"
    assert "pass-of-redis" not in repr(config)


REDIS_URL = "redis://host:port/number, rediss:// for TLS, or unix:/path, without user name"


@pytest.mark.parametrize(
    ("redis", "problem"),
    [
        ("url: 'redis://r'", "2: redis.on_failure: got nothing, expected one of open, closed"),
        ("on_failure: open", f"2: redis.url: got nothing, expected {REDIS_URL}"),
        ("on_failure: maybe, url: 'redis://r'", '2: redis.on_failure: got "maybe", expected'),
        *(
            (f"on_failure: open, url: '{url}'", "2: redis.url: got ")
            for url in (
                "redis://user:pass@r",
                "http://r",
                "redis://",
                "redis://r:0",
                "redis://r:x",
                "redis://r/db",
                "redis://r?db=1",
                "unix:r",
            )
        ),
        (
            "on_failure: open, url: 'redis://r', password_env: NOT_SET",
            "2: redis.password_env: got NOT_SET, which is not set, expected a variable",
        ),
        (
            "on_failure: open, url: 'redis://r', certificate_authorities: ca.crt",
            "2: redis.certificate_authorities: got a file where there is no TLS",
        ),
        (
            "on_failure: open, url: 'rediss://r', certificate_authorities: ca.crt",
            "2: redis.certificate_authorities: got a file that cannot be used (no such file",
        ),
    ],
)
def test_a_redis_that_cannot_be_used(redis: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(UPSTREAM + f"redis: {{{redis}}}")
    (found,) = caught.value.problems
    assert found.startswith(f"t.yaml:{problem}")


def test_what_looks_odd_is_warned_about() -> None:
    config = load_text(
        "upstreams:\n  u:\n    base_url: http://u\n    keys: [{env: K}, {env: K}]\n", ENVIRON
    )
    (key,) = config.upstreams[0].keys
    assert config.warnings == (
        f"t.yaml:4: upstreams.u.keys[1]: {key.id} stands there again; the repetition is dropped",
        "t.yaml:2: upstreams.u: no model and no passthrough leads here",
    )


def test_objects_built_by_hand_have_the_same_defaults() -> None:
    key = Key(id="k", secret=Secret("s"))
    assert key.quota_group == "k"
    assert Key(id="k", secret=Secret("s"), organization="o").quota_group == "o"
    assert Model(name="m", upstream="u").upstream_model == "m"
    upstream = Upstream(name="u", base_url="http://u", keys=(key,))
    assert not Config(upstreams=(upstream,)).needs_simulator
    with pytest.raises(AttributeError):
        upstream.name = "other"  # type: ignore[misc]


DURATION = "a duration such as 30s or 500ms, from 1ms to 24h"
NAME = "a name of 1 to 63 letters, digits, dots, dashes or underscores"
MODEL_NAME = (
    "a model name of 1 to 200 printable characters, in quotes if it looks like a number or a date"
)
URL = "an absolute http or https URL without user name, query or fragment"
ENV = "the name of an environment variable (the key itself never stands here)"
HEADER = "a header name, neither set by the gateway nor for credentials"
TEXT = "text (in quotes if it looks like something else)"
FIELDS = (  # in order
    "listen, tls, callers, limits, timeouts, connections, drain, reflection, log, retries, admin, "
    "status_page, health, metrics, otlp, redis, key_file_interval, upstreams, models"
)
ADMIN = 'host:port of the loopback interface, "[::1]:port" in quotes, unix:/path, or off'
KEY = "a mapping with env or file (the key itself never stands here)"
KEY_TEXT = "up to 4096 visible ASCII characters"
KEY_FILE = "a readable file with one key on each line"

# Name -> (what follows UPSTREAM from line 2 on, the problems without "t.yaml:").
MALFORMED: dict[str, tuple[str, list[str]]] = {
    "unknown key": (
        "limit: {}\nzzz: 1\nlimits: {in_flght: 1}",
        [
            f"2: limit: got an unknown key, expected one of {FIELDS} (did you mean limits?)",
            f"3: zzz: got an unknown key, expected one of {FIELDS}",
            "4: limits.in_flght: got an unknown key, expected one of message_bytes, in_flight, "
            "loop_lag, pending, queue, batch_items_at_once, tokenizer_bytes, "
            "upstream_answer_bytes, upstream_event_bytes (did you mean in_flight?)",
        ],
    ),
    "an admin port that others could reach": (
        "admin: {listen: '0.0.0.0:50052'}\nx-a: 1",
        [f'2: admin.listen: got "0.0.0.0:50052", expected {ADMIN}'],
    ),
    "an admin port on every interface": (
        'admin:\n  listen: "[::]:50052"',
        [f'3: admin.listen: got "[::]:50052", expected {ADMIN}'],
    ),
    "an admin port of another machine": (
        "admin:\n  listen: gateway.example:50052",
        [f'3: admin.listen: got "gateway.example:50052", expected {ADMIN}'],
    ),
    "an admin switch": (
        "admin: {listen: on}\nkey_file_interval: 1",
        [
            f"2: admin.listen: got on, expected {ADMIN}",
            "3: key_file_interval: got 1, expected a duration such as 30s or 500ms, from 10ms to "
            "1h",
        ],
    ),
    "x- only at the top": (
        "x-any: [1, {2: 3}]\nlog: {x-any: 1}",
        ["3: log.x-any: got an unknown key, expected one of format, level"],
    ),
    "duplicate key": (
        "log:\n  level: info\n  level: debug",
        ["4: log.level: got this key again, after line 3, expected it once"],
    ),
    "containers of the wrong kind": (
        "limits: 3\ntimeouts: []\nmodels: [a]\nlog: {level: [info]}\ndrain: !!set {grace}",
        [
            "2: limits: got a single value, expected a mapping",
            "3: timeouts: got a list, expected a mapping",
            "4: models: got a list, expected a list",
            "5: log.level: got a list, expected one of debug, info, warning, error",
            "6: drain: got a mapping with a tag, expected a mapping",
        ],
    ),
    "leaves of the wrong type": (
        'reflection: 1\nlimits: {in_flight: "1", message_bytes: 1.5MiB}\n'
        "retries: {budget: true, max_attempts: 1.0, budget_floor: ~}\nlog: {level: 2024-08-06}",
        [
            "2: reflection: got 1, expected true or false",
            '3: limits.in_flight: got "1", expected a whole number from 1 to 100000',
            '3: limits.message_bytes: got "1.5MiB", expected a size such as 32MiB, from 64KiB '
            "to 256MiB",
            "4: retries.budget: got true, expected a number from 0 to 1",
            "4: retries.max_attempts: got 1.0, expected a whole number from 1 to 20",
            "4: retries.budget_floor: got ~, expected a whole number from 0 to 1000",
            "5: log.level: got 2024-08-06, expected one of debug, info, warning, error",
        ],
    ),
    "out of range": (
        "limits: {message_bytes: 64MiB, in_flight: 0, upstream_event_bytes: 1}\n"
        "retries: {budget: .nan, max_attempts: 99999999999999999999999}\n"
        "timeouts: {total: 25h}\ndrain: {grace: -1s}",
        [
            "2: limits.in_flight: got 0, expected a whole number from 1 to 100000",
            "2: limits.upstream_event_bytes: got 1, expected a size such as 32MiB, from 64KiB to "
            "256MiB",
            "3: retries.budget: got .nan, expected a number from 0 to 1",
            "3: retries.max_attempts: got 99999999999999999999999, expected a whole number from "
            "1 to 20",
            f'4: timeouts.total: got "25h", expected {DURATION}',
            '5: drain.grace: got "-1s", expected a duration such as 30s or 500ms, from 0s to 24h',
        ],
    ),
    "durations need a unit": (
        "timeouts:\n  total: 30\nretries: {backoff: 1s 2s, backoff_cap: 1:30}",
        [
            f"3: timeouts.total: got 30, expected {DURATION}",
            '4: retries.backoff: got "1s 2s", expected a duration such as 30s or 500ms, from 1ms '
            "to 1m",
            "4: retries.backoff_cap: got 1:30, expected a duration such as 30s or 500ms, from 1ms "
            "to 10m",
        ],
    ),
    "backoff above its cap": (
        "retries:\n  backoff: 2s\n  backoff_cap: 1s",
        ["4: retries.backoff_cap: got 1s, expected no less than backoff, 2s"],
    ),
    "a grace that would cut streams within their time": (
        "timeouts: {total: 10m}\nconnections: {max_age_grace: 9m}",
        [
            "3: connections.max_age_grace: got 540s, expected no less than timeouts.total, 600s, "
            "or null"
        ],
    ),
    "listen": (
        "listen: 127.0.0.1:65536",
        [
            '2: listen: got "127.0.0.1:65536", expected host:port, "[::]:port" in quotes, or '
            "unix:/path"
        ],
    ),
    "models": (
        "models:\n  a: {upstream: v}\n  b: {}\n  4: {upstream: u}\n  d: 3\n  e: {upstream: ''}\n"
        "  f: {upstream: u, tokenizer: gpt2, capabilities: [a b], upstream_model: 4.1}",
        [
            '3: models.a.upstream: got "v", expected one of u',
            "4: models.b.upstream: got nothing, expected the name of an upstream",
            f"5: models.4: got 4, expected {MODEL_NAME}",
            "6: models.d: got a single value, expected a mapping",
            '7: models.e.upstream: got "", expected the name of an upstream',
            '8: models.f.tokenizer: got "gpt2", expected one of o200k_base, '
            "o200k_harmony, cl100k_base, p50k_base, qwen",
            f'8: models.f.capabilities[0]: got "a b", expected {NAME}',
            f"8: models.f.upstream_model: got 4.1, expected {MODEL_NAME}",
        ],
    ),
    "names and aliases clash": (
        "models:\n  a: {upstream: u, aliases: [b, c, a]}\n  b:\n    upstream: u\n    aliases:\n"
        "      - 4\n      - c\n      - d\n      - d",
        [
            '3: models.a.aliases[0]: got "b", a name of model "b", expected a name that is used '
            "once",
            '3: models.a.aliases[2]: got "a", a name of model "a", expected a name that is used '
            "once",
            f"7: models.b.aliases[0]: got 4, expected {MODEL_NAME}",
            '8: models.b.aliases[1]: got "c", a name of model "a", expected a name that is used '
            "once",
            '10: models.b.aliases[3]: got "d", a name of model "b", expected a name that is used '
            "once",
        ],
    ),
    "a default beyond the window": (
        "models:\n  a:\n    upstream: u\n    context_window_tokens: 10\n    defaults:\n"
        "      max_completion_tokens: 30",
        [
            "7: models.a.defaults.max_completion_tokens: got 30, expected no more than "
            "context_window_tokens, 10"
        ],
    ),
    "tokens of callers where they would be shown": (
        "callers:\n  a: {tokens: [planted-token]}\n  b: {tokens: [{file: 123456}]}",
        [
            "3: callers.a.tokens[0]: got a value that is not shown, expected a mapping with env or "
            "file (the token itself never stands here)",
            "4: callers.b.tokens[0].file: got a value that is not shown, expected a path",
        ],
    ),
    "token caps": (
        "models:\n  a:\n    upstream: u\n    context_window_tokens: 10\n"
        "    max_completion_tokens: 20\n    defaults:\n      max_completion_tokens: 30",
        [
            "6: models.a.max_completion_tokens: got 20, expected no more than "
            "context_window_tokens, 10",
            "8: models.a.defaults.max_completion_tokens: got 30, expected no more than the "
            "model's max_completion_tokens, 20",
        ],
    ),
    "renamed parameters": (
        "models:\n  a:\n    upstream: u\n    defaults: {min_p: 0.5, top_p: 0.5}\n"
        "    rename_parameters:\n      repetition_penalty: seed\n      top_k: top_k\n"
        "      temprature: top_p\n      verbosity: reasoning_effort\n      min_p: top_p\n"
        "      temperature: top_p\n      presence_penalty: frequency_penalty\n"
        "      frequency_penalty: min_p",
        [
            '7: models.a.rename_parameters.repetition_penalty: got "seed", expected another '
            "parameter that is a number as repetition_penalty is",
            '8: models.a.rename_parameters.top_k: got "top_k", expected another parameter that is '
            "a number as top_k is",
            '9: models.a.rename_parameters.temprature: got "temprature", expected one of '
            f"{', '.join(PARAMETERS)}",
            '10: models.a.rename_parameters.verbosity: got "reasoning_effort", expected another '
            "parameter that is a number as verbosity is",
            '11: models.a.rename_parameters.min_p: got "top_p", which has a default beside that '
            "of min_p, expected one default for both",
            '12: models.a.rename_parameters.temperature: got "top_p", expected a parameter that '
            "is renamed once",
            '13: models.a.rename_parameters.presence_penalty: got "frequency_penalty", expected a '
            "parameter that is renamed once",
            '14: models.a.rename_parameters.frequency_penalty: got "min_p", expected a parameter '
            "that is renamed once",
        ],
    ),
    "extra bodies": (
        "models:\n  a:\n    upstream: u\n    extra_body:\n      model: m\n      stream: true\n"
        "  b: {upstream: u, extra_body: [1]}\n"
        '  c: {upstream: u, extra_body: {a: .nan, b: {c: [!!binary eA==]}, d: "\\ud83d", e: 1}}',
        [
            "6: models.a.extra_body.model: got what the gateway sets, expected other fields",
            "7: models.a.extra_body.stream: got what the gateway sets, expected other fields",
            "8: models.b.extra_body: got a list, expected a mapping",
            "9: models.c.extra_body.a: got .nan, expected a value that JSON has",
            "9: models.c.extra_body.b.c[0]: got eA==, expected a value that JSON has",
            '9: models.c.extra_body.d: got "\\ud83d", expected a value that JSON has',
        ],
    ),
    "defaults": (
        "models:\n  a:\n    upstream: u\n    unsupported_parameters: [top_k, n]\n    defaults:\n"
        "      temperature: 3\n      temprature: 1\n      stop: ['', a, 1]\n      top_k: 5\n"
        "      seed: 9223372036854775808\n      logit_bias: {a: 1, 5: 101}\n      logprobs: 1\n"
        "      topP: 1",
        [
            f'5: models.a.unsupported_parameters[1]: got "n", expected one of '
            f"{', '.join(PARAMETERS)}",
            "7: models.a.defaults.temperature: got 3, expected a number in [0, 2]",
            "8: models.a.defaults.temprature: got an unknown key, expected one of "
            f"{', '.join(PARAMETERS)} (did you mean temperature?)",
            '9: models.a.defaults.stop[0]: got "", expected text that is not empty',
            "9: models.a.defaults.stop[2]: got 1, expected text that is not empty",
            "10: models.a.defaults.top_k: got a default for a parameter that its upstream does "
            "not take, expected none, or other unsupported_parameters",
            "11: models.a.defaults.seed: got 9223372036854775808, expected a whole number from "
            "-9223372036854775808 to 9223372036854775807",
            '12: models.a.defaults.logit_bias.a: got "a", expected a whole number from 0 to '
            "2147483647",
            "12: models.a.defaults.logit_bias.5: got 101, expected a number in [-100, 100]",
            "13: models.a.defaults.logprobs: got 1, expected true or false",
            f"14: models.a.defaults.topP: got an unknown key, expected one of "
            f"{', '.join(PARAMETERS)} (did you mean top_p?)",
        ],
    ),
    "too many stops": (
        f"models: {{a: {{upstream: u, defaults: {{stop: [{', '.join('abcdefghijklmnopq')}]}}}}}}",
        ["2: models.a.defaults.stop: got 17 elements, expected at most 16"],
    ),
    "role templates": (
        "models:\n  a:\n    upstream: u\n    role_templates:\n      - {role: a, fallback_role: b}\n"
        "      - {role: b, fallback_role: a}\n      - {role: c, fallback_role: c}\n"
        "      - {role: c}\n      - {api_role: system}\n      - {role: d, fallback_role: sytem}\n"
        "      - {role: e, begin: 1, beginn: x}\n      - f\n      - {role: g, fallback_role: a}",
        [
            "6: models.a.role_templates[0].fallback_role: got a -> b -> a, expected no circle",
            "7: models.a.role_templates[1].fallback_role: got b -> a -> b, expected no circle",
            "8: models.a.role_templates[2].fallback_role: got c -> c, expected no circle",
            '9: models.a.role_templates[3].role: got "c", expected each role once',
            "10: models.a.role_templates[4].role: got nothing, expected a role as callers write it",
            '11: models.a.role_templates[5].fallback_role: got "sytem", expected one of a, '
            "assistant, b, c, d, developer, e, environment, function, g, system, tool, user "
            "(did you mean system?)",
            f"12: models.a.role_templates[6].begin: got 1, expected {TEXT}",
            "12: models.a.role_templates[6].beginn: got an unknown key, expected one of role, "
            "api_role, begin, end, fallback_role (did you mean begin?)",
            "13: models.a.role_templates[7]: got a single value, expected a mapping",
        ],
    ),
    "merge keys": (
        "log: {<<: 3}\ndrain: {<<: [{grace: 1}, 4]}\nx-a: &a {level: loud}\nlimits: {? [1] : 2}",
        [
            "2: log: got a single value after <<, expected a mapping",
            "3: drain.grace: got 1, expected a duration such as 30s or 500ms, from 0s to 24h",
            "3: drain: got a single value after <<, expected a mapping",
            "5: limits: got a list as a key, expected a name",
        ],
    ),
    "a problem in an anchor stands where the anchor does": (
        "x-a: &a\n  level: loud\nlog: *a\nlimits:\n  <<: {in_flight: 0}",
        [
            '3: log.level: got "loud", expected one of debug, info, warning, error',
            "6: limits.in_flight: got 0, expected a whole number from 1 to 100000",
        ],
    ),
    "values that YAML cannot build": (
        'limits: {in_flight: !!int "", batch_items_at_once: !!int x}\nreflection: !!bool x\n'
        "log: {level: !!binary eA==, format: !!python/name:os.system x}\n"
        f"retries: {{max_attempts: {'9' * 5000}}}",
        [
            "2: limits.in_flight: got , expected a whole number from 1 to 100000",
            "2: limits.batch_items_at_once: got x, expected a whole number from 1 to 256",
            "3: reflection: got x, expected true or false",
            "4: log.level: got eA==, expected one of debug, info, warning, error",
            "4: log.format: got x, expected one of text, json",
            "5: retries.max_attempts: got a text of 5000 characters, expected a whole number from "
            "1 to 20",
        ],
    ),
}

# The same for files without UPSTREAM, from line 1 on.
MALFORMED_UPSTREAMS: dict[str, tuple[str, list[str]]] = {
    "empty": (
        "",
        ["1: upstreams: got nothing, expected at least one, or OPENAI_API_KEY in the environment"],
    ),
    "empty upstreams": (
        "log:\nupstreams:",
        ["2: upstreams: got nothing, expected at least one"],
    ),
    "not a mapping": ("- a", ["1: got a list, expected a mapping"]),
    "missing fields": (
        "upstreams:\n  u: {}\nmodels: {m: {upstream: u}}",
        [
            f"2: upstreams.u.base_url: got nothing, expected {URL}",
            "2: upstreams.u.keys: got nothing, expected a list of keys, each a mapping with env "
            "or file",
        ],
    ),
    "an upstream too broken to read is known all the same": (
        "upstreams:\n  u: 3\nmodels:\n  m: {upstream: u}\n  n: {upstream: v}",
        [
            "2: upstreams.u: got a single value, expected a mapping",
            '5: models.n.upstream: got "v", expected one of u',
        ],
    ),
    "no keys": (
        "upstreams:\n  u:\n    base_url: http://u\n    keys:\n  v:\n    base_url: http://v\n"
        "    keys: []\n  w:\n    base_url: http://w\n    keys: {env: K}",
        [
            "4: upstreams.u.keys: got 0 elements, expected at least 1",
            "7: upstreams.v.keys: got 0 elements, expected at least 1",
            f"10: upstreams.w.keys: got a mapping, expected a list, each {KEY}",
        ],
    ),
    "keys": (
        "upstreams:\n  u:\n    base_url: http://u\n    keys:\n      - {env: NOT_SET}\n"
        "      - {env: EMPTY}\n      - {env: lower}\n      - {env: a-b}\n      - {file: none.txt}\n"
        "      - {file: ./none.txt}\n      - {file: .}\n      - {file: empty.txt}\n"
        '      - {file: latin.txt}\n      - {file: big.txt}\n      - {file: "a\\0b"}\n      - {}\n'
        "      - {env: K, file: keys.txt}\n      - some-inline-key\n      - {weight: 1}\n"
        "      - {env: SPACE}\n      - {env: 5, weight: -1, organization: 'a,b', id: a b}\n"
        "      - {file: ''}\n      - {env: NEWLINE}",
        [
            "5: upstreams.u.keys[0].env: got NOT_SET, which is not set, expected a variable with "
            "a value",
            "6: upstreams.u.keys[1].env: got EMPTY, which is empty, expected a variable with a "
            "value",
            "7: upstreams.u.keys[2].env: got a variable, which is not set, expected a variable "
            "with a value",
            f"8: upstreams.u.keys[3].env: got a value that is not shown, expected {ENV}",
            "9: upstreams.u.keys[4].file: got a path, which is unreadable (No such file or "
            f"directory), expected {KEY_FILE}",
            '10: upstreams.u.keys[5].file: got "./none.txt", which is unreadable (No such file or '
            f"directory), expected {KEY_FILE}",
            "11: upstreams.u.keys[6].file: got a path, which is unreadable (Is a directory), "
            f"expected {KEY_FILE}",
            f"12: upstreams.u.keys[7].file: got a path, which is empty, expected {KEY_FILE}",
            "13: upstreams.u.keys[8].file: got a path, which is unreadable (not UTF-8), expected "
            f"{KEY_FILE}",
            "14: upstreams.u.keys[9].file: got a path, which is unreadable (larger than 1MiB), "
            f"expected {KEY_FILE}",
            "15: upstreams.u.keys[10].file: got a path, which is unreadable (no file can have "
            f"this name), expected {KEY_FILE}",
            "16: upstreams.u.keys[11]: got neither env nor file, expected one of them",
            "17: upstreams.u.keys[12]: got both env and file, expected one of them",
            f"18: upstreams.u.keys[13]: got a single value, expected {KEY}",
            "19: upstreams.u.keys[14]: got neither env nor file, expected one of them",
            "20: upstreams.u.keys[15]: got a key that is too long or has a space or an unprintable "
            f"character (not shown), expected {KEY_TEXT}",
            f"21: upstreams.u.keys[16].env: got a value that is not shown, expected {ENV}",
            "21: upstreams.u.keys[16].weight: got -1, expected a number from 0.01 to 1000",
            "21: upstreams.u.keys[16].organization: got a value that is not shown, expected an "
            "organization: 1 to 200 visible ASCII characters",
            f'21: upstreams.u.keys[16].id: got "a b", expected {NAME}',
            "22: upstreams.u.keys[17].file: got a value that is not shown, expected a path",
            "23: upstreams.u.keys[18]: got a key that is too long or has a space or an unprintable "
            f"character (not shown), expected {KEY_TEXT}",
        ],
    ),
    "key ids clash": (
        "upstreams:\n  u:\n    base_url: http://u\n    keys:\n      - {env: K, id: a}\n"
        "      - {env: EMPTY, id: a}\n      - env: LONG\n        id: a",
        [
            "6: upstreams.u.keys[1].env: got EMPTY, which is empty, expected a variable with a "
            "value",
            '8: upstreams.u.keys[2].id: got "a", expected an id no other key has',
        ],
    ),
    "organizations": (
        "upstreams:\n  u:\n    base_url: http://u\n    keys: [{env: K}]\n"
        "    organizations: [{env: NOT_SET}, {}, '', {env: SPACE}]",
        [
            "5: upstreams.u.organizations[0].env: got NOT_SET, which is not set, expected a "
            "variable with a value",
            f"5: upstreams.u.organizations[1].env: got nothing, expected {ENV}",
            "5: upstreams.u.organizations[2]: got a value that is not shown, expected an "
            "organization: 1 to 200 visible ASCII characters",
            "5: upstreams.u.organizations[3].env: got a value that is not shown, expected an "
            "organization: 1 to 200 visible ASCII characters",
        ],
    ),
    "URLs": (
        "upstreams:\n"
        + "".join(
            f"  u{number}: {{base_url: {json.dumps(url)}, keys: [{{env: K}}]}}\n"
            for number, url in enumerate(
                [
                    "u/v1",
                    "ftp://u",
                    "http://",
                    "http://u?",
                    "http://n:p@u",
                    "http://u#",
                    "http://u:0",
                    "http://u:99999",
                    "http://[u",
                    "http://u/ v",
                    "http://u\n",
                    "HTTP://u",
                ]
            )
        )
        + "  w: {base_url: http://u, keys: [{env: K}], proxy: 'n:p@proxy:1', passthrough: true}",
        [
            f"{line}: upstreams.u{line - 2}.base_url: got {got}, expected {URL}"
            for line, got in enumerate(
                [
                    '"u/v1"',
                    '"ftp://u"',
                    '"http://"',
                    "text that is not shown",
                    "text that is not shown",
                    '"http://u#"',
                    '"http://u:0"',
                    '"http://u:99999"',
                    '"http://[u"',
                    '"http://u/ v"',
                    '"http://u\\n"',
                    '"HTTP://u"',
                ],
                start=2,
            )
        ]
        + [f"14: upstreams.w.proxy: got text that is not shown, expected {URL}"],
    ),
    "proxies": (
        "upstreams:\n"
        + "".join(
            f"  {name}: {{base_url: http://u, keys: [{{env: K}}], {written}}}\n"
            for name, written in {
                "a": "proxy_env: NOT_SET",
                "b": "proxy_env: EMPTY",
                "c": "proxy_env: SPACE",
                "d": "proxy_env: LONG, proxy: 'http://p'",
                "e": "proxy_env: 'http://n:p@proxy:1'",
            }.items()
        )
        + "models: {a: {upstream: a}, b: {upstream: b}, c: {upstream: c}, d: {upstream: d}, "
        "e: {upstream: e}}",
        [
            "2: upstreams.a.proxy_env: got NOT_SET, which is not set, expected a variable with a "
            "value",
            "3: upstreams.b.proxy_env: got EMPTY, which is empty, expected a variable with a value",
            "4: upstreams.c.proxy_env: got a value that is not shown, expected "
            f"{URL}; a user and a password may be in it",
            "5: upstreams.d.proxy_env: got both proxy and proxy_env, expected one of them",
            f"6: upstreams.e.proxy_env: got a value that is not shown, expected {ENV}",
        ],
    ),
    "headers": (
        "upstreams:\n  u:\n    base_url: http://u\n    keys: [{env: K}]\n    headers:\n"
        "      Authorization: a\n      content-length: a\n      X-Api-Key: a\n      'a b': a\n"
        '      X-A: "a\\r\\nb"\n      X-B: 1\n      X-C: ""\n      X-D: [a]\n      X-Ok: a\n'
        "      x-ok: b",
        [
            f'6: upstreams.u.headers.Authorization: got "Authorization", expected {HEADER}',
            f'7: upstreams.u.headers.content-length: got "content-length", expected {HEADER}',
            f'8: upstreams.u.headers.X-Api-Key: got "X-Api-Key", expected {HEADER}',
            f'9: upstreams.u.headers."a b": got "a b", expected {HEADER}',
            *(
                f"{line}: upstreams.u.headers.{name}: got {got}, expected printable ASCII text, "
                "in quotes if it looks like a number"
                for line, name, got in [
                    (10, "X-A", "a value that is not shown"),
                    (11, "X-B", "a value that is not shown"),
                    (12, "X-C", "a value that is not shown"),
                    (13, "X-D", "a list"),
                ]
            ),
            "15: upstreams.u.headers.x-ok: got this header again, expected it once, in any case",
        ],
    ),
    "azure": (
        "upstreams:\n  u: {base_url: https://a.openai.azure.com, keys: [{env: K}], "
        "dialect: azure}\n"
        "  v: {base_url: https://a.openai.azure.com, keys: [{env: K}], dialect: auto}\n"
        "  w: {base_url: https://a.openai.azure.com/openai/v1, keys: [{env: K}], dialect: azure}\n"
        "  x:\n    base_url: http://x\n    keys: [{env: K}]\n    api_version: 2024\n"
        "  y: {base_url: http://y, keys: [{env: K}], api_version: '2024-10-21'}\n"
        "  z: {base_url: http://z, keys: [{env: K}]}\n"
        "models:\n  y: {upstream: y, dialect: azure}\n  z: {upstream: z, dialect: azure}\n"
        "  p: {upstream: z, profile: gpt}",
        [
            *(
                f"{line}: upstreams.{name}: got the dialect azure without a version, expected "
                "api_version, or a base_url that ends in /openai/v1"
                for line, name in ((2, "u"), (3, "v"))
            ),
            "8: upstreams.x.api_version: got 2024, expected a version in quotes "
            'such as "2024-10-21"',
            "10: upstreams.z: got the dialect azure without a version, expected api_version, or a "
            "base_url that ends in /openai/v1",
            f'14: models.p.profile: got "gpt", expected one of {", ".join((AUTO, *PROFILES))}',
        ],
    ),
    "defaults that a profile does not take": (
        "upstreams:\n  u: {base_url: https://api.mistral.ai/v1, keys: [{env: K}]}\n"
        "models:\n  a: {upstream: u, defaults: {logprobs: true}}\n"
        "  b: {upstream: u, profile: compatible, defaults: {logprobs: true}}",
        [
            "4: models.a.defaults.logprobs: got a default for a parameter that its upstream does "
            "not take, expected none, or other unsupported_parameters",
        ],
    ),
    "two pass through, and another dialect": (
        "upstreams:\n  u: {base_url: http://u, keys: [{env: K}], passthrough: true}\n"
        "  v: {base_url: http://u, keys: [{env: K}], passthrough: true, dialect: other}\n"
        "  '-': {base_url: http://u, keys: [{env: K}]}",
        [
            "3: upstreams.v.passthrough: got true, as at u, expected it at one upstream only",
            f'3: upstreams.v.dialect: got "other", expected one of {", ".join((AUTO, *DIALECTS))}',
            f'4: upstreams.-: got "-", expected {NAME}',
        ],
    ),
    "syntax": (
        "a: [",
        ["1: got expected the node content, but found '<stream end>', expected YAML"],
    ),
    "tab": (
        "a:\n\tb: 1",
        ["2: got found character '\\t' that cannot start any token, expected YAML"],
    ),
    "two documents": (
        "a: 1\n---\nb: 1",
        ["2: got but found another document, expected YAML"],
    ),
    "unknown anchor": ("log: *a", ["1: got found undefined alias 'a', expected YAML"]),
    "unprintable": ("a: 1\nb: \x07", ["2: got the unprintable character U+0007, expected YAML"]),
    "escape beyond Unicode": (
        'a: "\\UFFFFFFFF"',
        ["1: got an escape or a version number out of range, expected YAML"],
    ),
    "too deep": (
        "a:\n " + "[" * 5000,
        [f"2: got more than {MAX_DEPTH} levels, expected YAML"],
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_each_mistake_after_a_good_upstream(name: str) -> None:
    text, expected = MALFORMED[name]
    assert problems(UPSTREAM + text) == [f"t.yaml:{problem}" for problem in expected]


@pytest.mark.parametrize("name", MALFORMED_UPSTREAMS)
def test_each_mistake_of_upstreams_and_of_yaml(name: str) -> None:
    text, expected = MALFORMED_UPSTREAMS[name]
    environ = {
        **ENVIRON,
        "EMPTY": " \n",
        "SPACE": "a b",
        "NEWLINE": "a\x0bb",
        "LONG": "c" * 16,
    }
    Path("keys.txt").write_text("from-file")
    Path("empty.txt").write_text("# nothing\n\n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("big.txt").write_bytes(b"a" * (2**20 + 1))
    assert problems(text, environ) == [f"t.yaml:{problem}" for problem in expected]


def write_tokenizer() -> None:
    """A small models/tokenizer.model."""
    Path("models").mkdir()
    with Path("models/tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g"] * 20),
            model_writer=model,
            vocab_size=12,
            hard_vocab_limit=False,
            minloglevel=2,
        )


def test_a_tokenizer_file_is_found_beside_the_configuration_and_read() -> None:
    write_tokenizer()
    Path("etc").mkdir()
    text = UPSTREAM + "models: {m: {upstream: u, tokenizer_file: ../models/tokenizer.model}}"
    Path("etc/t.yaml").write_text(text)
    config = load(Path("etc/t.yaml"), ENVIRON)
    assert config.models[0].tokenizer_file == "etc/../models/tokenizer.model"


@pytest.mark.parametrize(
    ("fields", "path", "got"),
    [
        ("tokenizer_file: ''", "tokenizer_file", '"", expected a path'),
        (
            "tokenizer_file: none.model",
            "tokenizer_file",
            '"none.model", which is unreadable (No such file or directory), expected {model}',
        ),
        (
            "tokenizer_file: .",
            "tokenizer_file",
            '".", which is unreadable (Is a directory), expected {model}',
        ),
        (
            'tokenizer_file: "a\\0b"',
            "tokenizer_file",
            '"a\\u0000b", which is unreadable (no file can have this name), expected {model}',
        ),
        (
            "tokenizer_file: tokenizer.json",
            "tokenizer_file",
            '"tokenizer.json", which is no sentencepiece model, expected {model}',
        ),
        (
            "tokenizer: qwen, tokenizer_file: tokenizer.json",
            "tokenizer_file",
            "both tokenizer and tokenizer_file, expected one of them",
        ),
    ],
)
def test_a_tokenizer_file_that_cannot_count_is_a_problem_of_its_line(
    fields: str, path: str, got: str
) -> None:
    Path("tokenizer.json").write_text('{"version": "1.0"}')
    text = UPSTREAM + f"models:\n  m: {{upstream: u, {fields}}}"
    expected = got.format(model="a sentencepiece model, such as tokenizer.model")
    assert problems(text) == [f"t.yaml:3: models.m.{path}: got {expected}"]


def test_a_file_that_is_not_text() -> None:
    Path("t.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigFileError, match=r"unreadable \(not UTF-8\), expected YAML"):
        load(Path("t.yaml"), {})
    with pytest.raises(ConfigFileError, match=r"unreadable \(Is a directory\)"):
        load(Path(), {})


def test_lone_surrogates_are_problems_that_can_be_printed() -> None:
    text = UPSTREAM + 'models: {m: {upstream: u, defaults: {stop: ["\\ud83d"]}}}'
    (problem,) = problems(text)
    assert problem == (
        't.yaml:2: models.m.defaults.stop[0]: got "\\ud83d", expected text that is not empty'
    )


BOMBS = {
    "billion laughs": "x-0: &a0 {a: 1}\n"
    + "".join(f"x-{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 20))
    + "models: *a19",
    "wide aliases": "x-0: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]\nx-1: &b {aliases: *a}\nmodels:\n"
    + "".join(f"  m{n}: *b\n" for n in range(10_000)),
    "merges into merges": "x-0: &a0 {a0: 1}\n"
    + "".join(
        f"x-{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], a{n}: 1}}\n" for n in range(1, 30)
    )
    + "models: *a29",
    "chain of merges": "x-0: &a0 {a: 1}\n"
    + "".join(f"x-{n}: &a{n} {{<<: *a{n - 1}}}\n" for n in range(1, 3000))
    + "models: *a2999",
    "merged into itself": "models: &a {<<: *a, b: {<<: *a}}",
    "contains itself": "models: &a {b: *a}",
    "list in itself": "upstreams: {u: {base_url: http://u, keys: &a [*a]}}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_expansion_is_bounded(name: str) -> None:
    found = problems(BOMBS[name], {"OPENAI_API_KEY": "k"})
    assert 0 < len(found) <= 50_001


# --- secrets ----------------------------------------------------------------------------


def test_a_secret_shows_in_no_usual_way() -> None:
    secret = Secret("hunter2-hunter2")
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>40}", format(secret, ">30")]
    shown += [f"{[secret]}", repr({"key": secret}), repr(Key(id="k", secret=secret))]
    assert "hunter2" not in "".join(shown)
    assert shown[0] == shown[2] == shown[4] == "Secret(***)"
    assert secret.reveal() == "hunter2-hunter2"
    assert not hasattr(secret, "__dict__")


def test_a_secret_is_compared_by_value() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert hash(Secret("a")) == hash(Secret("a")) != hash("a")
    assert {Secret("ключ"): 1}[Secret("ключ")] == 1
    assert copy.deepcopy(Secret("a")) == copy.copy(Secret("a")) == Secret("a")
    assert not Secret("")


def test_a_secret_is_never_serialised() -> None:
    key = Key(id="k", secret=Secret("hunter2"))
    encoders = [pickle.dumps, msgspec.json.encode, msgspec.msgpack.encode, json.dumps]
    for encode in [*encoders, msgspec.to_builtins]:
        for value in (key, key.secret, Config(upstreams=(_upstream(key),))):
            with pytest.raises(TypeError) as caught:
                encode(value)  # type: ignore[operator]
            text = "".join(traceback.format_exception(caught.value))
            assert "hunter2" not in text


def _upstream(key: Key) -> Upstream:
    return Upstream(name="u", base_url="http://u", keys=(key,))


@pytest.mark.parametrize(
    "text",
    [
        "upstreams: {u: {base_url: http://u, keys: [SECRET]}}",
        "upstreams: {u: {base_url: http://u, keys: SECRET}}",
        "upstreams: {u: {base_url: http://u, keys: {SECRET: SECRET}}}",
        "upstreams: {u: {base_url: http://u, keys: [{env: SECRET}]}}",
        "upstreams: {u: {base_url: http://u, keys: [{file: SECRET}]}}",
        "upstreams: {u: {base_url: http://u, keys: [{key: SECRET}]}}",
        "upstreams: {u: {base_url: http://u, keys: [{env: K, organization: 'SECRET,'}]}}",
        "upstreams: {u: {base_url: http://u, keys: [{env: K}], api_key: SECRET}}",
        "upstreams: {u: {base_url: 'http://a:SECRET@u', keys: [{env: K}]}}",
        "upstreams: {u: {base_url: 'http://u?key=SECRET', keys: [{env: K}]}}",
        "upstreams: {u: {base_url: http://u, keys: [{env: K}], proxy: 'a:SECRET@p:1'}}",
        "upstreams: {u: {base_url: http://u, keys: [{env: K}], headers: {Authorization: SECRET}}}",
        'upstreams: {u: {base_url: http://u, keys: [{env: K}], headers: {X: "SECRET\\n"}}}',
        # The value of a key of this configuration is known, wherever it stands.
        "upstreams: {u: {base_url: http://u, keys: [{env: K}]}}\nlog: {level: SECRET}",
        "upstreams: {u: {base_url: http://u, keys: [{env: K}], headers: {X: SECRET}}}",
        "upstreams: {u: {base_url: http://u, keys: [{env: K, id: SECRET}]}}",
        "upstreams: {SECRET: {base_url: http://u, keys: [{env: K}, {env: K}]}}",
        "models: {SECRET: {upstream: u}}\nupstreams: {u: {base_url: http://u, keys: [{env: K}]}}",
    ],
)
@pytest.mark.parametrize(
    "secret", ["abcdefghijklmnop", "sk-Ab3dEfGhIjKlMnOp", "ab+/" * 60, "a'bcdefghijklmnop"]
)
def test_keys_in_the_wrong_place_are_refused_and_not_shown(text: str, secret: str) -> None:
    found = problems(text.replace("SECRET", secret), {"K": secret})
    assert found
    assert secret[:16] not in "\n".join(found)
    assert secret not in "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "log: {level: SECRET}",
        "SECRET: 1",
        "models: {SECRET: {upstream: SECRET}}",
        "x-a: &a [SECRET]\nx-b: *SECRET",
        "x-a: SECRET",
    ],
)
@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-Ab3_dEfGhIjKlMnOp",
        "gsk_Ab3dEfGhIjKlMnOp",
        "AIza" + "Ab3dEfGhIjKlMnOp" * 2,
        "hf_Ab3dEfGhIjKlMnOp",
    ],
)
def test_what_looks_like_a_key_is_refused_anywhere(text: str, secret: str) -> None:
    found = problems(UPSTREAM + text.replace("SECRET", secret))
    assert secret not in "\n".join(found)


def test_ordinary_names_do_not_look_like_keys() -> None:
    names = ["sk-model", "hf.co/some-model-70b-instruct-2024", "task-runner-gpt-4o-2024-08-06"]
    text = "models:\n" + "".join(f"  {name}: {{upstream: u}}\n" for name in names)
    assert [model.name for model in load_text(UPSTREAM + text).models] == names


# --- anything at all --------------------------------------------------------------------

PLANTED = "sk-planted-0123456789abcdef"
WORDS = [
    *("listen", "limits", "upstreams", "models", "u", "base_url", "keys", "env", "file", "K", "id"),
    *("organizations", "passthrough", "headers", "timeouts", "idle", "role_templates", "role"),
    *("fallback_role", "defaults", "stop", "logit_bias", "aliases", "upstream", "http://u/v1"),
    *("30s", "32MiB", "<<", "x-a", "/", ".", "unsupported_parameters", "top_k", "a\ud800", PLANTED),
]
LEAVES = (
    st.sampled_from(WORDS)
    | st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4) | st.integers(), inner)
    ),
    max_leaves=30,
)


def _load_any(text: str) -> Config | None:
    """Load; None where problems say why not. Nothing shows what was planted."""
    Path("any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    config: Config | None = None
    found: tuple[str, ...] = ()
    try:
        config = load(Path("any.yaml"), {"K": PLANTED, "OPENAI_API_KEY": PLANTED})
    except ConfigError as error:
        found = error.problems
    assert (config is None) == bool(found)
    assert all(re.match(r"any\.yaml(:\d+)?: |environment\.", problem) for problem in found)
    assert PLANTED not in repr(config) + "".join(found)
    assert "".join(found).isprintable()
    return config


ANYTHING = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


VALID: dict[str, Any] = {
    "log": {"format": "text"},
    "limits": {"message_bytes": "1MiB"},
    "timeouts": {"total": "3s"},
    "retries": {"budget": 0.5},
    "upstreams": {
        "u": {
            "base_url": "http://u/v1",
            "keys": [{"env": "K", "id": "k", "organization": "o"}],
            "organizations": ["o"],
            "headers": {"X-A": "b"},
            "passthrough": True,
        }
    },
    "models": {
        "m": {
            "upstream": "u",
            "aliases": ["a"],
            "defaults": {"stop": ["x"], "logit_bias": {"5": 1.5}, "seed": 3},
            "role_templates": [{"role": "r", "fallback_role": "s"}, {"role": "s"}],
            "unsupported_parameters": ["top_k"],
        }
    },
}


def _replace_somewhere(tree: Any, draw: Any) -> Any:
    """The tree with one value, at any depth, replaced by anything."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 4)) == 0:
        return draw(LEAVES | TREES)
    if isinstance(tree, list):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], _replace_somewhere(tree[at], draw), *tree[at + 1 :]]
    name = draw(st.sampled_from(list(tree)))
    return {**tree, name: _replace_somewhere(tree[name], draw)}


@st.composite
def almost_valid(draw: Any) -> Any:
    tree: Any = VALID
    for _ in range(draw(st.integers(1, 3))):
        tree = _replace_somewhere(tree, draw)
    return tree


def test_the_tree_to_start_from_is_valid() -> None:
    assert _load_any(json.dumps(VALID).replace('"5":', "5:")) is not None


@ANYTHING
@given(TREES | almost_valid())
@example({"upstreams": {"u": {"base_url": "http://u", "keys": [{"env": "K"}], PLANTED: PLANTED}}})
@example({"upstreams": {"u": {"base_url": "http://u", "keys": [{"file": PLANTED}]}}})
def test_any_structure_loads_or_says_why(tree: Any) -> None:
    _load_any(json.dumps(tree).replace('"5":', "5:"))  # JSON is YAML
    _load_any(yaml.safe_dump(tree).replace("'5':", "5:"))


@ANYTHING
@given(
    st.lists(
        st.sampled_from(
            [
                *WORDS[:20],
                *":-[]{},&*!|>%@#'\"?~\\\n\t ",
                "\n  ",
                "&a",
                "*a",
                "!!int ",
                "!!float ",
                "!!timestamp ",
                "%YAML 1",
                "<<: ",
                '"\\U',
                "---",
                "9999",
            ]
        ),
        max_size=40,
    )
)
@example(["%YAML 1.", "9" * 5000, "\n---\na: 1"])
@example(["!!float ", '""'])
def test_any_text_loads_or_says_why(parts: list[str]) -> None:
    _load_any("".join(parts))


@ANYTHING
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=20), st.text(max_size=20))
def test_any_environment_loads_or_says_why(keys: str, url: str, orgs: str, listen: str) -> None:
    environ = {"OPENAI_API_KEY": keys, "OPENAI_BASE_URL": url, "OPENAI_ORG_ID": orgs}
    config: Config | None = None
    found: tuple[str, ...] = ()
    try:
        config = load(None, {**environ, "TOKENWIRE_LISTEN": listen})
    except ConfigError as error:
        found = error.problems
    assert (config is None) == bool(found)
    for upstream in config.upstreams if config else ():
        assert upstream.keys
        for key in upstream.keys:
            assert re.fullmatch("[!-~]+", key.secret.reveal())


# --- check ------------------------------------------------------------------------------


def test_check_says_what_would_run() -> None:
    text = """
upstreams:
  u: {base_url: http://u/v1, keys: [{env: K, id: a, organization: o}], passthrough: true}
models:
  fast: {upstream: u, upstream_model: big, aliases: [default]}
"""
    load_text(text)
    out = io.StringIO()
    assert check(Path("t.yaml"), ENVIRON, out) == 0
    assert out.getvalue() == (
        "listen     127.0.0.1:50051\n"
        "admin      127.0.0.1:50052, if that is free\n"
        "upstream   u  http://u/v1  (openai, profile compatible)\n"
        "  key      a  quota group o  weight 1  organization o\n"
        "model      fast -> u big  also default  at most 4096 tokens\n"
        "model      any other name -> u\n"
    )


def test_check_says_that_the_simulator_would_run() -> None:
    out = io.StringIO()
    assert check(None, {"OPENAI_API_KEY": ""}, out) == 0
    assert "serve starts the simulator\n" in out.getvalue()
    assert "warning    environment.OPENAI_API_KEY: is empty, and not used\n" in out.getvalue()


def test_check_counts_problems() -> None:
    Path("t.yaml").write_text(UPSTREAM + "a: 1\nlisten: 1")
    out = io.StringIO()
    assert check(Path("t.yaml"), ENVIRON, out) == 1
    lines = out.getvalue().splitlines()
    assert [line[:10] for line in lines[:2]] == ["t.yaml:2: ", "t.yaml:3: "]
    assert lines[2:] == ["2 problems found, nothing started"]
    out = io.StringIO()
    assert check(Path("none.yaml"), ENVIRON, out) == 2
    assert out.getvalue().endswith("1 problem found, nothing started\n")


# --- callers ------------------------------------------------------------------------------


CALLERS = UPSTREAM + "callers: {a: {tokens: [{env: T}]}}\n"


def test_only_the_digests_of_tokens_are_kept() -> None:
    digest = hashlib.sha256(b"token-two").hexdigest()
    config = load_text(CALLERS, {**ENVIRON, "T": f"token-one, sha256:{digest}"})
    assert config.callers[0].tokens == (Digest.of("token-one"), Digest.of("token-two"))
    assert "token-one" not in repr(config)
    assert digest not in repr(config)


@pytest.mark.parametrize("token", ["few", "with space in it", "x" * 5000, "t\u00f6kentoken"])
def test_what_cannot_be_a_token(token: str) -> None:
    [problem] = problems(CALLERS, {**ENVIRON, "T": token})
    assert problem.startswith("t.yaml:2: callers.a.tokens[0]: got a token that is too short, too")
    assert token not in problem


def test_two_callers_cannot_share_a_token() -> None:
    text = UPSTREAM + "callers: {a: {tokens: [{env: T}]}, b: {tokens: [{env: T}]}}"
    [problem] = problems(text, {**ENVIRON, "T": "token-one"})
    assert "callers.b.tokens: got one that caller a has too" in problem


def test_a_caller_needs_something_to_be_known_by() -> None:
    [problem] = problems(UPSTREAM + "callers: {a: {models: [m]}}")
    assert "callers.a: got neither tokens nor certificates, expected one of them" in problem


@pytest.mark.parametrize("nobody", ["{}", "", "null"])
def test_nobody_named_is_not_everyone(nobody: str) -> None:
    [problem] = problems(UPSTREAM + f"callers: {nobody}")
    assert problem.startswith("t.yaml:2: callers: got nothing, expected at least one")


@pytest.mark.parametrize("none", ["[]", "", "null"])
def test_no_model_named_is_not_every_model(none: str) -> None:
    entry = f"callers: {{a: {{tokens: [{{env: T}}], models: {none}}}}}"
    [problem] = problems(UPSTREAM + entry, {**ENVIRON, "T": "token-one"})
    assert problem.startswith("t.yaml:2: callers.a.models: got nothing, expected at least one")


def test_certificates_of_callers_need_an_authority() -> None:
    [problem] = problems(UPSTREAM + "callers: {a: {certificates: [a.internal]}}")
    assert "expected tls.client_authorities, which vouch for them" in problem


def test_a_variable_of_tokens_that_is_not_set() -> None:
    [problem] = problems(CALLERS)
    assert "callers.a.tokens[0].env: got T, which is not set" in problem


def test_certificates_are_read_relative_to_the_file() -> None:
    make_certificates(Path("tls"))
    tls = "tls: {certificate: tls/tls.crt, key: tls/tls.key, client_authorities: tls/ca.crt}\n"
    config = load_text(UPSTREAM + tls)
    assert config.tls is not None
    assert Path(config.tls.certificate).read_text().startswith("-----BEGIN CERTIFICATE")


def test_certificates_that_cannot_be_used() -> None:
    make_certificates(Path("tls"))
    make_certificates(Path("other"))
    Path("empty").write_text("")
    for certificate, key, authorities, place in (
        ("tls/tls.crt", "none", "tls/ca.crt", "tls: got files that cannot be used"),
        ("tls/tls.crt", "other/tls.key", "tls/ca.crt", "tls: got files that cannot be used"),
        ("tls/tls.crt", "tls/tls.key", "empty", "tls.client_authorities: got a file that cannot"),
    ):
        text = f"certificate: {certificate}, key: {key}, client_authorities: {authorities}"
        [problem] = problems(UPSTREAM + f"tls: {{{text}}}\n")
        assert place in problem


# --- what changes while it runs -----------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("127.1.2.3:50052", "127.1.2.3:50052"),
        ("localhost:50052", "localhost:50052"),
        ("'[::1]:50052'", "[::1]:50052"),
        ("unix:/run/admin.sock", "unix:/run/admin.sock"),
        ("off", "off"),
        ("'off'", "off"),
        ("~", None),
    ],
)
def test_the_admin_port_is_for_this_machine(written: str, meant: str | None) -> None:
    assert load_text(f"{UPSTREAM}admin: {{listen: {written}}}").admin.listen == meant


def test_the_entries_of_keys_are_kept_for_when_their_files_change() -> None:
    Path("keys.txt").write_text("a\nb\na\n")
    config = load_text(
        "upstreams: {u: {base_url: http://u, passthrough: true, "
        "keys: [{env: K}, {file: keys.txt, id: f}]}}"
    )
    entries = config.upstreams[0].key_entries
    assert [entry.path for entry in entries] == [None, Path("keys.txt")]
    assert [secret.reveal() for secret in entries[1].secrets] == ["a", "b", "a"]
    assert [key.id for key in config.upstreams[0].keys][1:] == ["f-1", "f-2"]


# --- documents --------------------------------------------------------------------------


def _file_paths(shape: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, bool, Any]]:
    """Every field that can be written: path, type, whether required, default."""
    defaults = {f.name: f for f in msgspec.structs.fields(shape)}
    for name, field in file_fields(shape).items():
        path, want = f"{prefix}{name}", unwrap(field.type)
        yield path, field.type, field.required, defaults[name].default
        element = unwrap(want.args[0]) if want.origin is tuple else None
        if isinstance(want.origin, type) and issubclass(want.origin, msgspec.Struct):
            yield from _file_paths(want.origin, f"{path}.")
        elif element and "source" in element.extra:
            yield from _file_paths(element.extra["source"], f"{path}[].")
        elif element and issubclass(element.origin, msgspec.Struct):
            yield from _file_paths(element.origin, f"{path}.<name>.")


def _documented() -> dict[str, tuple[str, str]]:
    """Fields in docs/configuration.md: path -> value and default, as its tables have them."""
    rows = re.findall(
        r"^\| `([^`]+)` \| (.*?) \| (.*?) \| .+ \|$",
        (ROOT / "docs/configuration.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len({path for path, *_ in rows}) == len(rows)
    return {path: (value, default) for path, value, default in rows}


def test_the_documentation_has_every_field_and_no_other() -> None:
    assert sorted(_documented()) == sorted(path for path, *_ in _file_paths())


@pytest.mark.parametrize(("path", "hint", "required", "default"), list(_file_paths()))
def test_the_documentation_has_ranges_and_defaults(
    path: str, hint: Any, required: bool, default: Any
) -> None:
    value, shown = _documented()[path]
    want = unwrap(hint)
    assert (shown == "required") == required
    for words in (r"from \S+ to \S+$", r"one of .*$"):
        if stated := re.search(words, want.description):
            assert "GenerationParams" in value or stated[0] in value
    if want.origin not in (tuple, frozenset) and shown.startswith("`") and " " not in shown:
        assert convert(yaml.safe_load(shown.strip("`")), hint) == default
    elif not required and "mapping" not in value:
        assert not default or default is msgspec.NODEFAULT


@pytest.mark.parametrize("path", list(PARAMETERS))
def test_the_contract_has_every_range_of_the_defaults(path: str) -> None:
    """A value just inside each stated range loads; one outside does not."""
    proto = (ROOT / "protos/tokenwire/v1/chat.proto").read_text(encoding="utf-8")
    comment = re.search(rf"((?:  //[^\n]*\n)+)  [\w <>,]*\b{path} = \d+;", proto)
    assert comment
    text = re.sub(r"\s*//\s*", " ", comment[1])
    stated = re.search(r"Range(?: of the bias)?: ([\[(])(-?\d+), (-?\d*)([\])])", text)
    if not stated:
        assert path not in ("temperature", "top_p", "top_k", "min_p", "logit_bias")
        return
    low, high = int(stated[2]), int(stated[3] or 2**31 - 1)
    whole = path not in ("temperature", "top_p", "min_p") and "penalty" not in path
    step = 1 if whole else 0.001

    def accepted(value: float) -> bool:
        written: Any = {7: value} if path == "logit_bias" else value
        text = yaml.safe_dump({"models": {"m": {"upstream": "u", "defaults": {path: written}}}})
        try:
            return load_text(UPSTREAM + text).models[0].defaults.ByteSize() > 0
        except ConfigError:
            return False

    assert accepted(low) == (stated[1] == "[")
    assert accepted(low + step)
    assert not accepted(low - step)
    assert accepted(high)
    if stated[3]:
        assert not accepted(high + step)


EXAMPLE = ROOT / "deploy/tokenwire.example.yaml"
EXAMPLE_ENVIRON = {
    "OPENAI_API_KEY": "a,b",
    "OPENAI_API_KEY_TEAM_A": "c",
    "OPENAI_ORG_ID": "org-x",
    "LOCAL_API_KEY": "none",
    "AZURE_API_KEY": "d",
}


def test_the_example_loads() -> None:
    config = load(EXAMPLE, EXAMPLE_ENVIRON)
    assert config.warnings == ()
    assert [len(upstream.keys) for upstream in config.upstreams] == [3, 1, 1]


def test_the_example_has_every_field() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    # What is commented out holds as well.
    text = text.replace("# - {file:", "- {file:").replace("# tokenizer_file:", "tokenizer_file:")
    text = re.sub(r"^# (tls:|callers:|redis:|  )", r"\1", text, flags=re.MULTILINE)
    write_tokenizer()
    Path("secrets").mkdir()
    Path("secrets/openai-keys").write_text("d\ne\n")
    Path("secrets/search-tokens").write_text("search-token-one\n")
    make_certificates(Path("tls"))
    environ = {**EXAMPLE_ENVIRON, "SEARCH_TOKENS": "search-token-two", "REDIS_PASSWORD": "pass"}
    config = load_text(text, environ)
    assert [(caller.name, len(caller.tokens)) for caller in config.callers] == [("search", 2)]
    assert [key.id for key in config.upstreams[0].keys][-2:] == ["team-b-1", "team-b-2"]

    written: set[str] = set()

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                at = "<name>" if path in ("upstreams", "models", "callers") else name
                walk(inner, f"{path}.{at}" if path else at)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, f"{path}[]")
        written.update((path, path.removesuffix("[]")))

    walk(yaml.safe_load(text), "")
    other = re.sub(r"proxy: http\S+", "", text).replace("# proxy_env:", "proxy_env:")
    proxied = load_text(other, {**environ, "LOCAL_PROXY": "http://proxy:3128"})
    assert proxied.upstreams[1].proxy == "http://proxy:3128"
    walk(yaml.safe_load(other), "")
    assert {path for path, *_ in _file_paths()} <= written


def test_what_the_example_calls_defaults_are_defaults() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    shared = text[: text.index("\nupstreams:")].replace("format: json", "format: ~")
    shared = shared.replace("listen: 127.0.0.1:50052", "listen: ~")
    shared = re.sub(r"listen: 127.0.0.1:(?:50053|50054|9464)", "listen: off", shared)
    shared = shared.replace("endpoint: http://127.0.0.1:4317", "endpoint: ~")
    config = load_text(shared, {"OPENAI_API_KEY": "a"})
    assert config == load(None, {"OPENAI_API_KEY": "a"})
