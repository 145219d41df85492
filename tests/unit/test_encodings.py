"""Every tokenizer gives its known ids, needs nothing but its file, and refuses a wrong one."""

from __future__ import annotations

import io
import lzma
import re
import socket
import threading
import time
from pathlib import Path
from typing import NoReturn, get_args

import pytest
import sentencepiece
import tiktoken_ext.openai_public
from configured import write_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenwire_service import encodings
from tokenwire_service import settings as configurable
from tokenwire_service.encodings import BytePairs, Chunk, EncodingError

FILES = ("o200k_base", "cl100k_base", "p50k_base", "qwen")


@pytest.fixture(scope="module")
def loaded() -> dict[str, BytePairs]:
    """Each rank file once."""
    return {name: encodings.load(name) for name in FILES}


def ids_of(encoding: encodings.Encoding, text: str) -> list[int]:
    return [i for chunk in encoding.chunks(text) for i in encoding.encode(chunk)]


# --- ids --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("o200k_base", "hello world", [24912, 2375]),
        ("cl100k_base", "hello world", [15339, 1917]),
        ("p50k_base", "hello world", [31373, 995]),
        ("qwen", "hello world", [14990, 1879]),
        *((name, "", []) for name in FILES),
    ],
)
def test_known_texts_have_their_known_ids(
    loaded: dict[str, BytePairs], name: str, text: str, ids: list[int]
) -> None:
    assert ids_of(loaded[name], text) == ids


def test_qwen_reads_text_in_its_composed_form(loaded: dict[str, BytePairs]) -> None:
    qwen, o200k = loaded["qwen"], loaded["o200k_base"]
    assert ids_of(qwen, "cafe\u0301") == ids_of(qwen, "caf\u00e9")
    assert ids_of(o200k, "cafe\u0301") != ids_of(o200k, "caf\u00e9")
    assert b"".join(qwen.pieces(ids_of(qwen, "cafe\u0301"))) == "caf\u00e9".encode()


def test_every_name_can_be_configured_and_is_loaded_from_its_file() -> None:
    assert set(get_args(configurable.TokenizerName)) == set(encodings.VENDORED)
    assert {encodings.file_of(name) for name in encodings.VENDORED} == set(FILES)
    assert encodings.file_of("o200k_harmony") == "o200k_base"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|im_start|>b", "<|endofprompt|><|call|>"])
def test_the_text_of_a_special_token_is_plain_text(
    loaded: dict[str, BytePairs], name: str, text: str
) -> None:
    ids = ids_of(loaded[name], text)
    assert len(ids) > 3
    assert b"".join(loaded[name].pieces(ids)) == text.encode()


@given(st.text(max_size=60))
@settings(max_examples=60)
def test_the_pieces_are_the_text(loaded: dict[str, BytePairs], text: str) -> None:
    for name in ("o200k_base", "cl100k_base", "p50k_base"):
        assert b"".join(loaded[name].pieces(ids_of(loaded[name], text))) == text.encode()


# --- chunks -----------------------------------------------------------------------------

# What decides where words end, and long runs of white space among it.
PIECES = (
    *("a", "B", "é", "e\u0301", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\u2000", "1", "12345"),
    *(".", "!", ";", "/", "'s", "'LL", "'", "好", "，", "<|endoftext|>", "_", "-", "\u0301", "ß"),
    *("\x1c", "\x85", "\U0001f600", " " * 9, "\n" * 9, " \n" * 5, "x" * 50, "…", "ǅ", "½", '"'),
)


@given(st.lists(st.sampled_from(PIECES), max_size=50).map("".join))
@example("a;" + "\n" * 9 + "/b")
@example(";" + "\n" * 3 + " " * 9 + "\n" * 3 + " " * 9 + "x")
@example("x" + " " * 9)
@example("x\n" + " " * 9)
@example("e\u0301\n    \nx")
@example(" " * 9 + "x")
@settings(max_examples=400, deadline=None)
def test_the_ids_of_the_chunks_are_those_of_the_whole(
    loaded: dict[str, BytePairs], text: str
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(encodings, "CHUNK", 40)
        monkeypatch.setattr(encodings, "_LONG_BLANK", 6)
        for name, encoding in loaded.items():
            whole = encoding.encode(Chunk(encoding._normal(text)))
            assert ids_of(encoding, text) == whole, name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("blank", "around"), [(" ", ("", "")), (" ", ("x;", "/x")), (" \n", ("x", "x"))], ids=repr
)
def test_a_million_blanks_are_a_text_like_any_other(
    loaded: dict[str, BytePairs], name: str, blank: str, around: tuple[str, str]
) -> None:
    before, after = around
    text = before + blank * (1_000_000 // len(blank)) + after
    ids = ids_of(loaded[name], text)
    assert b"".join(loaded[name].pieces(ids)) == text.encode()


@pytest.mark.parametrize("name", FILES)
def test_a_word_of_its_own_counts_as_tiktoken_counts_one_word(
    loaded: dict[str, BytePairs], name: str
) -> None:
    encoding = loaded[name]
    tokens = encoding._encoding._mergeable_ranks
    assert not [token for token in tokens if b"\xff" in token[:-1]]
    if name == "cl100k_base":  # see _Vendored
        blanks = [token for token in tokens if not token.strip(b" \t\r\n\v\f")]
        assert len(blanks) > 100
        assert not [token for token in blanks if re.search(rb"[\r\n][^\r\n]+\Z", token)]
    for blank in (" ", "\n", " \n", "\t\t\u3000"):
        for text in (blank, blank * 7, blank * 300, blank * 5000):
            whole = encoding._encoding._encode_single_piece(text)
            assert encoding.encode(Chunk(text, whole=True)) == whole


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk("words and words " * 100_000),
        Chunk("a" * 300_000),
        Chunk(" " * 600_000, whole=True),
        Chunk("e\u0301" * 150_000),
    ],
    ids=["words", "one word", "blanks", "marks"],
)
def test_the_interpreter_goes_on_while_a_chunk_is_encoded(
    loaded: dict[str, BytePairs], chunk: Chunk
) -> None:
    encoding = threading.Thread(target=loaded["o200k_base"].encode, args=(chunk,))
    turns = 0
    encoding.start()
    while encoding.is_alive():
        turns += 1
        time.sleep(0)
    assert turns > 100, "the GIL was held"


def test_a_text_is_cut_where_it_can_be_and_only_there(loaded: dict[str, BytePairs]) -> None:
    encoding = loaded["o200k_base"]
    sizes = [len(chunk.text) for chunk in encoding.chunks("words and words " * 50_000)]
    assert sum(sizes) == 800_000
    assert max(sizes) < 2 * encodings.CHUNK
    assert len(list(encoding.chunks("a" * 800_000))) == 1
    [*words, last] = encoding.chunks("words " * 10_000 + "a" * 800_000)
    assert len(words) == 1
    assert len(last.text) > 800_000


def test_a_regex_that_gives_up_and_a_panic_are_told_apart_from_defects(
    loaded: dict[str, BytePairs],
) -> None:
    with pytest.raises(encodings.UnsplittableError):
        loaded["o200k_base"].encode(Chunk(" " * 1_000_000))

    class PanicException(BaseException):  # what Rust extensions raise
        pass

    class Failing:
        def encode(self, text: str, disallowed_special: object) -> NoReturn:
            raise error

    failing = BytePairs(Failing(), encodings.VENDORED["qwen"])  # type: ignore[arg-type]
    error: BaseException = PanicException()
    with pytest.raises(encodings.UnsplittableError):
        failing.encode(Chunk("x"))
    error = KeyError()
    with pytest.raises(KeyError):
        failing.encode(Chunk("x"))


# --- rank files -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_no_network_is_needed_and_tiktoken_stays_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # empty: no earlier download helps
    before = tiktoken_ext.openai_public.load_tiktoken_bpe
    assert ids_of(encodings.load(name), "hello world")
    assert tiktoken_ext.openai_public.load_tiktoken_bpe is before
    assert list(tmp_path.iterdir()) == []


def packed(name: str) -> bytes:
    ranks = Path(encodings.__file__).parent / "ranks"
    return (ranks / f"{name}.tiktoken.xz").read_bytes()


@pytest.mark.parametrize("name", ["p50k_base", "qwen"])
@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "exchanged", "no archive", "gone"])
def test_a_rank_file_that_is_not_the_published_one_is_refused(
    name: str, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = packed(name)
    content = {
        "changed": lzma.compress(lzma.decompress(whole).replace(b" 7\n", b" 8\n", 1), preset=0),
        "cut": whole[:-1000],
        "empty": b"",
        "exchanged": packed("cl100k_base"),
        "no archive": b"hello",
    }
    (tmp_path / "ranks").mkdir()
    if damage != "gone":
        (tmp_path / f"ranks/{name}.tiktoken.xz").write_bytes(content[damage])
    monkeypatch.setattr(encodings.resources, "files", lambda _package: tmp_path)
    with pytest.raises(EncodingError, match=f"rank file of {name} is not the published one"):
        encodings.load(name)


def test_a_tiktoken_that_expects_other_ranks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def definition() -> NoReturn:
        load_tiktoken_bpe("https://other", expected_hash="0" * 64)  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError

    monkeypatch.setattr(tiktoken_ext.openai_public, "cl100k_base", definition)
    with pytest.raises(EncodingError, match="tiktoken expects another rank file"):
        encodings.load("cl100k_base")


def test_the_origin_of_every_rank_file_is_told_with_its_checksum() -> None:
    ranks = Path(encodings.__file__).parent / "ranks"
    told = (ranks / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)\.tiktoken\.xz` .* `([0-9a-f]{64})` \|$", told, re.M))
    assert {path.name.split(".")[0] for path in ranks.glob("*.xz")} == set(FILES) == set(rows)
    assert rows == {v.file: v.sha256 for v in encodings.VENDORED.values()}


# --- sentencepiece ----------------------------------------------------------------------


def trained(**options: object) -> bytes:
    """A small model, as an operator's tokenizer.model."""
    model = io.BytesIO()
    sentences = [f"the tokens of sentence {i} are counted, 好 and all" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of it."""
    path = tmp_path_factory.mktemp("models") / "tokenizer.model"
    path.write_bytes(trained())
    return path


def test_a_sentencepiece_model_counts_as_its_library_does(model_file: Path) -> None:
    loaded = encodings.load_sentencepiece(model_file)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in ("the tokens are counted", "好", "\U0001f600?", "", "  two  blanks ", "</s>"):
        ids = ids_of(loaded, text)
        assert ids == library.encode(text)
    assert b"".join(loaded.pieces(ids_of(loaded, "the tokens"))) == b" the tokens"
    # By bytes, because no piece has it.
    assert b"".join(loaded.pieces(ids_of(loaded, "\U0001f600"))) == " \U0001f600".encode()


def test_pieces_without_text_have_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_tokenizer(path)
    loaded = encodings.load_sentencepiece(path)
    assert loaded.pieces([0, 1, 2]) == [b"", b"", b""]  # unknown, begin, end
    assert 0 in ids_of(loaded, "好")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "unreadable \\(No such file"),
        (b"", "no sentencepiece model"),
        (b"hello", "no sentencepiece model"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "no sentencepiece model"),
        ("cut", "no sentencepiece model"),
    ],
    ids=["gone", "empty", "text", "tokenizer.json", "cut"],
)
def test_a_file_that_is_no_model_is_refused(
    content: bytes | str | None, told: str, tmp_path: Path, model_file: Path
) -> None:
    path = tmp_path / "m"
    if content is not None:
        whole = model_file.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(EncodingError, match=told):
        encodings.load_sentencepiece(path)
    with pytest.raises(EncodingError, match="Is a directory"):
        encodings.load_sentencepiece(tmp_path)


def test_a_file_that_is_far_too_large_is_not_read(
    monkeypatch: pytest.MonkeyPatch, model_file: Path
) -> None:
    monkeypatch.setattr(encodings, "MAX_SENTENCEPIECE_BYTES", 1000)
    with pytest.raises(EncodingError, match="larger than"):
        encodings.load_sentencepiece(model_file)
