"""Configuration: what loads, and that keys never show."""

import copy
import hashlib
import io
import json
import pickle
import re
import traceback
from pathlib import Path

import msgspec
import pytest
from configured import ENVIRON, UPSTREAM, load_text, make_certificates, problems

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
from tokenwire_service.secret import Digest

pytestmark = pytest.mark.usefixtures("own_folder")


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
