"""From logits to the next token: the likeliest one, or one drawn from what is left of the distribution.

The order of the processors is Hugging Face's: repetition penalty, temperature, top-k, top-p. The rows of a
batch may each have settings of their own.

B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from moec.errors import DataError

COLDEST = 1e-6  # below it, logits divided by the temperature are no longer finite in fp32
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a row are chosen.

    `temperature`: 0 takes the likeliest token each time; otherwise logits are divided by it. `top_k`: only
    the k likeliest tokens (and those as likely as the last of them). `top_p`: only the likeliest tokens that
    together have this probability (nucleus sampling, https://arxiv.org/abs/1904.09751).
    `repetition_penalty`: logits of tokens that stand in the row already are divided by it where positive,
    multiplied where negative (https://arxiv.org/abs/1909.05858). `seed`: of the draws. Raises `DataError` for
    values that mean nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, _possible, f"0, or a number from {COLDEST} on", float)
        _require("top_k", self.top_k, lambda k: k >= 1, "a whole number, 1 or more", int)
        _require("top_p", self.top_p, lambda p: 0.0 < p <= 1.0, "a number above 0 and at most 1", float)
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, lambda p: p > 0.0, "a number above 0; 1 is none", float)
        _require("seed", self.seed, lambda s: s >= 0, "a whole number, 0 or more", int)
        self._require_draws()

    def _require_draws(self) -> None:
        """Limits on what may be drawn say nothing when nothing is drawn: more likely something was left
        out."""
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.temperature == 0.0:
                found = f"{name} {value} with temperature 0, which takes the likeliest token"
                raise DataError("generate", found, f"a temperature above 0, or no {name}", "temperature 1.0")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and nothing drawn."""
        return self.temperature == 0.0


def _possible(temperature: float) -> bool:
    return temperature == 0.0 or temperature >= COLDEST


def _require(
    name: str, value: Number | None, valid: Callable[[Number], bool], needed: str, kind: type[Number]
) -> None:
    if value is None and name.startswith("top_"):
        return
    kinds = (int, float) if kind is float else (int,)
    known = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if value is None or not known or not valid(value):
        raise DataError("generate", f"{name} {value!r}", needed)


class Draws:
    """The numbers a row draws: a stream of its own, told by the seed and the row's number alone."""

    def __init__(self, seed: int, row: int) -> None:
        self._stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(row,)))

    def next(self) -> float:
        """The next one, in [0, 1)."""
        return float(self._stream.random())


def choose(
    logits_BV: Tensor, sampling: Sequence[Sampling], seen: Sequence[Tensor | None], draws: Sequence[Draws]
) -> list[int]:
    """The next token of each row.

    `seen`: bool `[V]`, the tokens that stand in the row, for rows with a repetition penalty. Numbers are
    drawn on the CPU and used in fp64 where the logits are, so that a seed means the same on every device.
    Raises `DataError` when a row's logits are not numbers.
    """
    scores_BV = penalized(logits_BV, sampling, seen)
    chosen_B = scores_BV.argmax(-1)
    _require_numbers(scores_BV, chosen_B)
    chosen = [int(token) for token in chosen_B.tolist()]
    drawing = [row for row, settings in enumerate(sampling) if not settings.greedy]
    if not drawing:
        return chosen
    left_BV = limited(scores_BV[drawing], [sampling[row] for row in drawing])
    for row, token in zip(drawing, drawn(left_BV, [draws[row].next() for row in drawing]), strict=True):
        chosen[row] = token
    return chosen


def penalized(logits_BV: Tensor, sampling: Sequence[Sampling], seen: Sequence[Tensor | None]) -> Tensor:
    """The logits in fp32 at least, those of seen tokens brought down by each row's repetition penalty."""
    scores_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    rows = [row for row, settings in enumerate(sampling) if settings.repetition_penalty != 1.0]
    if not rows:
        return scores_BV
    some_RV = scores_BV[rows]
    seen_RV = torch.stack([_given(seen[row]) for row in rows])
    penalty_R1 = _column([sampling[row].repetition_penalty for row in rows], scores_BV)
    down_RV = torch.where(some_RV < 0, some_RV * penalty_R1, some_RV / penalty_R1)
    return scores_BV.index_put(
        (torch.tensor(rows, device=scores_BV.device),), some_RV.where(~seen_RV, down_RV)
    )


def _given(seen_V: Tensor | None) -> Tensor:
    assert seen_V is not None, "a row with a repetition penalty keeps what it has seen"
    return seen_V


def limited(scores_BV: Tensor, sampling: Sequence[Sampling]) -> Tensor:
    """Scores after temperature, top-k and top-p; what may not be drawn is -inf."""
    scores_BV = scores_BV / _column([settings.temperature for settings in sampling], scores_BV)
    if any(settings.top_k is not None for settings in sampling):
        scores_BV = _top_k(scores_BV, [settings.top_k for settings in sampling])
    if any(settings.top_p is not None for settings in sampling):
        scores_BV = _top_p(scores_BV, [settings.top_p for settings in sampling])
    return scores_BV


def _top_k(scores_BV: Tensor, top_k: Sequence[int | None]) -> Tensor:
    size = scores_BV.shape[-1]
    kept = [size if k is None else min(k, size) for k in top_k]
    most = max(k for k, asked in zip(kept, top_k, strict=True) if asked is not None)
    best_BK = scores_BV.topk(most).values
    last_B1 = torch.tensor([min(k, most) - 1 for k in kept], device=scores_BV.device)[:, None]
    free_B1 = torch.tensor([k is None for k in top_k], device=scores_BV.device)[:, None]
    least_B1 = best_BK.gather(1, last_B1).masked_fill(free_B1, -math.inf)
    return scores_BV.masked_fill(scores_BV < least_B1, -math.inf)


def _top_p(scores_BV: Tensor, top_p: Sequence[float | None]) -> Tensor:
    sorted_BV, order_BV = scores_BV.sort()
    below_BV = sorted_BV.softmax(-1).cumsum(-1)
    # A row without a limit loses nothing: no probability is below -1.
    rest_B1 = _column([-1.0 if p is None or p == 1.0 else 1.0 - p for p in top_p], scores_BV)
    drop_BV = below_BV <= rest_B1
    drop_BV[:, -1] = False
    return scores_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -math.inf)


def drawn(scores_BV: Tensor, numbers: Sequence[float]) -> list[int]:
    """For each row the token at which the probabilities, summed in the vocabulary's order, pass its number
    in [0, 1)."""
    sums_BV = scores_BV.double().softmax(-1).cumsum(-1)
    at_B1 = torch.tensor(numbers, dtype=torch.float64, device=scores_BV.device)[:, None] * sums_BV[:, -1:]
    # right=True: the first sum *above* the number, which a token of probability 0 never has.
    return [int(token) for token in torch.searchsorted(sums_BV, at_B1, right=True)[:, 0].tolist()]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _require_numbers(scores_BV: Tensor, chosen_B: Tensor) -> None:
    """NaN is the largest of all to `argmax`, so the likeliest token tells of any."""
    best_B = scores_BV.gather(1, chosen_B[:, None])[:, 0]
    if not bool(best_B.isfinite().all()):
        row = int((~best_B.isfinite()).nonzero()[0, 0])
        found = f"logits of which the largest is {float(best_B[row])}, in row {row} of the batch"
        raise DataError("generate", found, "logits that are finite numbers: are the weights?")
