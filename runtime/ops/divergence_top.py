"""How far a student is from a teacher of whom only the likeliest words are known.

divergence_top(logits [N,V_l], words [N,K] i64, log_shares [N,K], num_classes, temperature, reverse, axis)
    -> [N]
    `divergence` between K + 1 shares: those of the K `words` (numbered as in the whole vocabulary, all
    different), and that of all other words together, which is what `log_shares` leave of one. The student's
    share of the rest is summed over the other words, so it is right however small it is. Differentiable in
    `logits` alone. Every rank of `axis` is given all K words, and gets the whole result. Sends five vectors
    of N, and one back.

The teacher's share of the rest is a difference, and less of it than rounding leaves (K + 4 times the epsilon
of `log_shares`) cannot be told from none: it counts as nothing, and with `reverse` as that much. So a student
is never infinitely far for a share that was lost in rounding. Where K is `num_classes` there is no rest.
Zeros, infinities, dtypes: as in `divergence`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.logits import (
    largest,
    log_sums,
    over_ranks,
    own_words,
    require_own_words,
    row_chunks,
    softened,
)
from moec.runtime.ops.registry import define, define_composite, demand, differentiate, wide

_NAME = "divergence_top"


def _check(
    logits: Tensor, words: Tensor, log_shares: Tensor, num_classes: int, temperature: float, axis: str
) -> int:
    """The first word of this rank."""
    first = require_own_words(logits, num_classes, axis, _NAME)
    fits = words.dim() == 2 and words.shape == log_shares.shape and len(words) == len(logits)
    found = f"words {list(words.shape)}, log_shares {list(log_shares.shape)} for {len(logits)} rows"
    demand(fits, _NAME, found, "[N, K] both")
    demand(0 < words.shape[1] <= num_classes, _NAME, f"{words.shape[1]} words", f"1 to {num_classes}")
    demand(temperature > 0, _NAME, f"temperature {temperature}", "a number above 0")
    if words.device.type == "cpu":
        inside = bool(((words >= 0) & (words < num_classes)).all())
        demand(inside, _NAME, "words outside the vocabulary", f"0 up to {num_classes - 1}")
    return first


def _places(words_NK: Tensor, first: int, held: int) -> Tensor:
    """Where words lie among the `held` ones of this rank; one past the last for those of others."""
    places_NK = words_NK.long() - first
    return torch.where((places_NK >= 0) & (places_NK < held), places_NK, held)


def _parted(logits_NV: Tensor, places_NK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logits of the chosen words [N, K], and of all others [N, V_l + 1]; -inf for what is not there."""
    rest = logits_NV.new_full((len(logits_NV), logits_NV.shape[1] + 1), -torch.inf, dtype=dtype)
    rest[:, :-1] = logits_NV
    chosen_NK = rest.gather(1, places_NK)
    return chosen_NK, rest.scatter_(1, places_NK, -torch.inf)


def _totals(
    logits: Tensor, words: Tensor, log_shares: Tensor,
    num_classes: int, temperature: float, reverse: bool, axis: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The divergence [N]; the student's log shares of the words [N, K], -inf for those of other ranks; and
    [2, N]: its log share of the rest, and how much of that is this rank's."""
    first = _check(logits, words, log_shares, num_classes, temperature, axis)
    dtype, held = _dtype(logits, log_shares), logits.shape[1]
    places_NK = _places(words, first, held)
    chosen_NK = logits.new_empty(words.shape, dtype=dtype)
    centre_N, log_N = chosen_NK.new_empty(2, len(words))
    for at in row_chunks(logits):
        chosen_NK[at], rest = _parted(logits[at], places_NK[at], dtype)
        centre_N[at] = largest(rest, dtype)
        log_N[at] = log_sums(softened(rest, temperature, dtype).log_softmax(1))
    log_q_NK, rest_2N = _student(chosen_NK, centre_N, log_N, temperature, axis)
    log_p_NK, log_p_rest_N = log_shares.to(dtype), _teacher_rest(log_shares, num_classes, reverse).to(dtype)
    tops_NK = _terms(log_p_NK, log_q_NK, reverse).masked_fill(places_NK == held, 0.0)
    rows_N = over_ranks(tops_NK.sum(1), axis) + _terms(log_p_rest_N, rest_2N[0], reverse)
    return rows_N, log_q_NK, rest_2N


def _student(
    chosen_NK: Tensor, centre_N: Tensor, log_N: Tensor, temperature: float, axis: str
) -> tuple[Tensor, Tensor]:
    """The student's log shares, of its logits of the words, and of the largest logit and the logarithm of the
    sum of exponentials (relative to that) of the others."""
    here_2N = torch.stack([chosen_NK.amax(1), centre_N])
    centres_2N = over_ranks(here_2N, axis, "max")
    top_N = centres_2N[0].masked_fill(centres_2N[0] == -torch.inf, 0.0)
    tops_NK = (chosen_NK - top_N.unsqueeze(1)) / temperature
    absent_N = centre_N == -torch.inf
    rest_N = ((centre_N - centres_2N[1]) / temperature + log_N).masked_fill(absent_N, -torch.inf)
    sums_2N = over_ranks(torch.stack([tops_NK.exp().sum(1), rest_N.exp()]), axis).log()
    largest_N = centres_2N.amax(0)
    logs_2N = (centres_2N - largest_N) / temperature + sums_2N
    total_N = torch.logaddexp(*logs_2N)
    share_N = (rest_N - sums_2N[1]).exp().masked_fill(absent_N, 0.0)
    shift_N = (top_N - largest_N) / temperature - total_N
    return tops_NK + shift_N.unsqueeze(1), torch.stack([logs_2N[1] - total_N, share_N])


def _teacher_rest(log_shares: Tensor, num_classes: int, reverse: bool) -> Tensor:
    """The logarithm of the teacher's share of all other words, [N]."""
    dtype, num_words = wide(log_shares.dtype), log_shares.shape[1]
    rest_N = 1.0 - log_shares.to(dtype).exp().sum(1)
    least = (num_words + 4) * torch.finfo(log_shares.dtype).eps  # K shares, and their logarithms, rounded
    rest_N = torch.where(rest_N < least, least if reverse else 0.0, rest_N)
    return (rest_N if num_words < num_classes else torch.zeros_like(rest_N)).log()


def _terms(log_p: Tensor, log_q: Tensor, reverse: bool) -> Tensor:
    """p · (log p - log q), or q · (log q - log p); 0 where the first has no share."""
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    return (first.exp() * (first - second)).masked_fill(first.exp() == 0, 0.0)


def _dtype(logits: Tensor, log_shares: Tensor) -> torch.dtype:
    return torch.promote_types(wide(logits.dtype), log_shares.dtype)


def _fake_totals(
    logits: Tensor, words: Tensor, log_shares: Tensor,
    num_classes: int, temperature: float, reverse: bool, axis: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = logits.new_empty(logits.shape[0], dtype=_dtype(logits, log_shares))
    return rows, rows.new_empty(words.shape), rows.new_empty(2, logits.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, words, log_shares, *ctx.how = inputs
    ctx.save_for_backward(logits, words, log_shares, *output)
    ctx.mark_non_differentiable(*output[1:])


def _back(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moec.divergence_top_back(grad_N, *ctx.saved_tensors, *ctx.how), *[None] * 6


def _gradient(
    grad: Tensor, logits: Tensor, words: Tensor, log_shares: Tensor, rows: Tensor, log_q: Tensor,
    rest: Tensor, num_classes: int, temperature: float, reverse: bool, axis: str,
) -> Tensor:  # fmt: skip
    scale_N = over_ranks(grad, axis) / temperature
    log_rest_N, share_N = rest
    log_p_NK = log_shares.to(rows.dtype)
    log_p_rest_N = _teacher_rest(log_shares, num_classes, reverse).to(rows.dtype)
    all_N = rows if reverse else log_p_NK.exp().sum(1) + log_p_rest_N.exp()
    slopes_NK = _slopes(log_p_NK, log_q, all_N.unsqueeze(1), reverse).mul_(scale_N.unsqueeze(1))
    slope_N1 = (_slopes(log_p_rest_N, log_rest_N, all_N, reverse) * share_N * scale_N).unsqueeze(1)
    places_NK = _places(words, own_words(num_classes, axis)[0], logits.shape[1])
    gradient = torch.empty_like(logits)
    for at in row_chunks(logits):
        _, others = _parted(logits[at], places_NK[at], rows.dtype)
        made = softened(others, temperature, rows.dtype).softmax(1).mul_(slope_N1[at])
        made = made.masked_fill_(share_N[at, None] == 0, 0.0).scatter_(1, places_NK[at], slopes_NK[at])
        gradient[at] = made[:, :-1]
    return gradient


def _slopes(log_p: Tensor, log_q: Tensor, whole: Tensor, reverse: bool) -> Tensor:
    """The gradient by the student's logits, those of a share together: q · (all that p has) - p, or
    q · (log q - log p - divergence)."""
    q = log_q.exp()
    if reverse:
        return (q * (log_q - log_p - whole)).masked_fill(q == 0, 0.0)
    return q * whole - log_p.exp()


def _fake_gradient(
    grad: Tensor, logits: Tensor, words: Tensor, log_shares: Tensor, rows: Tensor, log_q: Tensor,
    rest: Tensor, num_classes: int, temperature: float, reverse: bool, axis: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits)


def _divergence_top(
    logits: Tensor, words: Tensor, log_shares: Tensor,
    num_classes: int, temperature: float, reverse: bool, axis: str,
) -> Tensor:  # fmt: skip
    how = (num_classes, temperature, reverse, axis)
    return torch.ops.moec.divergence_top_totals(logits, words, log_shares, *how)[0]


_TOLD = "Tensor logits, Tensor words, Tensor log_shares"
_HOW = "int num_classes, float temperature, bool reverse, str axis"
define(f"divergence_top_totals({_TOLD}, {_HOW}) -> (Tensor, Tensor, Tensor)", _totals, _fake_totals)
define(
    f"divergence_top_back(Tensor grad, {_TOLD}, Tensor rows, Tensor log_q, Tensor rest, {_HOW}) -> Tensor",
    _gradient, _fake_gradient,
)  # fmt: skip
define_composite(f"divergence_top({_TOLD}, {_HOW}) -> Tensor", _divergence_top)
differentiate("divergence_top_totals", _keep, _back)
