"""The gradient of `moec::moe_ffn_forward`: what is kept, and what `moe_ffn_backward` is asked for.

`mix` is folded into the weights before, so that the operators below know nothing of it; the gradients of
`mix` and `dense` follow from theirs in a few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Biases = Sequence[Tensor | None]


class _Layer(torch.autograd.Function):
    """`moe_ffn_forward` with its gradient. Tensors come flat: torch's own registration of gradients takes no
    list in which some are None."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[str, int, tuple[bool, ...]], *tensors: Tensor | None) -> Any:
        x, weights, order, counts, dense, mix, *rest = tensors
        matrices, biases = _apart(shape, rest)
        with torch._C._AutoDispatchBelowAutograd():
            y, ups = torch.ops.moec.moe_ffn_forward.default(
                x, weights, order, counts, matrices, biases, shape[0], dense, mix, True
            )
        ctx.shape, ctx.dense_dtype = shape, None if dense is None else dense.dtype
        kept = None if mix is None else dense
        ctx.save_for_backward(x, weights, order, counts, kept, mix, *rest, *ups)
        ctx.mark_non_differentiable(*ups)
        ctx.set_materialize_grads(False)
        return y, *ups

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return (None, *_gradients(ctx, grad))


def _apart(shape: tuple[str, int, tuple[bool, ...]], rest: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Matrices and biases from a flat list that holds the biases that are there."""
    _, num_matrices, has_bias = shape
    present = iter(rest[num_matrices:])
    return list(rest[:num_matrices]), [next(present) if has else None for has in has_bias]


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The gradient of each tensor that went in, for `grad` at y."""
    formula, num_matrices, has_bias = ctx.shape
    _, need_x, need_weights, _, _, need_dense, need_mix, *rest = ctx.needs_input_grad
    need_matrices, need_biases = any(rest[:num_matrices]), any(rest[num_matrices:])
    x, weights, order, counts, dense, mix, *kept = ctx.saved_tensors
    (matrices, biases), ups = _apart(ctx.shape, kept), kept[num_matrices + sum(has_bias) :]
    folded = weights if mix is None else weights * mix[:, :1].to(weights.dtype)
    to_x, dots_TK, to_matrices, to_biases = torch.ops.moec.moe_ffn_backward.default(
        grad.to(x.dtype), x, folded, order, counts, matrices, biases, formula, ups,
        [need_x, need_weights or need_mix, need_matrices, need_biases],
    )  # fmt: skip
    found: list[Tensor | None] = [to_x, _to_weights(dots_TK, mix) if need_weights else None, None, None]
    found.append(_to_dense(grad, mix).to(ctx.dense_dtype) if need_dense else None)
    found.append(_to_mix(grad, weights, dots_TK, dense, mix) if need_mix else None)
    found += [*to_matrices, *(g for g, has in zip(to_biases, has_bias, strict=True) if has)]
    return [g if need else None for g, need in zip(found, ctx.needs_input_grad[1:], strict=True)]


def _to_weights(dots_TK: Tensor, mix_T2: Tensor | None) -> Tensor:
    return dots_TK if mix_T2 is None else dots_TK * mix_T2[:, :1].to(dots_TK.dtype)


def _to_dense(grad_TD: Tensor, mix_T2: Tensor | None) -> Tensor:
    return grad_TD if mix_T2 is None else grad_TD * mix_T2[:, 1:]


def _to_mix(grad: Tensor, weights: Tensor, dots_TK: Tensor, dense: Tensor, mix: Tensor) -> Tensor:
    first, second = (weights * dots_TK).sum(1), (grad * dense).sum(1)
    return torch.stack([first.to(mix.dtype), second.to(mix.dtype)], 1)


def with_gradient(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
    formula: str, dense: Tensor | None, mix: Tensor | None, save: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """`moe_ffn_forward` as autograd calls it: keeps `ups` where a gradient is wanted."""
    present = [bias for bias in biases if bias is not None]
    tensors = (x, weights, order, counts, dense, mix, *matrices, *present)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.moec.moe_ffn_forward.default(
                x, weights, order, counts, matrices, biases, formula, dense, mix, save
            )
    shape = (formula, len(matrices), tuple(bias is not None for bias in biases))
    y, *ups = _Layer.apply(shape, *tensors)
    return y, ups if save else []
