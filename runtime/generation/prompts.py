"""The prompts of a batch: a tensor, with a mask where it is padded, or a list of ragged ones.

What comes in as a tensor goes out as a tensor, with the new tokens behind it; a list as a list.

B rows, S positions of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from moec.errors import DataError

#: i64 `[B, S]`, or a list of prompts, each a list of integers or an integer tensor `[S]`.
PromptsLike: TypeAlias = Tensor | Sequence[Sequence[int] | Tensor]

NEEDED = "integers [B, S], or a list of prompts, each a list of integers or a tensor [S]"


@dataclass(frozen=True)
class Prompts:
    """`rows`: the tokens of each prompt, padding left out. `given`: what the caller gave."""

    rows: tuple[tuple[int, ...], ...]
    given: PromptsLike

    @classmethod
    def of(cls, given: PromptsLike, mask: Tensor | None, vocabulary: int, least: int = 1) -> Prompts:
        """Read prompts. `mask` `[B, S]`, bool or 0 and 1: which tokens of a tensor are not padding, which may
        stand on the left or on the right. `least`: how many prompts there must be.

        Raises `DataError` for too few prompts, an empty one, tokens outside of the vocabulary, and a mask
        with holes.
        """
        rows = _of_tensor(given, mask) if isinstance(given, Tensor) else _of_list(given, mask)
        if len(rows) < least:
            raise DataError("generate", "no prompt", "one at least")
        for number, row in enumerate(rows):
            _require_tokens(row, number, vocabulary)
        return cls(rows, given)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.rows), default=0)

    def with_new(self, new: Sequence[Sequence[int]], pad: int) -> Tensor | list[Tensor]:
        """The prompts and what was written behind each; shorter rows of a tensor are filled with `pad`."""
        if not isinstance(self.given, Tensor):
            pairs = zip(self.given, self.rows, new, strict=True)
            return [_joined(given, [*prompt, *more]) for given, prompt, more in pairs]
        most = max(map(len, new), default=0)
        filled = [[*more, *[pad] * (most - len(more))] for more in new]
        written = torch.tensor(filled, dtype=self.given.dtype, device=self.given.device)
        return torch.cat([self.given, written.view(len(new), most)], dim=1)


def _joined(given: Sequence[int] | Tensor, tokens: list[int]) -> Tensor:
    if isinstance(given, Tensor):
        return torch.tensor(tokens, dtype=given.dtype, device=given.device)
    return torch.tensor(tokens, dtype=torch.long)


def _of_tensor(tokens: Tensor, mask: Tensor | None) -> tuple[tuple[int, ...], ...]:
    if tokens.dim() != 2 or not _is_integer(tokens):
        nearest = "tokens[None]" if tokens.dim() == 1 else ""
        raise DataError("generate", _described(tokens), NEEDED, nearest)
    if mask is None:
        return tuple(map(tuple, tokens.tolist()))
    if mask.shape != tokens.shape:
        raise DataError("generate", f"a mask {list(mask.shape)}", f"a mask {list(tokens.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        found = f"a mask with values from {float(mask.min())} to {float(mask.max())}"
        raise DataError("generate", found, "true and false, or 1 and 0")
    pairs = zip(tokens.tolist(), mask.bool().tolist(), strict=True)
    return tuple(_unpadded(row, seen, number) for number, (row, seen) in enumerate(pairs))


def _unpadded(tokens: list[int], seen: list[bool], number: int) -> tuple[int, ...]:
    if True not in seen:
        return ()
    first, last = seen.index(True), len(seen) - seen[::-1].index(True)
    if not all(seen[first:last]):
        hole = first + seen[first:last].index(False)
        found = f"a mask with a hole, in row {number} at {hole}"
        raise DataError("generate", found, "padding at the ends alone")
    return tuple(tokens[first:last])


def _of_list(prompts: Sequence[Sequence[int] | Tensor], mask: Tensor | None) -> tuple[tuple[int, ...], ...]:
    if mask is not None:
        raise DataError("generate", "a mask with a list of prompts", "no mask: a list needs no padding")
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise DataError("generate", f"prompts of type {type(prompts).__name__}", NEEDED)
    return tuple(_row(prompt) for prompt in prompts)


def _row(prompt: Sequence[int] | Tensor) -> tuple[int, ...]:
    if isinstance(prompt, Tensor) and prompt.dim() == 1 and _is_integer(prompt):
        return tuple(prompt.tolist())
    if isinstance(prompt, list | tuple) and all(type(token) is int for token in prompt):
        return tuple(prompt)
    if isinstance(prompt, Tensor):
        raise DataError("generate", f"a prompt that is {_described(prompt)}", NEEDED)
    nearest = "[tokens], for one prompt" if isinstance(prompt, int) else ""
    raise DataError("generate", f"a prompt {prompt!r}", NEEDED, nearest)


def _is_integer(tokens: Tensor) -> bool:
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


def _described(tokens: Tensor) -> str:
    return f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"


def _require_tokens(row: tuple[int, ...], number: int, vocabulary: int) -> None:
    if not row:
        raise DataError("generate", f"prompt {number} is empty", "at least one token")
    if min(row) < 0 or max(row) >= vocabulary:
        wrong = next(token for token in row if not 0 <= token < vocabulary)
        raise DataError("generate", f"token {wrong} in prompt {number}", f"tokens from 0 to {vocabulary - 1}")
