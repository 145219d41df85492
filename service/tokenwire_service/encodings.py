"""The tokenizers there are: each loaded from a file that is checked, each turning text into ids.

Byte-pair encodings come from the rank files in ranks/ and run in tiktoken; sentencepiece models
come from a file that the operator names. Nothing here opens a connection.

**Text is ordinary.** What looks like a special token (`<|endoftext|>`) is counted as the plain
text it is, and a million spaces are a text like any other, though tiktoken's regex gives up on
them: see `BytePairs.chunks`.
"""

from __future__ import annotations

import binascii
import hashlib
import lzma
import re
import types
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sentencepiece
import tiktoken
import tiktoken_ext.openai_public

MAX_SENTENCEPIECE_BYTES = 64 * 2**20  # the largest in use have 5 MiB
CHUNK = 32_768  # characters that go to tiktoken at once, where the text can be cut: milliseconds
_LONG_BLANK = 65_536  # characters of white space from where on tiktoken's regex is spared


class EncodingError(ValueError):
    """A tokenizer that cannot be loaded. Its text says which file is wrong, and how."""


class UnsplittableError(ValueError):
    """The tokenizer gives up on a text."""


class Chunk(NamedTuple):
    """A piece of text whose tokens depend on nothing around it.

    `whole`: it is one word to the encoding, as long as it is; no regex needs to look at it.
    """

    text: str
    whole: bool = False


class Encoding(Protocol):
    """Text into tokens."""

    def chunks(self, text: str) -> Iterator[Chunk]:
        """The text in pieces to be encoded one by one; joined, their ids are those of the text."""

    def encode(self, chunk: Chunk) -> list[int]:
        """The ids of one chunk. Raises UnsplittableError."""

    def pieces(self, ids: list[int]) -> list[bytes]:
        """The bytes that each id stands for."""


# --- byte pairs -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vendored:
    """One rank file, and how its encoding splits text into words before pairs are merged.

    The last two fields say what `pattern` does with white space: whether a punctuation mark
    swallows the line breaks after it, and whether line breaks end a word of white space. (At the
    end of a text cl100k_base has all white space in one word. Its vocabulary joins no line break
    with what follows, so that makes no difference.)
    """

    file: str
    sha256: str  # of the unpacked file
    pattern: str | None = None  # None: tiktoken defines it
    normal_form: bool = False  # whether text is NFC-normalised first
    swallows_breaks: bool = True
    ends_at_breaks: bool = True


# Qwen's own definition, as its publisher's SDK has it. Its special tokens are never encoded here.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = _Vendored("o200k_base", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d")
VENDORED: Mapping[str, _Vendored] = {
    "o200k_base": _O200K,
    "o200k_harmony": _O200K,  # only its special tokens differ
    "cl100k_base": _Vendored(
        "cl100k_base",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    "p50k_base": _Vendored(
        "p50k_base",
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
        swallows_breaks=False,
        ends_at_breaks=False,
    ),
    "qwen": _Vendored(
        "qwen",
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
        pattern=_QWEN,
        normal_form=True,
    ),
}

# A letter or digit, then a blank or a mark that no encoding takes into the same word, nor does
# NFC join it to what is before it.
_CUT = re.compile(r"[^\W_](?=[ \n,.;:!?\"()<>\[\]{}=，。！？；：、])")
# White space as Unicode has it: Python's own notion has four control characters more.
_BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_RUN = re.compile(f"[{_BLANKS}]+")


def file_of(name: str) -> str:
    """What names that share one encoding have in common: the stem of the rank file."""
    return VENDORED[name].file


def load(name: str) -> BytePairs:
    """Builds an encoding from its rank file. Raises EncodingError where that is damaged."""
    vendored = VENDORED[name]
    where = f"ranks/{vendored.file}.tiktoken.xz"
    try:
        packed = resources.files("tokenwire_service").joinpath(where).read_bytes()
        ranks = lzma.decompress(packed)
    except (OSError, lzma.LZMAError):
        ranks = b""
    if hashlib.sha256(ranks).hexdigest() != vendored.sha256:
        raise EncodingError(f"the rank file of {vendored.file} is not the published one")

    def local_ranks(_url: str = "", expected_hash: str | None = None) -> dict[bytes, int]:
        if expected_hash != vendored.sha256:
            raise EncodingError(f"tiktoken expects another rank file for {vendored.file}")
        pairs = (line.split() for line in ranks.splitlines() if line)
        return {binascii.a2b_base64(token): int(rank) for token, rank in pairs}

    if vendored.pattern is not None:
        table = local_ranks(expected_hash=vendored.sha256)
        arguments: dict[str, Any] = {
            "name": vendored.file,
            "pat_str": vendored.pattern,
            "mergeable_ranks": table,
            "special_tokens": {},
        }
    else:
        # tiktoken's own definition (pattern, special tokens), with our reader in place of its
        # downloader: a copy of the function over other globals, so nothing shared is changed.
        definition = getattr(tiktoken_ext.openai_public, vendored.file)
        offline = types.FunctionType(
            definition.__code__, {**definition.__globals__, "load_tiktoken_bpe": local_ranks}
        )
        arguments = offline()
    return BytePairs(tiktoken.Encoding(**arguments), vendored)


class BytePairs:
    """An encoding that tiktoken runs."""

    def __init__(self, encoding: tiktoken.Encoding, vendored: _Vendored) -> None:
        self._encoding = encoding
        self._vendored = vendored

    def chunks(self, text: str) -> Iterator[Chunk]:
        """Cut after words, so that no call is long, and around long runs of white space.

        tiktoken's regex backtracks over white space, and its stack ends before a million blanks.
        What it would make of them is simple, and is done here instead.
        """
        start = 0
        for run_start, run_end in _long_runs(text):
            before = unicodedata.category(text[run_start - 1])[0] if run_start else ""
            if before == "M":
                continue  # a combining mark: whether it ends a word differs; the regex may tell
            middle = run_start
            if before and before not in "LN" and self._vendored.swallows_breaks:
                run = text[run_start:run_end]
                middle += len(run) - len(run.lstrip("\r\n"))
                if middle == run_end:
                    continue  # nothing that the regex would backtrack over
            yield from self._cut(text[start:middle])
            start = middle
            for end in self._words_of(text, middle, run_end, last=run_end == len(text)):
                yield Chunk(self._normal(text[start:end]), whole=True)
                start = end
        yield from self._cut(text[start:])

    def _words_of(self, text: str, start: int, end: int, *, last: bool) -> list[int]:
        """Where the words of white space in a run end. What is left belongs to what follows."""
        if start == end:
            return []
        ends = []
        if self._vendored.ends_at_breaks:
            after = max(text.rfind("\n", start, end), text.rfind("\r", start, end)) + 1
            if after > start:
                ends.append(after)
                start = after
        if last:
            return [*ends, end] if end > start else ends
        return [*ends, end - 1] if end - 1 > start else ends  # the next word takes one blank

    def _cut(self, text: str) -> Iterator[Chunk]:
        start, look = 0, CHUNK
        while look < len(text):
            # A window at a time: the search itself holds the GIL.
            if cut := _CUT.search(text, look, look + CHUNK):
                yield Chunk(self._normal(text[start : cut.end()]))
                start = cut.end()
                look = start
            look += CHUNK
        if start < len(text):
            yield Chunk(self._normal(text[start:]))

    def _normal(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._vendored.normal_form else text

    def encode(self, chunk: Chunk) -> list[int]:
        """The ids of one chunk. Raises UnsplittableError."""
        try:
            if chunk.whole:
                # The one way past the regex that releases the GIL: what is no UTF-8 is one word.
                # No vocabulary joins 0xFF to what follows.
                return self._encoding._encode_bytes(b"\xff" + chunk.text.encode())[1:]
            return self._encoding.encode(chunk.text, disallowed_special=())
        except ValueError:  # tiktoken's regex gives up
            raise UnsplittableError from None
        except BaseException as error:
            # Other versions panic at that: a PanicException is no Exception, and would end the
            # RPC without a status.
            if type(error).__name__ != "PanicException":
                raise
            raise UnsplittableError from None

    def pieces(self, ids: list[int]) -> list[bytes]:
        """The bytes that each id stands for."""
        return self._encoding.decode_tokens_bytes(ids)


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Where the runs of white space begin and end that are too long for tiktoken's regex."""
    end = 0
    for at in range(0, len(text), _LONG_BLANK):  # each of them covers one of these places
        if at < end or text[at] not in _BLANKS:
            continue
        before = text[max(end, at - _LONG_BLANK) : at]
        start = at - len(before) + len(before.rstrip(_BLANKS))
        match = _RUN.match(text, at)
        assert match is not None
        end = match.end()
        if end - start >= _LONG_BLANK:
            yield start, end


# --- sentencepiece ----------------------------------------------------------------------


def load_sentencepiece(path: Path) -> SentencePieces:
    """Reads a sentencepiece model (`tokenizer.model`). Raises EncodingError where it is none."""
    try:
        with path.open("rb") as stream:
            model = stream.read(MAX_SENTENCEPIECE_BYTES + 1)
    except OSError as error:
        raise EncodingError(f"unreadable ({error.strerror})") from None
    except ValueError:
        raise EncodingError("unreadable (no file can have this name)") from None
    if len(model) > MAX_SENTENCEPIECE_BYTES:
        raise EncodingError("larger than 64MiB")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if not model or not processor.LoadFromSerializedProto(model):
            raise RuntimeError
        size = processor.GetPieceSize()
    except RuntimeError:
        raise EncodingError("no sentencepiece model") from None
    if size == 0:
        raise EncodingError("no sentencepiece model")
    return SentencePieces(processor)


class SentencePieces:
    """A sentencepiece model. It normalises text by its own rules."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor

    def chunks(self, text: str) -> Iterator[Chunk]:
        """The text in one piece: what may be cut depends on the model."""
        if text:
            yield Chunk(text)

    def encode(self, chunk: Chunk) -> list[int]:
        """The ids of one chunk, without begin and end marks."""
        ids: list[int] = self._processor.EncodeAsIds(chunk.text)
        return ids

    def pieces(self, ids: list[int]) -> list[bytes]:
        """The bytes that each id stands for; nothing for an unknown one and for marks."""
        return [self._piece(token) for token in ids]

    def _piece(self, token: int) -> bytes:
        processor = self._processor
        if processor.IsByte(token):
            return bytes([int(processor.IdToPiece(token)[3:5], 16)])  # <0x0A>
        if processor.IsUnknown(token) or processor.IsControl(token):
            return b""
        text: str = processor.IdToPiece(token)
        return text.replace("\u2581", " ").encode()
