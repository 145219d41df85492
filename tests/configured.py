"""What a configuration file with a given text loads to, or what is wrong with it."""

from pathlib import Path

import pytest
import sentencepiece
import trustme

from tokenwire_service.config import Config, ConfigError, load

ENVIRON = {"K": "value-of-k"}
UPSTREAM = "upstreams: {u: {base_url: 'http://u/v1', keys: [{env: K}]}}\n"


def load_text(text: str, environ: dict[str, str] | None = None) -> Config:
    """Loads it as t.yaml in the working directory. Raises ConfigError."""
    Path("t.yaml").write_text(text, encoding="utf-8")
    return load(Path("t.yaml"), ENVIRON if environ is None else environ)


def problems(text: str, environ: dict[str, str] | None = None) -> list[str]:
    """What is wrong with it, problem by problem."""
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


def write_tokenizer(path: Path = Path("models/tokenizer.model")) -> None:
    """A small one of sentencepiece."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g"] * 20),
            model_writer=model,
            vocab_size=12,
            hard_vocab_limit=False,
            minloglevel=2,
        )
