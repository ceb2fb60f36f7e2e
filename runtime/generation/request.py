"""What is asked of `generate`: read and checked as a whole, before any work begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

from moec.errors import DataError
from moec.runtime.generation.batch import require_room
from moec.runtime.generation.prompts import Prompts, PromptsLike
from moec.runtime.generation.sampling import Sampling
from moec.runtime.generation.stops import Stop, StopLike


class Options(TypedDict, total=False):
    """What may be said about a generation.

    `mask`: bool or 0-1 `[B, S]`, which tokens of a tensor are not padding (left or right). `temperature`,
    `top_k`, `top_p`, `repetition_penalty`, `seed`: see `Sampling`; left out, the likeliest token is taken.
    Row i draws from a stream told by the seed and i alone, whoever shares the batch. `stop`: a token, tokens,
    sequences of tokens, or a function of a row's new tokens; what ends a row belongs to it. `pad`: fills rows
    that end early, where a tensor comes out; left out, the first token of the first stop, or 0. `rows`: so
    many rows at a time, the others wait; left out, all. `chunk`: prompts are read so many positions at a
    time. `keep`: a row that is full goes on from its last `keep` tokens, instead of being refused.
    """

    mask: Tensor | None
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int
    stop: StopLike | Stop
    pad: int | None
    rows: int | None
    chunk: int | None
    keep: int | None


@dataclass(frozen=True)
class Request:
    """`length`: the positions that the longest row needs. `rows`: how many are written at a time."""

    prompts: Prompts
    max_new_tokens: int
    sampling: Sampling
    stop: Stop
    pad: int
    rows: int
    length: int
    chunk: int | None
    keep: int | None

    @classmethod
    def of(
        cls,
        tokens: PromptsLike,
        max_new_tokens: int,
        *,
        vocabulary: int,
        max_positions: int | None,
        mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: StopLike | Stop = None,
        pad: int | None = None,
        rows: int | None = None,
        chunk: int | None = None,
        keep: int | None = None,
        least: int = 1,
    ) -> Request:
        """Read a request to a program of `vocabulary` tokens and `max_positions` positions (None: no limit).

        `least`: how many prompts there must be; the other keywords are those of `Options`. Raises `DataError`
        for whatever cannot be done, naming the row.
        """
        counts = {"max_new_tokens": max_new_tokens, "rows": rows, "chunk": chunk, "keep": keep}
        for name, value in counts.items():
            _require_count(name, value)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        ending = Stop.of(stop, vocabulary)
        prompts = Prompts.of(tokens, mask, vocabulary, least)
        length = _length(prompts, max_new_tokens, max_positions, keep)
        filler = _pad(pad, ending, vocabulary)
        together = len(prompts.rows) if rows is None else min(rows, len(prompts.rows))
        return cls(prompts, max_new_tokens, sampling, ending, filler, together, length, chunk, keep)


def _require_count(name: str, value: int | None) -> None:
    optional = name != "max_new_tokens"
    if (value is None and optional) or (type(value) is int and value >= 1):
        return
    raise DataError("generate", f"{name} {value!r}", "a whole number, 1 or more")


def _length(prompts: Prompts, new: int, limit: int | None, keep: int | None) -> int:
    needed = prompts.longest + new
    if limit is None:
        return needed
    for number, row in enumerate(prompts.rows):
        require_room(len(row), new, limit, keep, f"generate, prompt {number}")
    if keep is not None and keep > limit:
        raise DataError("generate", f"keep {keep}", f"at most {limit} positions, the model's limit")
    return min(needed, limit)


def _pad(pad: int | None, stop: Stop, vocabulary: int) -> int:
    if pad is None:
        return stop.sequences[0][0] if stop.sequences else 0
    if type(pad) is not int:
        raise DataError("generate", f"pad {pad!r}", "a token")
    return pad  # it is never read, so it may lie outside of the vocabulary: -1, -100
