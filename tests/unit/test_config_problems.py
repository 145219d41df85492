"""Configuration: what each mistake says."""

import json
from pathlib import Path

import pytest
from configured import ENVIRON, UPSTREAM, problems, write_tokenizer

from tokenwire_service.config import (
    ConfigFileError,
    load,
)
from tokenwire_service.providers import AUTO, DIALECTS, PROFILES
from tokenwire_service.settings import PARAMETERS
from tokenwire_service.typed_yaml import MAX_DEPTH

pytestmark = pytest.mark.usefixtures("own_folder")


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
    "listen, tls, callers, limits, timeouts, connections, drain, reflection, scheduling, log, "
    "retries, admin, status_page, health, metrics, otlp, redis, key_file_interval, upstreams, "
    "models"
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
