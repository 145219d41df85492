"""One YAML file and the environment, read once into a frozen `Config`.

Nothing else in the gateway reads the environment; files of keys are read again by `keyfiles`.
What can be configured is in `settings`; here it is loaded, and checked where one field alone
cannot tell.
"""

import itertools
import json
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote

import msgspec
from google.protobuf.descriptor import FieldDescriptor
from msgspec import UNSET

from tokenwire.v1.chat_pb2 import GenerationParams
from tokenwire_service import textfile
from tokenwire_service.keyset import A_KEY, NOT_A_KEY, Naming, are_keys, file_texts, split
from tokenwire_service.providers import PROFILES
from tokenwire_service.secret import Digest, Secret
from tokenwire_service.settings import (
    ADMIN_OFF,
    DEFAULT_ADMIN,
    DEFAULT_CAP,
    OPENAI_BASE_URL,
    TYPED_ONLY,
    Admin,
    Caller,
    Config,
    Drain,
    Key,
    KeyEntry,
    KeySource,
    Limits,
    Listen,
    Log,
    Model,
    Organization,
    OrganizationSource,
    Redis,
    Retries,
    Timeouts,
    Tls,
    TokenSource,
    Upstream,
    UpstreamTimeouts,
    Url,
    dialect_of,
    profile_of,
)
from tokenwire_service.textfile import UnreadableError
from tokenwire_service.typed_yaml import Place, Reader, convert, did_you_mean, quoted
from tokenwire_service.validation import KNOWN_ROLES

__all__ = [
    "Admin",
    "Caller",
    "Config",
    "ConfigError",
    "ConfigFileError",
    "Drain",
    "Key",
    "KeyEntry",
    "Limits",
    "Log",
    "Model",
    "Redis",
    "Retries",
    "Secret",
    "Timeouts",
    "Tls",
    "Upstream",
    "UpstreamTimeouts",
    "check",
    "file_of",
    "load",
]

# Shapes of API keys in use: OpenAI and those who copy it, xAI, Groq, Hugging Face, Google, ...
_LOOKS_LIKE_KEY = re.compile(
    r"\b(?:sk|rk|gsk|xai|pplx|nvapi|csk|hf|r8|fw)[-_](?=[\w-]*\d)[\w-]{12,}|\bAIza[\w-]{30,}"
)
_REAL_KEY_LENGTH = 16  # shorter ones are placeholders such as "dummy", and may be plain words


class ConfigError(Exception):
    """The configuration cannot be used. `problems`: one line each, in the order of the file.

    No problem holds a secret. The text of the exception is all problems, one per line.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class ConfigFileError(ConfigError):
    """The configuration file itself cannot be read."""


def load(path: Path | None, environ: Mapping[str, str], *, listen: str | None = None) -> Config:
    """Read the configuration: the file, else what `TOKENWIRE_CONFIG` names, else the environment.

    `listen` is the command line's address; it wins over `TOKENWIRE_LISTEN`, which wins over
    the file. Raises ConfigError with every problem, ConfigFileError if there is no file to
    read. Touches nothing but the file and the files of keys that it names.
    """
    return _Loading(file_of(path, environ), environ).run(listen)


def file_of(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The configuration file: `path`, else what `TOKENWIRE_CONFIG` names; None for none."""
    if path is None and environ.get("TOKENWIRE_CONFIG"):
        return Path(environ["TOKENWIRE_CONFIG"])
    return path


def check(path: Path | None, environ: Mapping[str, str], out: TextIO) -> int:
    """Say what would run, or every problem. Returns 0, 1 for problems, 2 without a file."""
    try:
        config = load(path, environ)
    except ConfigError as error:
        count = len(error.problems)
        summary = f"{count} problem{'s' if count > 1 else ''} found, nothing started"
        out.write("\n".join((*error.problems, summary, "")))
        return 2 if isinstance(error, ConfigFileError) else 1
    out.write("\n".join((*_summary(config), "")))
    return 0


class _Loading:
    """One run of `load`."""

    def __init__(self, path: Path | None, environ: Mapping[str, str]) -> None:
        self._path = path
        self._environ = environ
        self._warnings: list[str] = []
        self._token_files: dict[str, None] = {}  # in the order of the file
        self._entries: dict[Place, list[KeyEntry]] = {}  # by upstream
        self._naming: dict[Place, Naming] = {}
        self._reader = Reader(str(path), expand=self._expand, secret_text=_LOOKS_LIKE_KEY)
        self._reader.positions |= {("environment",): (0, 0), ("--listen",): (0, 0)}

    def run(self, listen: str | None) -> Config:
        config = self._read_file() if self._path else Config()
        upstreams = config.upstreams
        if ("upstreams",) not in self._reader.positions:
            upstreams = self._environment_upstream()
            if self._path and not upstreams and not self._reader.problems:
                expected = "at least one, or OPENAI_API_KEY in the environment"
                self._reader.problem(("upstreams",), "nothing", expected)
        elif not upstreams and not self._reader.problems:
            self._reader.problem(("upstreams",), "nothing", "at least one")
        config = msgspec.structs.replace(
            config,
            listen=self._listen(listen, config.listen),
            tls=self._absolute(config.tls),
            redis=self._with_password(config.redis),
            upstreams=tuple(self._with_proxy(self._with_entries(each)) for each in upstreams),
        )
        config = msgspec.structs.replace(config, models=tuple(self._models(config)))
        self._check_whole(config)
        config = msgspec.structs.replace(
            config, warnings=tuple(self._warnings), token_files=tuple(self._token_files)
        )
        self._raise_problems(config)
        return config

    def _read_file(self) -> Config:
        assert self._path is not None
        try:
            text = _read_text(self._path)
        except UnreadableError as error:
            raise ConfigFileError(
                [_printable(f"{self._path}: got a file that is {error}, expected YAML")]
            ) from None
        config = self._reader.read(text, Config)
        if config is UNSET:
            self._raise_problems(Config())
        assert isinstance(config, Config)
        return config

    def _raise_problems(self, config: Config) -> None:
        """Raise what was found; last of all, that a key stands where it would be shown."""
        entries = itertools.chain.from_iterable(self._entries.values())
        secrets = {secret.reveal() for entry in entries for secret in entry.secrets}
        secrets = {text for text in secrets if len(text) >= _REAL_KEY_LENGTH}
        # Also as problems and repr spell them.
        secrets |= {form(text)[1:-1] for text in secrets for form in (json.dumps, repr)}
        shown = repr(config)
        if any(text in shown for text in secrets):
            place: Place = () if self._path else ("environment",)
            self._reader.problem(place, "a key outside its variable or file", "it nowhere else")
        if self._reader.problems:
            problems = []
            for _, _, problem in sorted(self._reader.problems):
                for text in secrets:
                    problem = problem.replace(text, "***")
                problems.append(_printable(problem))
            raise ConfigError(problems)

    # --- environment ----------------------------------------------------------------

    def _variable(self, name: str) -> str:
        return self._environ.get(name, "").strip()

    def _convert(self, place: Place, value: str, hint: Any, default: str) -> str:
        try:
            return str(convert(value, hint))
        except ValueError as error:
            self._reader.problem(place, quoted(value), str(error))
            return default

    def _listen(self, argument: str | None, configured: str) -> str:
        if argument is not None:
            return self._convert(("--listen",), argument, Listen, configured)
        if value := self._variable("TOKENWIRE_LISTEN"):
            place = ("environment", "TOKENWIRE_LISTEN")
            return self._convert(place, value, Listen, configured)
        return configured

    def _environment_upstream(self) -> tuple[Upstream, ...]:
        """Return the upstream that OPENAI_API_KEY stands for, or nothing without it."""
        if not any(split(self._variable("OPENAI_API_KEY"))):
            for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID"):
                why = "is empty" if name == "OPENAI_API_KEY" else "is set without OPENAI_API_KEY"
                if name in self._environ:
                    self._warn(("environment", name), f"{why}, and not used")
            return ()
        place_of_keys = ("environment", "OPENAI_API_KEY")
        texts = self._environment_texts("OPENAI_API_KEY", place_of_keys)
        base_url = self._variable("OPENAI_BASE_URL") or OPENAI_BASE_URL
        place_of_url = ("environment", "OPENAI_BASE_URL")
        organizations: list[str] = []
        if self._variable("OPENAI_ORG_ID"):
            organizations = self._organizations("OPENAI_ORG_ID", ("environment", "OPENAI_ORG_ID"))
        return (
            Upstream(
                name="openai",
                base_url=self._convert(place_of_url, base_url, Url, OPENAI_BASE_URL),
                keys=tuple(self._keys(KeySource(env="OPENAI_API_KEY"), texts, place_of_keys)),
                organizations=tuple(organizations),
                passthrough=True,
            ),
        )

    # --- secrets --------------------------------------------------------------------

    def _expand(
        self, source: KeySource | OrganizationSource | TokenSource, place: Place
    ) -> list[Any]:
        """Turn an element of `keys`, `organizations` or `tokens` into what it stands for."""
        env, place_of_env = source.env, (*place, "env")
        if isinstance(source, OrganizationSource):
            return self._organizations(env, place_of_env) if env else []
        written = [way for way in ("env", "file") if (*place, way) in self._reader.positions]
        if len(written) != 1:
            got = "both env and file" if written else "neither env nor file"
            self._reader.problem(place, got, "one of them")
            return []
        texts: list[str] = []
        path: Path | None = None
        if env:
            texts = self._environment_texts(env, place_of_env)
        elif source.file:
            assert self._path is not None
            path = self._path.parent / source.file
            texts = self._file_texts(path, source.file, (*place, "file"))
        if isinstance(source, TokenSource):
            self._token_files |= {str(path): None} if path else {}
            return self._tokens(texts, place)
        return self._keys(source, texts, place, path)

    def _tokens(self, texts: list[str], place: Place) -> list[Digest]:
        digests = []
        for text in texts:
            if not re.fullmatch(r"[!-~]{8,4096}", text):
                got = "a token that is too short, too long, or has an unprintable character"
                expected = "8 to 4096 visible ASCII characters"
                self._reader.problem(place, f"{got} (not shown)", expected)
                return []
            hexadecimal = re.fullmatch(r"sha256:([0-9a-fA-F]{64})", text)
            digests.append(
                Digest(bytes.fromhex(hexadecimal[1])) if hexadecimal else Digest.of(text)
            )
        return digests

    def _keys(
        self, source: KeySource, texts: list[str], place: Place, path: Path | None = None
    ) -> list[Key]:
        if not are_keys(texts):
            self._reader.problem(place, NOT_A_KEY, A_KEY)
            return []
        entry = KeyEntry(source=source, path=path, secrets=tuple(map(Secret, texts)))
        self._entries.setdefault(place[:2], []).append(entry)
        named = self._naming.setdefault(place[:2], Naming()).name(entry)
        for key_id in named.repeated:
            self._warn(place, f"{key_id} stands there again; the repetition is dropped")
        for key_id in named.clashes:
            self._reader.problem((*place, "id"), quoted(key_id), "an id no other key has")
        return named.keys

    def _environment_texts(self, name: str, place: Place) -> list[str]:
        texts = list(filter(None, split(self._environ.get(name, ""))))
        if not texts:
            # A name in lower case may be a key in the wrong place.
            shown = name if re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name) else "a variable"
            state = "empty" if name in self._environ else "not set"
            self._reader.problem(place, f"{shown}, which is {state}", "a variable with a value")
        return texts

    def _file_texts(self, path: Path, name: str, place: Place) -> list[str]:
        # Without a slash or dot in front, it may be a key in the wrong place.
        shown = quoted(name) if name.startswith(("/", "./", "../")) else "a path"
        expected = "a readable file with one key on each line"
        try:
            texts = file_texts(_read_text(path))
        except UnreadableError as error:
            self._reader.problem(place, f"{shown}, which is {error}", expected)
            return []
        if not texts:
            self._reader.problem(place, f"{shown}, which is empty", expected)
        return texts

    def _organizations(self, name: str, place: Place) -> list[str]:
        texts = self._environment_texts(name, place)
        try:
            return [convert(text, Organization) for text in texts]
        except ValueError as error:
            self._reader.problem(place, "a value that is not shown", str(error))
            return []

    # --- what fields cannot say alone -------------------------------------------------

    def _absolute(self, tls: Tls | None) -> Tls | None:
        """With paths relative to the file made whole."""
        if tls is None or self._path is None:
            return tls
        folder, authorities = self._path.parent, tls.client_authorities
        return Tls(
            certificate=str(folder / tls.certificate),
            key=str(folder / tls.key),
            client_authorities=str(folder / authorities) if authorities else None,
        )

    def _with_password(self, redis: Redis | None) -> Redis | None:
        """With the password that a variable holds, and paths made whole."""
        if redis is None:
            return None
        authorities, place = redis.certificate_authorities, ("redis",)
        if authorities and isinstance(redis.url, str) and not redis.url.startswith("rediss:"):
            where, expected = (*place, "certificate_authorities"), "none, or a url with rediss://"
            self._reader.problem(where, "a file where there is no TLS", expected)
        elif authorities and self._path is not None:
            authorities = str(self._path.parent / authorities)
            self._check_authorities(authorities, (*place, "certificate_authorities"))
        password = None
        if redis.password_env:
            password = self._variable(redis.password_env)
            if not password:
                state = "empty" if redis.password_env in self._environ else "not set"
                got = f"{redis.password_env}, which is {state}"
                self._reader.problem((*place, "password_env"), got, "a variable with a value")
        return msgspec.structs.replace(
            redis,
            certificate_authorities=authorities,
            password=Secret(password) if password else None,
        )

    def _with_entries(self, upstream: Upstream) -> Upstream:
        entries = self._entries.get(("upstreams", upstream.name), [])
        return msgspec.structs.replace(upstream, key_entries=tuple(entries))

    def _with_proxy(self, upstream: Upstream) -> Upstream:
        """The proxy that a variable names, its user and password apart: an URL is shown."""
        if not upstream.proxy_env:
            return upstream
        place: Place = ("upstreams", upstream.name, "proxy_env")
        if upstream.proxy:
            self._reader.problem(place, "both proxy and proxy_env", "one of them")
            return upstream
        value = self._variable(upstream.proxy_env)
        if not value:
            state = "empty" if upstream.proxy_env in self._environ else "not set"
            got = f"{upstream.proxy_env}, which is {state}"
            self._reader.problem(place, got, "a variable with a value")
            return upstream
        scheme, found, rest = value.partition("://")
        login, at, address = rest.rpartition("@")
        try:
            url = convert(f"{scheme}{found}{address}", Url)
        except ValueError as error:
            expected = f"{error}; a user and a password may be in it"
            self._reader.problem(place, "a value that is not shown", expected)
            return upstream
        secret = Secret(unquote(login)) if at else None
        return msgspec.structs.replace(upstream, proxy=url, proxy_login=secret)

    def _models(self, config: Config) -> Iterator[Model]:
        upstreams = {upstream.name: upstream for upstream in config.upstreams}
        # Also those too broken to read: one mistake, one problem.
        written = {p[1] for p in self._reader.positions if len(p) == 2 and p[0] == "upstreams"}
        known = sorted({*upstreams, *map(str, written)})
        owners = {model.name: model.name for model in config.models}
        for model in config.models:
            place: Place = ("models", model.name)
            if model.upstream and model.upstream not in known:
                hint = did_you_mean(model.upstream, known)
                expected = f"one of {', '.join(known)}{hint}" if known else "a configured upstream"
                self._reader.problem((*place, "upstream"), quoted(model.upstream), expected)
            aliases = self._reader.elements.get((*place, "aliases"), [])
            for alias, where in zip(model.aliases, aliases, strict=True):
                if alias in owners:
                    got = f"{quoted(alias)}, a name of model {quoted(owners[alias])}"
                    self._reader.problem(where, got, "a name that is used once")
                owners.setdefault(alias, model.name)
            self._check_fallbacks(model, place, config)
            model = self._with_cap(model, place)
            self._check_tokens(model, place)
            self._check_renames(model, place)
            for name in sorted(TYPED_ONLY & json.loads(model.extra_body or "{}").keys()):
                where = (*place, "extra_body", name)
                self._reader.problem(where, "what the gateway sets", "other fields")
            self._check_roles(model, (*place, "role_templates"))
            model = self._with_tokenizer_file(model, place)
            if upstream := upstreams.get(model.upstream):
                unsupported = upstream.unsupported_parameters
                if unsupported is None:
                    _, profile = _language(upstream, model)
                    unsupported = PROFILES[profile].unsupported if profile else frozenset()
                unsupported |= model.unsupported_parameters
                for parameter, _ in model.defaults.ListFields():
                    sent_as = model.rename_parameters.get(parameter.name, parameter.name)
                    if sent_as in unsupported:
                        got = "a default for a parameter that its upstream does not take"
                        where = (*place, "defaults", parameter.name)
                        self._reader.problem(where, got, "none, or other unsupported_parameters")
            yield model

    def _check_fallbacks(self, model: Model, place: Place, config: Config) -> None:
        known = sorted(m.name for m in config.models if m.name != model.name)
        places = self._reader.elements.get((*place, "fallbacks"), [])
        for name, where in zip(model.fallbacks, places, strict=True):
            if name not in known:
                hint = did_you_mean(name, known)
                expected = f"another model: {', '.join(known)}{hint}" if known else "none"
                self._reader.problem(where, quoted(name), expected)

    def _with_cap(self, model: Model, place: Place) -> Model:
        """A model that names no cap has the default one; one that says `null` has none."""
        named = (*place, "max_completion_tokens") in self._reader.positions
        if named or "reasoning" in model.capabilities:  # whose thoughts count, too
            return model
        window, default = model.context_window_tokens, model.defaults.max_completion_tokens
        if window and default > window:
            where = (*place, "defaults", "max_completion_tokens")
            expected = f"no more than context_window_tokens, {window}"
            self._reader.problem(where, str(default), expected)
            return model
        cap = max(min(DEFAULT_CAP, window or DEFAULT_CAP), default)
        return msgspec.structs.replace(model, max_completion_tokens=cap)

    def _check_renames(self, model: Model, place: Place) -> None:
        fields = GenerationParams.DESCRIPTOR.fields_by_name
        seen: dict[str, str] = {}
        for source, target in model.rename_parameters.items():
            where = (*place, "rename_parameters", source)
            numbers = (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_INT32)
            same = fields[source].type == fields[target].type
            if source == target or not same or fields[source].type not in numbers:
                expected = f"another parameter that is a number as {source} is"
                self._reader.problem(where, quoted(target), expected)
            elif target in seen or target in model.rename_parameters:
                self._reader.problem(where, quoted(target), "a parameter that is renamed once")
            elif model.defaults.HasField(source) and model.defaults.HasField(target):  # type: ignore[arg-type]  # names of fields
                got = f"{quoted(target)}, which has a default beside that of {source}"
                self._reader.problem(where, got, "one default for both")
            seen[target] = source

    def _check_tokens(self, model: Model, place: Place) -> None:
        window, cap = model.context_window_tokens, model.max_completion_tokens
        default = model.defaults.max_completion_tokens
        if window and cap and cap > window:
            expected = f"no more than context_window_tokens, {window}"
            self._reader.problem((*place, "max_completion_tokens"), str(cap), expected)
        if cap and default > cap:
            expected = f"no more than the model's max_completion_tokens, {cap}"
            where = (*place, "defaults", "max_completion_tokens")
            self._reader.problem(where, str(default), expected)

    def _with_tokenizer_file(self, model: Model, place: Place) -> Model:
        """The model with the file that its tokenizer was read from, as a trial."""
        if model.tokenizer_file is None or self._path is None:
            return model
        if model.tokenizer is not None:
            where = (*place, "tokenizer_file")
            self._reader.problem(where, "both tokenizer and tokenizer_file", "one of them")
            return model
        # Not loaded for every command: tokenizers take a while.
        from tokenwire_service.encodings import EncodingError, load_sentencepiece

        path = self._path.parent / model.tokenizer_file
        try:
            load_sentencepiece(path)
        except EncodingError as error:
            got = f"{quoted(model.tokenizer_file)}, which is {error}"
            expected = "a sentencepiece model, such as tokenizer.model"
            self._reader.problem((*place, "tokenizer_file"), got, expected)
            return model
        return msgspec.structs.replace(model, tokenizer_file=str(path))

    def _check_roles(self, model: Model, place: Place) -> None:
        fallbacks: dict[str, tuple[str, Place]] = {}
        places = self._reader.elements.get(place, [])
        for template, where in zip(model.role_templates, places, strict=True):
            if template.role in fallbacks:
                self._reader.problem((*where, "role"), quoted(template.role), "each role once")
            elif template.role:
                fallbacks[template.role] = (template.fallback_role, where)
        known = sorted({*fallbacks, *KNOWN_ROLES})
        for role, (fallback, where) in fallbacks.items():
            if fallback and fallback not in known:
                expected = f"one of {', '.join(known)}{did_you_mean(fallback, known)}"
                self._reader.problem((*where, "fallback_role"), quoted(fallback), expected)
            chain = {role: None}  # in order
            while fallback in fallbacks and fallback not in chain:
                chain[fallback] = None
                fallback = fallbacks[fallback][0]
            if fallback == role:
                got = " -> ".join([*chain, role])
                self._reader.problem((*where, "fallback_role"), got, "no circle")

    def _check_whole(self, config: Config) -> None:
        if config.retries.backoff_cap < config.retries.backoff:
            expected = f"no less than backoff, {config.retries.backoff:g}s"
            place = ("retries", "backoff_cap")
            self._reader.problem(place, f"{config.retries.backoff_cap:g}s", expected)
        grace, total = config.connections.max_age_grace, config.timeouts.total
        if grace is not None and grace < total:
            place = ("connections", "max_age_grace")
            expected = f"no less than timeouts.total, {total:g}s, or null"
            self._reader.problem(place, f"{grace:g}s", expected)
        through = [upstream for upstream in config.upstreams if upstream.passthrough]
        for upstream in through[1:]:
            got = f"true, as at {through[0].name}"
            expected = "it at one upstream only"
            self._reader.problem(("upstreams", upstream.name, "passthrough"), got, expected)
        for upstream in config.upstreams:
            lower = [name.lower() for name in upstream.headers]
            for index, name in enumerate(upstream.headers):
                if lower.index(name.lower()) < index:
                    where = ("upstreams", upstream.name, "headers", name)
                    self._reader.problem(where, "this header again", "it once, in any case")
        self._check_callers(config)
        if config.tls is not None:
            self._check_tls(config.tls)
        used = {model.upstream for model in config.models} | {u.name for u in through}
        for upstream in config.upstreams:
            self._check_azure(upstream, [m for m in config.models if m.upstream == upstream.name])
            if upstream.name not in used:
                self._warn(("upstreams", upstream.name), "no model and no passthrough leads here")

    def _check_callers(self, config: Config) -> None:
        owners: dict[Digest | str, str] = {}
        # What lost its lines, or was rendered from an empty list, must not let everyone in.
        written = ("callers",) in self._reader.positions
        if written and not config.callers and not self._reader.problems:
            expected = "at least one; without this section everyone is served"
            self._reader.problem(("callers",), "nothing", expected)
        for caller in config.callers:
            place: Place = ("callers", caller.name)
            if not caller.models and (*place, "models") in self._reader.positions:
                expected = "at least one; without this line every model is allowed"
                self._reader.problem((*place, "models"), "nothing", expected)
            written = (*place, "tokens") in self._reader.positions
            if not caller.tokens and not caller.certificates and not written:
                self._reader.problem(place, "neither tokens nor certificates", "one of them")
            if caller.certificates and (config.tls is None or not config.tls.client_authorities):
                expected = "tls.client_authorities, which vouch for them"
                self._reader.problem((*place, "certificates"), "names without it", expected)
            named: tuple[tuple[str, tuple[Digest | str, ...]], ...] = (
                ("tokens", caller.tokens),
                ("certificates", caller.certificates),
            )
            for what, many in named:
                for each in dict.fromkeys(many):
                    if each in owners:
                        got = f"one that caller {owners[each]} has too"
                        self._reader.problem((*place, what), got, "each at one caller only")
                    owners.setdefault(each, caller.name)

    def _check_tls(self, tls: Tls) -> None:
        """That the files are what they should be, as OpenSSL sees it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(tls.certificate, tls.key, password="")
        except (OSError, ValueError) as error:
            got = f"files that cannot be used ({_reason(error)})"
            expected = "a certificate chain and its private key, PEM, without a password"
            self._reader.problem(("tls",), got, expected)
        if tls.client_authorities is None:
            return
        self._check_authorities(tls.client_authorities, ("tls", "client_authorities"))

    def _check_authorities(self, path: str, place: Place) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
        except (OSError, ValueError) as error:
            got = f"a file that cannot be used ({_reason(error)})"
            self._reader.problem(place, got, "certificates, PEM")

    def _check_azure(self, upstream: Upstream, models: list[Model]) -> None:
        if not any(_language(upstream, model)[0] == "azure" for model in (None, *models)):
            return
        if not upstream.base_url.endswith("/openai/v1") and not upstream.api_version:
            expected = "api_version, or a base_url that ends in /openai/v1"
            where = ("upstreams", upstream.name)
            self._reader.problem(where, "the dialect azure without a version", expected)

    def _warn(self, place: Place, text: str) -> None:
        self._warnings.append(f"{self._reader.where(place)}: {text}")


def _reason(error: Exception) -> str:
    """What OpenSSL or the system says, without the path."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
    return str(reason or type(error).__name__).lower().replace("_", " ")


def _read_text(path: Path) -> str:
    return textfile.decoded(textfile.read(path))


def _language(upstream: Upstream, model: Model | None) -> tuple[str, str]:
    """(dialect, profile), both empty where what decides was too broken to read."""
    written: list[object] = [
        upstream.base_url,
        upstream.dialect,
        upstream.profile,
        upstream.api_version,
    ]
    if model is not None:
        written += [model.dialect, model.profile, model.name, model.upstream_model]
    if UNSET in written:
        return "", ""
    name = model.upstream_model if model is not None else ""
    return dialect_of(upstream, model, name), profile_of(upstream, model, name)


def _printable(text: str) -> str:
    """Escape what a terminal obeys or an encoder refuses, lone surrogates included."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _spoken(upstream: Upstream) -> str:
    """What an upstream speaks where its models do not say otherwise, and how that was decided."""
    dialect, profile = _language(upstream, None)
    return f"{dialect}, profile {profile}" if profile else dialect


def _summary(config: Config) -> Iterator[str]:
    yield f"listen     {config.listen}"
    yield f"admin      {config.admin.listen or f'{DEFAULT_ADMIN}, if that is free'}"
    if config.status_page.listen != ADMIN_OFF:
        yield f"page       {config.status_page.listen}"
    if config.health.listen != ADMIN_OFF:
        yield f"health     {config.health.listen}"
    if config.metrics.listen != ADMIN_OFF:
        yield f"metrics    {config.metrics.listen}"
    if config.otlp.endpoint is not None:
        yield f"otlp       {config.otlp.endpoint}"
    if config.needs_simulator:
        yield "upstreams  none: no file, and no OPENAI_API_KEY; serve starts the simulator"
    for upstream in config.upstreams:
        yield f"upstream   {upstream.name}  {upstream.base_url}  ({_spoken(upstream)})"
        for key in upstream.keys:
            organization = f"  organization {key.organization}" if key.organization else ""
            yield (
                f"  key      {key.id}  quota group {key.quota_group}  weight {key.weight:g}"
                f"{organization}"
            )
    for model in config.models:
        also = f"  also {', '.join(model.aliases)}" if model.aliases else ""
        cap = model.max_completion_tokens
        most = f"  at most {cap} tokens" if cap else ""
        yield f"model      {model.name} -> {model.upstream} {model.upstream_model}{also}{most}"
    for upstream in config.upstreams:
        if upstream.passthrough:
            yield f"model      any other name -> {upstream.name}"
    for caller in config.callers:
        models = f"  models {', '.join(caller.models)}" if caller.models else ""
        yield f"caller     {caller.name}{models}"
    for warning in config.warnings:
        yield f"warning    {warning}"
