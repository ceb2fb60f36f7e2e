"""How far a student's words are from a teacher's, position by position.

divergence(logits [N,V_l], teacher [N,V_l], num_classes, temperature, reverse, axis) -> [N]
    KL(p ‖ q), or KL(q ‖ p) with `reverse`: p = softmax(teacher / temperature), q = softmax(logits /
    temperature), over all `num_classes` words; in float32 at least. Differentiable in `logits` alone.
    `axis`: the mesh axis that the words are dealt out over ("" : none, V_l is num_classes); the result is
    whole on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.registry import define, differentiate, wide


def _log_shares(logits_NV: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits_NV.to(wide(logits_NV.dtype)) / temperature, -1)


def _divergence(
    logits: Tensor, teacher: Tensor, num_classes: int, temperature: float, reverse: bool, axis: str
) -> Tensor:
    log_p, log_q = _log_shares(teacher, temperature), _log_shares(logits, temperature)
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    return (first.exp() * (first - second)).sum(-1)


def _fake_divergence(
    logits: Tensor, teacher: Tensor, num_classes: int, temperature: float, reverse: bool, axis: str
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, teacher, *ctx.how = inputs
    ctx.save_for_backward(logits, teacher, output)


def _back(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
    logits, teacher, rows_N = ctx.saved_tensors
    return torch.ops.moec.divergence_back(grad_N, logits, teacher, rows_N, *ctx.how), *[None] * 5


def _gradient(
    grad: Tensor, logits: Tensor, teacher: Tensor, rows: Tensor,
    num_classes: int, temperature: float, reverse: bool, axis: str,
) -> Tensor:  # fmt: skip
    log_p, log_q = _log_shares(teacher, temperature), _log_shares(logits, temperature)
    q = log_q.exp()
    slope = q * (log_q - log_p - rows.unsqueeze(-1)) if reverse else q - log_p.exp()
    return (slope * (grad / temperature).unsqueeze(-1)).to(logits.dtype)


def _fake_gradient(
    grad: Tensor, logits: Tensor, teacher: Tensor, rows: Tensor,
    num_classes: int, temperature: float, reverse: bool, axis: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits)


_HOW = "int num_classes, float temperature, bool reverse, str axis"
define(f"divergence(Tensor logits, Tensor teacher, {_HOW}) -> Tensor", _divergence, _fake_divergence)
define(
    f"divergence_back(Tensor grad, Tensor logits, Tensor teacher, Tensor rows, {_HOW}) -> Tensor",
    _gradient, _fake_gradient,
)  # fmt: skip
differentiate("divergence", _keep, _back)
