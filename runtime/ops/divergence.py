"""How far a student's words are from a teacher's, position by position.

divergence(logits [N,V_l], teacher [N,V_l], num_classes, temperature, reverse, axis) -> [N]
    KL(p ‖ q), or KL(q ‖ p) with `reverse`: p = softmax(teacher / temperature), q = softmax(logits /
    temperature), over all `num_classes` words. Differentiable in `logits` alone.
    `axis`: the mesh axis that the words are dealt out over ("" : none, V_l is num_classes); the result is
    whole on every rank. Sends five vectors of N, and one back; never logits.

Computed in the wider dtype of the two, float32 at least. A word without a share (a logit of -inf) costs
nothing: 0 · log 0 = 0. Where the first distribution has a share and the second has none the result is inf,
whichever way round, and its gradient means nothing. A row of nothing but -inf gives nan.

Of words dealt out, each rank compares its own as if there were no others, and the chain rule of the
divergence puts them together: with w and v, how much of p and of q lies on a rank,
KL(p ‖ q) = sum over ranks of w · (KL(p | rank ‖ q | rank) + log(w / v)).

Backward is computed from logits and three vectors of N; what arrives is summed over ranks, as in
`vocabulary`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.logits import largest, log_sums, over_ranks, require_own_words, row_chunks, softened
from moec.runtime.ops.registry import define, define_composite, demand, differentiate, wide


def _check(logits: Tensor, teacher: Tensor, num_classes: int, temperature: float, axis: str) -> None:
    found = f"logits {list(logits.shape)}, teacher {list(teacher.shape)}"
    demand(logits.shape == teacher.shape, "divergence", found, "[N, V_l] both")
    require_own_words(logits, num_classes, axis, "divergence")
    demand(temperature > 0, "divergence", f"temperature {temperature}", "a number above 0")


def _dtype(logits: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(wide(logits.dtype), teacher.dtype)


def _totals(
    logits: Tensor, teacher: Tensor, num_classes: int, temperature: float, reverse: bool, axis: str
) -> tuple[Tensor, Tensor]:
    """The divergence [N], and how much of the first and of the second side lies on this rank [2, N]."""
    _check(logits, teacher, num_classes, temperature, axis)
    sides = (logits, teacher) if reverse else (teacher, logits)
    dtype = _dtype(logits, teacher)
    within_N = logits.new_empty(logits.shape[0], dtype=dtype)
    logs_2N = within_N.new_empty(2, logits.shape[0])
    for at in row_chunks(logits):
        soft = [softened(side[at], temperature, dtype) for side in sides]
        first, second = (side.log_softmax(1) for side in soft)
        if axis:
            logs_2N[:, at] = torch.stack([log_sums(first), log_sums(second)])
        within_N[at] = _within(soft[0].softmax(1), first.sub_(second))
    if not axis:
        return within_N, torch.ones_like(logs_2N)
    centres_2N = torch.stack([largest(side, dtype) for side in sides])
    return _joined(within_N, centres_2N, logs_2N, temperature, axis)


def _within(shares_NV: Tensor, gaps_NV: Tensor) -> Tensor:
    """The sum of shares · gaps, [N], where a share of 0 counts as nothing whatever its gap."""
    sums_N = torch.linalg.vecdot(shares_NV, gaps_NV)
    unclear_N = sums_N.isnan()
    if unclear_N.any():  # words without a share, 0 · inf: the rows that have none are not asked to pay for it
        shares = shares_NV[unclear_N]
        sums_N[unclear_N] = (shares * gaps_NV[unclear_N].masked_fill(shares == 0, 0.0)).sum(1)
    return sums_N


def _joined(
    within_N: Tensor, centres_2N: Tensor, logs_2N: Tensor, temperature: float, axis: str
) -> tuple[Tensor, Tensor]:
    """What `_totals` gives, of what each rank found of its own words."""
    absent_2N = centres_2N == -torch.inf  # no words here, or none with a share
    beside_2N = (centres_2N - over_ranks(centres_2N, axis, "max")) / temperature
    logs_2N = beside_2N + logs_2N.masked_fill(absent_2N, 0.0)
    logs_2N = logs_2N - over_ranks(logs_2N.exp(), axis).log()
    shares_2N = logs_2N.exp()
    apart_N = within_N.masked_fill(absent_2N.any(0), 0.0) + logs_2N[0] - logs_2N[1]
    apart_N = shares_2N[0] * apart_N.masked_fill(shares_2N[0] == 0, 0.0)
    return over_ranks(apart_N, axis), shares_2N


def _fake_totals(
    logits: Tensor, teacher: Tensor, num_classes: int, temperature: float, reverse: bool, axis: str
) -> tuple[Tensor, Tensor]:
    made = logits.new_empty(logits.shape[0], dtype=_dtype(logits, teacher))
    return made, made.new_empty(2, logits.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, teacher, *ctx.how = inputs
    ctx.save_for_backward(logits, teacher, *output)
    ctx.mark_non_differentiable(output[1])


def _back(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.moec.divergence_back(grad_N, *ctx.saved_tensors, *ctx.how), *[None] * 5


def _gradient(
    grad: Tensor, logits: Tensor, teacher: Tensor, rows: Tensor, shares: Tensor,
    num_classes: int, temperature: float, reverse: bool, axis: str,
) -> Tensor:  # fmt: skip
    scale_N1 = (over_ranks(grad, axis) / temperature).unsqueeze(1)
    sides, slope = ((logits, teacher), _slope_reverse) if reverse else ((teacher, logits), _slope)
    gradient = torch.empty_like(logits)
    for at in row_chunks(logits):
        first, second = (softened(side[at], temperature, rows.dtype) for side in sides)
        here = shares[:, at].unsqueeze(2) if axis else None
        gradient[at] = slope(first, second, here, rows[at, None]).mul_(scale_N1[at])
    return gradient


def _slope(first: Tensor, second: Tensor, here: Tensor | None, rows: Tensor) -> Tensor:
    """q - p, the student second; `here`: how much of both sides lies on this rank, None: all of them."""
    return _of_all_words(second, here, 1).sub_(_of_all_words(first, here, 0))


def _slope_reverse(first: Tensor, second: Tensor, here: Tensor | None, rows: Tensor) -> Tensor:
    """q · (log q - log p - divergence), the student first."""
    gaps = first.log_softmax(1).sub_(second.log_softmax(1))
    gaps.sub_(rows if here is None else rows - here[0].log() + here[1].log())
    q = _of_all_words(first, here, 0)
    return gaps.mul_(q).masked_fill_(q == 0, 0.0)


def _of_all_words(soft_NV: Tensor, here: Tensor | None, side: int) -> Tensor:
    """The shares of this rank's words among those of all ranks."""
    shares_NV = soft_NV.softmax(1)
    if here is None:
        return shares_NV
    # Where this rank has no share, the softmax may be that of nothing.
    return shares_NV.mul_(here[side]).masked_fill_(here[side] == 0, 0.0)


def _fake_gradient(
    grad: Tensor, logits: Tensor, teacher: Tensor, rows: Tensor, shares: Tensor,
    num_classes: int, temperature: float, reverse: bool, axis: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits)


def _divergence(
    logits: Tensor, teacher: Tensor, num_classes: int, temperature: float, reverse: bool, axis: str
) -> Tensor:
    return torch.ops.moec.divergence_totals(logits, teacher, num_classes, temperature, reverse, axis)[0]


_HOW = "int num_classes, float temperature, bool reverse, str axis"
define(f"divergence_totals(Tensor logits, Tensor teacher, {_HOW}) -> (Tensor, Tensor)", _totals, _fake_totals)
define(
    f"divergence_back(Tensor grad, Tensor logits, Tensor teacher, Tensor rows, Tensor shares, {_HOW}) "
    "-> Tensor",
    _gradient, _fake_gradient,
)  # fmt: skip
define_composite(f"divergence(Tensor logits, Tensor teacher, {_HOW}) -> Tensor", _divergence)
differentiate("divergence_totals", _keep, _back)
