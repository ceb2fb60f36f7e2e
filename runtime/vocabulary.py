"""From text to tokens and back: bytes, or the vocabulary of a `tokenizer.json`.

A vocabulary reads and writes *bytes*, because that is what files hold; whether those bytes have to be UTF-8
is the vocabulary's own business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moec.errors import DataError
from moec.runtime.generation.text_stream import ByteStream, TextStream, TokenizerStream

#: Special tokens that tokenizers use for "a text ends here", most usual first.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|end|>")


class Vocabulary(Protocol):
    """What turns text into token numbers `0 … size-1` and back."""

    @property
    def name(self) -> str:
        """A short name for messages and checkpoints."""
        ...

    @property
    def digest(self) -> str:
        """Equal for two vocabularies that make the same tokens of a text."""
        ...

    @property
    def size(self) -> int:
        """One more than the largest token number."""
        ...

    @property
    def separator(self) -> int | None:
        """The token put between two texts, or None when the vocabulary has none."""
        ...

    def encode(self, text: bytes, where: str = "text") -> NDArray[Any]:
        """The tokens of `text`, a 1-D integer array; `where` names the text in errors (`DataError`)."""
        ...

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The text of `tokens`."""
        ...

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """The text of tokens that come one at a time, behind those of `prompt`."""
        ...


class ByteVocabulary:
    """The 256 byte values. NUL, which no text holds, separates two texts."""

    name = "bytes"
    digest = "bytes"
    size = 256
    separator: int | None = 0

    def encode(self, text: bytes, where: str = "text") -> NDArray[np.uint8]:
        """u8 `[len(text)]`, a read-only view of `text`."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The bytes themselves; a token above 255 is a `DataError`."""
        values = list(tokens)
        if values and not 0 <= min(values) <= max(values) < self.size:
            raise DataError("decode", f"tokens from {min(values)} to {max(values)}", "bytes: 0 to 255")
        return bytes(values)

    def stream(self, prompt: Sequence[int] = ()) -> ByteStream:
        """UTF-8, character by character; the bytes of a prompt do not matter."""
        return ByteStream(self.decode)


class TokenizerVocabulary:
    """The vocabulary of a `tokenizer.json` (the `tokenizers` library); text has to be UTF-8.

    Raises `DataError` when the file is missing, is not a tokenizer, or the library is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self._tokenizer = _read_tokenizer(Path(path))
        self.digest = _digest(Path(path))
        self.size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        known = (self._tokenizer.token_to_id(text) for text in SEPARATORS)
        self.separator: int | None = next((token for token in known if token is not None), None)

    def encode(self, text: bytes, where: str = "text") -> NDArray[np.int32]:
        """i32 `[number of tokens]`, without the special tokens a tokenizer adds around a text."""
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte {text[error.start]:#04x} at offset {error.start}"
            raise DataError(where, found, "UTF-8 text", "vocabulary 'bytes'") from error
        return np.asarray(self._tokenizer.encode(decoded, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> bytes:
        """The text of `tokens` in UTF-8, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens))).encode()

    def stream(self, prompt: Sequence[int] = ()) -> TokenizerStream:
        """Text as soon as it is complete; how a token reads may depend on the prompt's last ones."""
        return TokenizerStream(self._tokenizer, prompt)


def _digest(path: Path) -> str:
    """SHA-256 of what the file says, however it is laid out and whatever wrote it."""
    said = json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _read_tokenizer(path: Path) -> Any:
    if find_spec("tokenizers") is None:
        raise DataError(
            str(path), "the package `tokenizers` is not installed", "pip install 'moec[tokenizers]'"
        )
    if not path.is_file():
        raise DataError(str(path), "no such file", "a tokenizer.json, or 'bytes'")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for every kind of bad file
        raise DataError(str(path), f"not a tokenizer: {error}", "a tokenizer.json, or 'bytes'") from error


def open_vocabulary(name: str | Path | Vocabulary = "bytes") -> Vocabulary:
    """`"bytes"`, the path of a `tokenizer.json`, or a vocabulary, which is returned as it is."""
    if not isinstance(name, str | Path):
        return name
    return ByteVocabulary() if str(name) == "bytes" else TokenizerVocabulary(name)
