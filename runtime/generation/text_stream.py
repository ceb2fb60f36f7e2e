"""Text from tokens that come one at a time: what is told is told for good.

A character may take several tokens, and how a token reads may depend on those before it. So text is held back
until it is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class TextStream(Protocol):
    """The text behind a prompt, as its tokens come."""

    def push(self, token: int) -> str:
        """What the token completes; may be nothing."""
        ...

    def rest(self) -> str:
        """What was held back, at the end: characters that stayed incomplete are shown as �."""
        ...


class ByteStream:
    """Tokens that are bytes of UTF-8. `read`: the bytes of a token."""

    def __init__(self, read: Callable[[Sequence[int]], bytes]) -> None:
        self._read = read
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that are complete with this byte."""
        return self._decoder.decode(self._read([token]))

    def rest(self) -> str:
        """� when bytes are left over."""
        return self._decoder.decode(b"", final=True)


class TokenizerStream:
    """Tokens of a `tokenizers` tokenizer behind those of a prompt; special ones have no text."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._tokens = list(prompt)
        self._told = len(tokenizer.decode(self._tokens))
        self._stream = DecodeStream(ids=self._tokens, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """What the library's own stream lets go."""
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._told += len(text)
        return text

    def rest(self) -> str:
        """The end of the whole text."""
        return str(self._tokenizer.decode(self._tokens))[self._told :]
