"""Where a row ends: after one of some sequences of tokens, or where the caller's own function says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from moec.errors import DataError

#: What a caller may say: a token, tokens, sequences of tokens (also mixed), a function of a row's new tokens.
StopLike: TypeAlias = int | Sequence[int | Sequence[int]] | Callable[[Sequence[int]], bool] | None

NEEDED = "a token, tokens, sequences of tokens, or a function of a row's new tokens"


@dataclass(frozen=True)
class Stop:
    """A row ends once its new tokens end with one of `sequences`, or `when(new tokens)` is true.

    The tokens that end a row belong to it. Those of the prompt take no part.
    """

    sequences: tuple[tuple[int, ...], ...] = ()
    when: Callable[[Sequence[int]], bool] | None = None

    @classmethod
    def of(cls, given: StopLike | Stop, vocabulary: int) -> Stop:
        """What `given` means; `[5, 6]` are two tokens, `[[5, 6]]` is one sequence of two.

        Raises `DataError` for anything else, an empty sequence, and tokens outside of the vocabulary.
        """
        if given is None or isinstance(given, Stop):
            return given or cls()
        if callable(given):
            return cls(when=given)
        listed = [given] if isinstance(given, int) else given
        if isinstance(listed, str | bytes) or not isinstance(listed, Sequence):
            raise DataError("generate", f"stop {given!r}", NEEDED)
        return cls(tuple(_sequence(entry, vocabulary) for entry in listed))

    def reached(self, new: Sequence[int]) -> bool:
        """Whether a row with these new tokens, at least one, has ended."""
        for ending in self.sequences:
            if new[-1] == ending[-1] and tuple(new[-len(ending) :]) == ending:
                return True
        return self.when is not None and bool(self.when(new))


def _sequence(entry: Any, vocabulary: int) -> tuple[int, ...]:
    tokens = (entry,) if isinstance(entry, int) else entry
    wrong = isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence)
    if wrong or not tokens or not all(type(token) is int for token in tokens):
        raise DataError("generate", f"stop {entry!r}", NEEDED)
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise DataError("generate", f"stop token {token}", f"a token from 0 to {vocabulary - 1}")
    return tuple(tokens)
